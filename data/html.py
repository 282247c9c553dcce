"""Product text that was written for a web page, as the text that a reader of the page would see."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from pyspark.sql import Column

_HIDDEN = frozenset({"script", "style", "head", "title", "template", "noscript"})
_INLINE = frozenset({
    "a", "abbr", "b", "bdi", "bdo", "big", "center", "cite", "code", "em", "font", "i", "kbd", "label", "mark", "q", "s",
    "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr",
})  # fmt: skip
_BLOCKS = frozenset({
    "address", "article", "aside", "blockquote", "body", "br", "button", "caption", "col", "colgroup", "dd", "details",
    "div", "dl", "dt", "embed", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6",
    "header", "hr", "html", "iframe", "img", "input", "ins", "del", "legend", "li", "link", "main", "map", "meta", "nav",
    "object", "ol", "option", "p", "param", "picture", "pre", "section", "select", "source", "summary", "svg", "table",
    "tbody", "td", "textarea", "tfoot", "th", "thead", "tr", "ul", "video",
})  # fmt: skip
_LONGEST = 1_000_000


def visible_text(text: str) -> str:
    """`text` without HTML tags, comments, scripts and styles, its entities decoded and white space runs made one space.

    Only HTML's own tags are taken for tags: "a < b", "<3" and "<5mm>" stay. Text that holds neither a tag nor an entity
    comes back unchanged, spaces and all.
    """
    if not ("<" in text or "&" in text) or len(text) > _LONGEST:
        return text
    page = _Page()
    page.feed(text)
    page.close()
    found = "".join(page.parts)
    return text if found == text else " ".join(found.split())


def visible_text_column(column: Column) -> Column:
    """`visible_text` as a Spark expression; only texts that can hold markup go to Python."""
    from pyspark.sql import functions as F
    from pyspark.sql.functions import arrow_udf

    def visible(texts: pa.Array) -> pa.Array:
        return pa.array([None if text is None else visible_text(text) for text in texts.to_pylist()], pa.string())

    udf = arrow_udf(visible, "string")  # type: ignore[call-overload]  # its kind follows from the annotations above
    marked = column.contains("<") | column.contains("&")
    return F.coalesce(udf(F.when(marked, F.make_valid_utf8(column))), column)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self._hidden += 1
        else:
            self._tag(tag, self.get_starttag_text() or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _HIDDEN:
            self._tag(tag, self.get_starttag_text() or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        else:
            self._tag(tag, f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)

    def _tag(self, tag: str, written: str) -> None:
        if tag in _BLOCKS:
            self.handle_data(" ")
        elif tag not in _INLINE:
            self.handle_data(written)
