"""The words of a text, for what counts words: BM25, overlaps, slices, drift."""

from __future__ import annotations

import re

# Words, and single characters of scripts that are written without spaces.
_ALONE = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")


def words(text: str) -> list[str]:
    """Lower-case words of a text; Chinese, Japanese and Korean characters stand alone."""
    return _WORD.findall(text.lower())
