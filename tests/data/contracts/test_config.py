"""A setting that was renamed is still read under its old name."""

import logging
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from data.contracts import Config


class Part(Config):
    renamed: ClassVar[dict[str, str]] = {"window": "max_in_flight"}
    max_in_flight: int = 1


class Whole(Config):
    renamed: ClassVar[dict[str, str]] = {"section": "part"}
    part: Part = Part()


@pytest.mark.parametrize(
    "given",
    [{"part": {"window": 3}}, {"section": {"max_in_flight": 3}}, {"part": {"max_in_flight": 1, "window": 3}}],
)
def test_an_old_name_is_read_and_warned_about_once(given: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert Whole.model_validate(given) == Whole(part=Part(max_in_flight=3))
    assert Whole.model_validate(given, context="recorded").part.max_in_flight == 3
    assert len(caplog.records) <= 1  # once in a process, so perhaps in an earlier case


def test_the_warning_names_both(caplog: pytest.LogCaptureFixture) -> None:
    class Later(Part):
        pass

    with caplog.at_level(logging.WARNING):
        Later.model_validate({"window": 3}, context="recorded")
        assert not caplog.records
        Later.model_validate({"window": 3})
        Later.model_validate({"window": 4})
    (record,) = caplog.records
    assert "'window' is now called 'max_in_flight'" in record.getMessage()


def test_other_unknown_names_are_refused() -> None:
    with pytest.raises(ValidationError, match="windw"):
        Part.model_validate({"windw": 3})
