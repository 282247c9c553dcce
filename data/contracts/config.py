"""The base of every typed config."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

logger = logging.getLogger(__name__)


class Config(BaseModel):
    """Base of every typed config: unknown keys are refused, values are fixed once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    renamed: ClassVar[dict[str, str]] = {}
    """Settings that had another name: old → new. The old name works for one release, with a warning."""

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for old, new in cls.renamed.items():
            if old in values and new in values:
                raise ValueError(f"'{old}' is the old name of '{new}': give one of the two")
            if old in values:
                logger.warning("the setting '%s' is now called '%s'; the old name will stop working", old, new)
                values = {new if name == old else name: value for name, value in values.items()}
        return values
