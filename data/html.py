"""Product text that was written for a web page, as the text that a reader of the page would see."""

from __future__ import annotations

import re
from html import unescape

_INLINE = (
    "a abbr b bdi bdo big center cite code em font head i kbd label mark noscript q s samp script small span strike strong "
    "style sub sup template time title tt u var wbr"
)
_BLOCKS = (
    "address article aside blockquote body br button caption col colgroup dd del details div dl dt embed fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr html iframe img input ins legend li link main map meta nav "
    "object ol option p param picture pre section select source summary svg table tbody td textarea tfoot th thead tr ul "
    "video"
)
# What is opened and not closed hides the rest, as in a browser; so no text is searched twice.
_HIDDEN = re.compile(
    r"<!--.*?(?:-->|\Z)|<![a-z][^<>]*>|<(script|style|head|title|template|noscript)\b[^<>]*>.*?(?:</\1\s*>|\Z)",
    re.I | re.S,
)
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE.replace(' ', '|')})(?:\s[^<>]*)?/?>", re.I)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCKS.replace(' ', '|')})(?:\s[^<>]*)?/?>", re.I)
_LONGEST = 1_000_000


def visible_text(text: str) -> str:
    """`text` without HTML tags, comments, scripts and styles, its entities decoded and white space runs made one space.

    Only HTML's own tags are taken for tags: "a < b", "<3" and "<5mm>" stay. Text that holds neither a tag nor an entity
    comes back unchanged, spaces and all.
    """
    if not ("<" in text or "&" in text) or len(text) > _LONGEST:
        return text
    plain = unescape(_BLOCK_TAG.sub(" ", _INLINE_TAG.sub("", _HIDDEN.sub("", text))))
    return text if plain == text else " ".join(plain.split())
