"""Keys and ids: what is equal, what is not, and that nothing in a text can break them."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.text import ID_HEX_DIGITS, normalise_key, pair_id, stable_hash

TEXT = st.text(st.characters(), max_size=40)  # lone surrogates too


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("  Red\t\n Shoes ", "red shoes"),
        ("ＲＥＤ　shoes", "red shoes"),  # full-width letters and space
        ("Straße", "strasse"),
        ("e\u0301te\u0301", "été"),
        ("red\u200bshoes", "redshoes"),
        ("e\u200d\u0301", "é"),  # a joiner between letter and accent
        ("\u202ered", "red"),
        ("re\x00d", "red"),
        ("½ inch", "1⁄2 inch"),
        ("ǅ", "dž"),
        (None, ""),
        ("", ""),
        ("\x00\x01\u200b \u2060", ""),
    ],
)
def test_key_of_a_text(text: str | None, key: str) -> None:
    assert normalise_key(text) == key


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_a_key_is_its_own_key(text: str) -> None:
    key = normalise_key(text)
    assert normalise_key(key) == key
    assert key == key.strip()
    assert "  " not in key


def test_pair_id_has_no_seams() -> None:
    assert pair_id("a b", "c") != pair_id("a", "b c")
    assert pair_id("a", "b", "c") != pair_id("a", "b c")
    assert pair_id("a", "1:b") != pair_id("a1:", "b")
    assert pair_id("a", "b", None) == pair_id("a", "b", "") == pair_id("A", " b", "\u200b ")
    assert len(pair_id("a", "b")) == ID_HEX_DIGITS


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, max_size=3), st.lists(TEXT, max_size=3))
def test_different_lists_have_different_hashes(a: list[str], b: list[str]) -> None:
    assert (stable_hash(*a) == stable_hash(*b)) == (a == b)


def test_ids_are_the_same_in_every_process_and_version() -> None:
    # A changed id would orphan every annotation made so far.
    assert pair_id("Angle bracket", "Simpson Strong-Tie 12-Gauge Angle") == "81fae7a095227f729f8a"
    code = "from data.text import pair_id; print(pair_id('q', 't', 'x'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == pair_id("q", "t", "x")
