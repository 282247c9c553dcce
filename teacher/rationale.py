"""A reason for a label where the source gives none: which of the query's words the ad covers.

What was left out: any claim that cannot be read off the two texts. It is a start from which AGPO learns to reason, so it is
short and true.
"""

from __future__ import annotations

from data.contracts import words


def lexical_rationale(query: str, ad: str) -> str:
    """One sentence on the words of `query` that `ad` covers, and those that it misses (at most six of each).

    >>> lexical_rationale("led light bulbs", "60W LED bulb")
    'The ad covers led, bulbs; it lacks light.'
    """
    covered, missing = compare_words(query, ad)
    return f"The ad covers {', '.join(covered[:6]) or 'nothing'}; it lacks {', '.join(missing[:6]) or 'nothing'}."


def compare_words(query: str, ad: str) -> tuple[list[str], list[str]]:
    """The words of `query` that `ad` has, and those that it lacks, in the query's order, in lower case, each once."""
    offered, asked = set(map(_stem, words(ad))), list(dict.fromkeys(words(query)))
    return [word for word in asked if _stem(word) in offered], [word for word in asked if _stem(word) not in offered]


def _stem(word: str) -> str:
    """Without the endings -ing, -s and -e: enough to match "bulbs" with "bulb" and "boxes" with "box"."""
    if word.endswith("ing") and len(word) > 5:
        word = word[:-3]
    elif word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        word = word[:-1]
    return word[:-1] if word.endswith("e") and len(word) > 3 else word
