"""The scale of grades, kept beside every table and model that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from data.contracts.config import Config
from data.contracts.errors import ContractError
from data.contracts.files import write_json


class Grade(Config):
    """One grade of a scale; its number is its place in `GradeScale.grades`, 0 = irrelevant."""

    name: str = Field(min_length=1)
    definition: str = Field(min_length=1)


class GradeScale(Config):
    """K ordered grades, from irrelevant to fully relevant, and the grade from which a pair counts as relevant.

    Kept as `scale.json` in every `pairs` folder and in every model folder.
    """

    grades: tuple[Grade, ...] = Field(min_length=2, max_length=10)
    relevant_from: int = Field(ge=1)

    @model_validator(mode="after")
    def _relevant_grade_exists(self) -> Self:
        if self.relevant_from >= len(self.grades):
            raise ValueError(f"relevant_from must be a grade above 0 and below {len(self.grades)}")
        return self

    @property
    def size(self) -> int:
        """K, the number of grades."""
        return len(self.grades)

    def save(self, folder: Path) -> None:
        """Write `scale.json` into `folder`."""
        write_json(folder / "scale.json", self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `scale.json` from `folder`; raises `ContractError` when it is missing or not a scale."""
        path = folder / "scale.json"
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ContractError(f"{folder} has no scale.json: it is not a folder that this product wrote") from None
        except ValueError as error:
            raise ContractError(f"{path} is not a grade scale: {error}") from None
