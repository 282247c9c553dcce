"""What every stage's work returns."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class StageOutput(BaseModel):
    """The fingerprint of a stage's output, by which the stages after it notice a change, and its flat metrics."""

    fingerprint: str
    figures: dict[str, Any]
