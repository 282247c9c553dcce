"""Keys and ids made from text. The text itself is kept as it came; only the keys are normalised.

What was left out: stemming, spelling and punctuation. Two rows share a key only when a reader would call them the same.
"""

from __future__ import annotations

import hashlib
import unicodedata

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


def pair_id(query: str, ad_title: str, ad_text: str | None = None) -> str:
    """Id of a query–ad pair, the same on every machine and for every spelling that `normalise_key` makes equal.

    A missing ad text and one without a visible character are the same.
    """
    return key_id(normalise_key(query), normalise_key(ad_title), normalise_key(ad_text))


def _visible(text: str) -> str:
    return "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
