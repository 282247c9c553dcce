"""Settings that were renamed keep their old name, with a warning."""

import logging
from typing import ClassVar

import pytest
from pydantic import ValidationError

from data.contracts import Config


class Detector(Config):
    renamed: ClassVar[dict[str, str]] = {"guard": "collapse"}

    collapse: int = 1


def test_the_old_name_works_and_warns(caplog):
    with caplog.at_level(logging.WARNING):
        assert Detector(guard=3).collapse == 3
    assert "'guard' is now called 'collapse'" in caplog.text
    caplog.clear()
    assert Detector(collapse=2).collapse == 2
    assert not caplog.records


def test_both_names_at_once_and_unknown_names_are_refused():
    with pytest.raises(ValidationError, match="give one of the two"):
        Detector(guard=3, collapse=2)
    with pytest.raises(ValidationError, match="guards"):
        Detector(guards=3)
