"""Which encoding a text file seems to have, when it is not the one that is set."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from data.sources.paths import open_bytes

_BOMS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Letters of Western European languages and the punctuation that word processors put in; ð, þ and ý are far more often
# Turkish or Cyrillic text under the wrong name.
_WESTERN = set("àáâãäåæçèéêëìíîïñòóôõöøùúûüÿßœÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜŒ‘’“”„–—…•€£¥©®™°ºª½¼¾²×¡¿«»·§´\xa0")
_OTHERS = ["cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "koi8_r", "cp932", "euc_jp", "gb18030",
           "big5", "euc_kr"]  # fmt: skip
_ODD_CASE = re.compile("[a-z][À-Þ]")
_FOREIGN_WORD = re.compile(r"\w*[^\W\x00-\x7f]\w*")
_CHUNK = 1 << 20


def propose_encoding(path: Path) -> str:
    """What a file that is no UTF-8 seems to be, such as "it looks like windows-1252 ('café')"; empty if unknown."""
    sample = _undecodable(path)
    encoding = _guess(sample) if sample else ""
    words = _FOREIGN_WORD.findall(sample.decode(encoding, "replace")) if encoding else []
    return encoding and f"it looks like {encoding}" + (f" ({words[0][:30]!r})" if words else "")


def _undecodable(path: Path) -> bytes:
    """The first part of the file that is no UTF-8: its lines that are not ASCII, or all of it where there are zeros."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_bytes(path) as file:
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            if b"\x00" in chunk[:1000]:
                return chunk[:1000]
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError:
                return b"\n".join(line for line in chunk.splitlines() if not line.isascii())[: 1 << 16]
    return b""


def _guess(sample: bytes) -> str:
    from charset_normalizer import from_bytes

    if sample.startswith(_BOMS):
        return "utf-32" if sample.startswith(_BOMS[:2]) else "utf-16"
    if zeros := sample.count(0):  # without a mark, every second byte of Latin text is 0
        return "utf-16-le" if sample[1::2].count(0) > zeros / 2 else "utf-16-be"
    # charset-normalizer takes a few accented letters for Central European ones, so Western text is recognised first.
    for encoding in ("windows-1252", "mac_roman", "cp850"):
        text = sample.decode(encoding, "replace")
        letters = "".join(_FOREIGN_WORD.findall(text))
        minority = 2 * sum(c > "\x7f" for c in letters) <= len(letters)
        if minority and {c for c in text if c > "\x7f"} <= _WESTERN and not _ODD_CASE.search(text):
            return encoding
    best = from_bytes(sample, cp_isolation=_OTHERS).best()
    return best.encoding if best else ""
