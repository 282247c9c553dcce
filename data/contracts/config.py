"""The base of every typed config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of every typed config: unknown keys are refused, values are fixed once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
