"""The base of every typed config."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, model_validator

logger = logging.getLogger(__name__)


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"the home in {path} is not known; write the whole path") from None


UserPath = Annotated[Path, AfterValidator(_expanded)]
"""A path in which `~` is the user's home."""
_WARNED: set[tuple[str, str]] = set()


class Config(BaseModel):
    """Base of every typed config: unknown keys are refused, values are fixed once built.

    A setting that gets a new name stays readable under its old one for one release: name both in `renamed`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    renamed: ClassVar[dict[str, str]] = {}
    """Old name of a field → its name today. A value under the old name wins, as presets use the new one."""

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict) or not cls.renamed.keys() & given.keys():
            return given
        for name in given.keys() & cls.renamed.keys():
            if info.context != "recorded":  # nobody wrote what a run's folder holds
                cls.warn_renamed(name)
        old_names = {cls.renamed[name]: value for name, value in given.items() if name in cls.renamed}
        return {name: value for name, value in given.items() if name not in cls.renamed} | old_names

    @classmethod
    def warn_renamed(cls, name: str) -> None:
        """Log once in a process that the setting `name` has a new name."""
        if (cls.__name__, name) not in _WARNED:
            _WARNED.add((cls.__name__, name))
            logger.warning(
                "the setting '%s' is now called '%s'; please rename it, the next release refuses the old name",
                *(name, cls.renamed[name]),
            )
