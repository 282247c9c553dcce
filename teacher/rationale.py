"""A reason for a label where the source gives none: which of the query's words the ad covers.

What was left out: any claim that cannot be read off the two texts. It is a start from which AGPO learns to reason, so it is
short and true.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+", re.UNICODE)


def lexical_rationale(query: str, ad: str) -> str:
    """One sentence on the words of `query` that `ad` covers, and those that it misses (at most six of each).

    >>> lexical_rationale("led light bulbs", "60W LED bulb")
    'The ad covers led, bulbs; it lacks light.'
    """
    offered = {_stem(word) for word in _WORD.findall(ad.lower())}
    words = list(dict.fromkeys(_WORD.findall(query.lower())))
    covered = [word for word in words if _stem(word) in offered][:6]
    missing = [word for word in words if _stem(word) not in offered][:6]
    return f"The ad covers {', '.join(covered) or 'nothing'}; it lacks {', '.join(missing) or 'nothing'}."


def _stem(word: str) -> str:
    """Plural and -ing endings off: enough to match "bulbs" with "bulb"."""
    for ending in ("ing", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
