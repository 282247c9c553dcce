"""The words of a text, for what counts words: BM25, overlaps, slices, drift, reasons."""

from __future__ import annotations

import re

ALONE = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
"""The characters, as a regular expression's set, of Chinese, Japanese and Korean."""
_WORD = re.compile(rf"[{ALONE}]|[^\W_{ALONE}]+")


def words(text: str) -> list[str]:
    """Lower-case words of a text; Chinese, Japanese and Korean characters stand alone."""
    return _WORD.findall(text.lower())
