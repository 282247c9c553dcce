"""CSV and TSV files, row by row.

A quote left open makes every reader take the following rows for one field. Such a field is taken apart again, and each of
its lines is a faulty row of its own, so that no row disappears in another. Lines may end in any way, also in several ways
in one file. Rows without content are none: spreadsheets write lines of nothing but commas.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data.config import DELIMITERS
from data.contracts import ContractError
from data.sources.encodings import propose_encoding
from data.sources.paths import Row, open_text, require_columns

LONGEST_FIELD = 4_000_000
"""Characters of a field at which reading stops: a quote left open must not draw the rest of a file into memory."""

_SAMPLE = 1_000_000
_SEP_LINE = re.compile(r'\ufeff?"?sep=(.)"?\s*', re.I)
_BACKSLASH_QUOTE = re.compile(r'(?<!\\)\\"')
_OPEN_QUOTE = "a quote was left open: a quoted field holds what look like rows of their own, this line among them"
_COLUMN_COUNT = "the line has too few or too many columns"


@dataclass(frozen=True)
class Dialect:
    """How CSV and TSV files are written, as far as somebody says so."""

    delimiter: str | None = None
    header: tuple[str, ...] = ()
    """Names of the columns of files that have no header."""
    quotes: bool = True
    """Fields may be quoted; otherwise a quote is a character like any other."""


USUAL = Dialect()


@dataclass(frozen=True)
class DelimitedFile:
    """One file: how it is written, and the place of each column that is read."""

    kind: ClassVar[str] = "csv"
    path: Path
    encoding: str
    reading: dict[str, Any]
    """How `csv.reader` reads it."""
    backslash: bool
    """Quotes inside a field are written as backslash and quote, not as two quotes."""
    has_header: bool
    width: int
    places: tuple[int, ...]

    def rows(self) -> Iterator[Row]:
        """The rows below the header; a line that is none has its fault and itself instead of cells."""
        with open_text(self.path, self.encoding) as file:
            records = _records(self.path, file, self.reading, self.backslash)
            if self.has_header:
                next(records, None)
            for cells, lines in records:
                if not any(map(str.strip, cells)):
                    continue
                if not any(map(str.strip, cells[self.width :])):
                    del cells[self.width :]  # some exports end each row with delimiters
                if len(lines) > 1 and self._is_several_rows(cells, lines):
                    yield from (self._fault(_OPEN_QUOTE, line) for line in lines if line.strip())
                elif len(cells) != self.width:
                    yield self._fault(_COLUMN_COUNT, "".join(lines))
                else:
                    yield (*[cells[place] or None for place in self.places], None, None)

    def _fault(self, problem: str, line: str) -> Row:
        return (*[None] * len(self.places), problem, line.rstrip("\r\n")[:1000])

    def _is_several_rows(self, cells: list[str], lines: list[str]) -> bool:
        """Whether a record of several lines is a broken one, or one in which each line has columns enough to be a row.

        A comma before a space is taken for prose, so that a text of several lines seldom looks like rows; but not where
        the whole file is written so, nor in a line that has exactly as many columns as the file, three or more.
        """
        space = "" if self.reading["skipinitialspace"] else "(?! )"
        separator = re.compile(re.escape(self.reading["delimiter"]) + space)

        def like_a_row(line: str) -> bool:
            enough = len(separator.findall(line)) >= self.width - 1
            return enough or (self.width > 2 and len(next(csv.reader([line], **self.reading))) == self.width)

        return len(cells) != self.width or (self.width > 1 and all(like_a_row(line) for line in lines if line.strip()))


def open_delimited(
    path: Path, columns: Mapping[Any, str], dialect: Dialect, default: str, encoding: str
) -> DelimitedFile:
    """Read the header and find out how the file is written; raises `ContractError` when a column is not there."""
    with open_text(path, encoding) as file:
        sample = file.read(_SAMPLE)
    stated = _SEP_LINE.match(sample.partition("\n")[0])
    delimiter = dialect.delimiter or (stated[1] if stated else default)
    backslash = dialect.quotes and _has_backslash_quotes(sample, delimiter)
    reading: dict[str, Any] = {"delimiter": delimiter}
    reading["quoting"] = csv.QUOTE_MINIMAL if dialect.quotes else csv.QUOTE_NONE
    first = next(_records(path, io.StringIO(sample, newline=""), reading, backslash), ([], []))[0]
    # In files written `a, "b, c"` a quote after the space opens a field.
    reading["skipinitialspace"] = len(first) > 1 and all(name.startswith(" ") for name in first[1:])
    header = [name.strip() for name in first]
    if not any(header):
        raise ContractError(f"{path} is empty or its first line is; a header with the column names is needed")
    if any("\ufffd" in name or "\x00" in name for name in header):
        hint = propose_encoding(path) or "its encoding is unknown"
        raise ContractError(
            f"the first line of {path} is no {encoding} text: {hint}; set `data.encoding`, or save it as UTF-8"
        )
    header[0] = header[0].removeprefix("\ufeff")
    if len(header) == 1 < len(columns):
        _name_the_delimiter(path, header[0], delimiter)
    if dialect.header and len(dialect.header) != len(header):
        raise ContractError(
            f"`data.header` names {len(dialect.header)} columns, and the first row of {path} has {len(header)}"
        )
    header = list(dialect.header) or header
    if not {*columns.values()} & {*header}:
        shown = ", ".join(map(repr, header[:10]))
        raise ContractError(
            f"{path} has none of the columns of `data.columns`; its first line is {shown}: is it a header? "
            "Name the columns in `data.header` if not"
        )
    require_columns(columns, header, path)
    places = tuple(header.index(theirs) for theirs in columns.values())
    return DelimitedFile(path, encoding, reading, backslash, not dialect.header, len(header), places)


def _records(
    path: Path, file: Iterable[str], reading: Mapping[str, Any], backslash: bool
) -> Iterator[tuple[list[str], list[str]]]:
    """The cells of each record, the header first, and the lines it is made of; `sep=;` in the first line is none."""
    lines: list[str] = []

    def each_line() -> Iterator[str]:
        for number, line in enumerate(file):
            if number or not _SEP_LINE.fullmatch(line):
                lines.append(line)
                yield _BACKSLASH_QUOTE.sub('""', line) if backslash else line

    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(each_line(), **reading)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            begin = reader.line_num - len(lines) + 1
            raise ContractError(
                f"the row of {path} that begins in line {begin} has a field of more than {LONGEST_FIELD} characters: "
                "a quote left open?"
            ) from None
        yield cells, lines[:]
        lines.clear()


def _has_backslash_quotes(sample: str, delimiter: str) -> bool:
    """Whether quotes inside quoted fields follow a backslash: such a quote does not end its field."""
    d = re.escape(delimiter)
    inner = rf'(?:^|{d})"[^"]*(?<!\\)\\"(?=[^"\r\n{d}]|"(?:[\r\n{d}]|$))'
    return re.search(inner, sample, re.M) is not None


def _name_the_delimiter(path: Path, header: str, delimiter: str) -> None:
    names = {character: name for name, character in DELIMITERS.items()}
    for character, name in names.items():
        if character != delimiter and character in header:
            raise ContractError(
                f"{path} has one column when read by {names.get(delimiter, repr(delimiter))}, and its header holds "
                f"{name}s; set `data.delimiter` to {name!r}"
            )
