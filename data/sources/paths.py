"""Files on disk: which ones a source reads, how Python and Spark open them, which columns must be there. Files are local."""

from __future__ import annotations

import difflib
import gzip
import io
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from data.contracts import ContractError

log = logging.getLogger(__name__)

Row = tuple[str | None, ...]
"""The cells of the columns that are read, then `problem` (why a line is no row, else None) and `detail` (the line)."""

_FORMATS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".json": "json", ".jsonl": "json", ".ndjson": "json",
            ".parquet": "parquet", ".pq": "parquet"}  # fmt: skip
_REMEDIES = {
    (".xlsx", ".xlsm", ".xls", ".ods", ".numbers"): "is a spreadsheet: save the sheet as CSV (UTF-8)",
    (".tar", ".tar.gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"): "is packed: unpack it",
    (
        ".feather",
        ".arrow",
        ".avro",
        ".orc",
        ".xml",
        ".pkl",
        ".sqlite",
    ): "cannot be read: save the table as Parquet or CSV",
}
_READING = re.compile(r"`data\.(path|format|delimiter|header|quotes|columns)`")
_DOCUMENT = re.compile(r"(readme|licen[cs]e|changelog)(\.txt)?|.*\.(md|rst|pdf|html?|docx?|png|jpe?g|sh|py|ipynb|toml)")


def list_files(path: Path, format: str = "auto") -> list[Path]:
    """The file itself, or the data files of a folder, sorted; never empty.

    Of a folder, hidden files and folders, markers and documents are left out, and what is not of `format` (with `auto`: of
    any that is known), unless nothing else is there.

    Raises `ContractError` when there is none, or a spreadsheet is among them.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise ContractError(f"there is no file {path}{_nearest_file(path)}; check `data.path`")
    files = sorted(
        p
        for p in path.rglob("*")
        if p.is_file() and not any(part.startswith((".", "_")) for part in p.relative_to(path).parts)
    )
    chosen = [file for file in files if not _DOCUMENT.fullmatch(file.name.lower())]
    formats = _FORMATS.values() if format == "auto" else [format.replace("jsonl", "json")]
    chosen = [file for file in chosen if _format_by_name(file) in formats] or chosen
    if not chosen:
        raise ContractError(f"the folder {path} holds no file to read; check `data.path`")
    if len(chosen) < len(files):
        log.info(
            "of %s, these are not read: %s", path, ", ".join(sorted({f.name for f in files} - {f.name for f in chosen}))
        )
    return chosen


def file_format(path: Path, format: str) -> str:
    """`csv`, `tsv`, `json` (lines or an array) or `parquet`: `format`, or by the file's name when that is `auto`."""
    if format != "auto":
        return format.replace("jsonl", "json")
    by_name = _format_by_name(path)
    if by_name is None:
        raise ContractError(
            f"the name of {path} does not tell its format; set `data.format` to csv, tsv, json, jsonl or parquet"
        )
    return by_name


def open_bytes(path: Path) -> IO[bytes]:
    """The content of a file, unpacked if it is gzipped or a zip of one data file, whatever its name."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if start == b"PK\x03\x04":
        try:
            return zipfile.ZipFile(path).open(_zip_member(path))
        except RuntimeError as error:  # encrypted, or packed in a way that Python does not know
            raise ContractError(f"{path} cannot be read ({error}): unpack it") from None
    if start == b"\xd0\xcf\x11\xe0":
        raise ContractError(f"{path} is a spreadsheet: save the sheet as CSV (UTF-8)")
    return path.open("rb")


def open_text(path: Path, encoding: str = "utf-8") -> IO[str]:
    """A text file, packed or not; undecodable bytes become U+FFFD, line ends stay as they are."""
    # utf-8-sig: the mark that Excel puts first is no part of a column's name.
    name = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
    return io.TextIOWrapper(open_bytes(path), encoding=name, errors="replace", newline="")


@contextmanager
def settings_of(section: str) -> Iterator[None]:
    """Errors inside name the settings of `section`, such as data.log, where what reads a table says `data`."""
    try:
        yield
    except ContractError as error:
        raise ContractError(_READING.sub(rf"`{section}.\1`", str(error))) from error


@contextmanager
def readable(path: Path, format: str) -> Iterator[None]:
    """Make one sentence of an error that shows a file to be damaged, or of another format."""
    damage = (OSError, EOFError, UnicodeError, zlib.error, zipfile.BadZipFile, JSONDecodeError, pa.ArrowException)
    try:
        yield
    except damage as error:
        raise ContractError(f"{path} cannot be read as {format}: {error}; check the file or `data.format`") from error


def spark_paths(files: Iterable[Path]) -> list[str]:
    """Local files as Spark wants them: on the local file system whatever the default is, and no character a pattern."""
    return ["file://" + re.sub(r"([\\{}\[\]*?,])", r"\\\1", str(file.resolve())) for file in files]


def public_file(name: str) -> Path:
    """A file of a public set in the folder `$ADS_RELEVANCE_DATA`; raises `ContractError` when it is not there."""
    folder = os.environ.get("ADS_RELEVANCE_DATA")
    if not folder or not (path := Path(folder, name)).is_file():
        raise ContractError(
            f"{f'{folder} has no {name}' if folder else 'this source needs a file'}; set `data.path` to the published "
            f"file, or the environment variable ADS_RELEVANCE_DATA to the folder with {name}"
        )
    return path


def require_columns(columns: Mapping[Any, str], present: Sequence[str], path: Path) -> None:
    """Raise `ContractError` for the first mapped column that `present` lacks, naming the nearest, or holds twice."""
    for ours, theirs in columns.items():
        if present.count(theirs) > 1:
            raise ContractError(f"{path} has more than one column '{theirs}'; rename all but one of them")
        if theirs in present:
            continue
        folded = {name.casefold(): name for name in present}
        near = [folded[n] for n in difflib.get_close_matches(theirs.casefold(), list(folded), n=3, cutoff=0.4)]
        hint = f"{'the nearest are' if near else 'it has'} {', '.join(map(repr, near or list(present)[:10]))}"
        raise ContractError(f"{path} has no column '{theirs}' for our '{ours}': {hint}; check `data.columns`")


def one_file(path: Path) -> Path:
    """`path` when it is a file, or the only data file of that folder."""
    first, *more = list_files(path)
    if more:
        raise ContractError(f"{path} holds {len(more) + 1} files; set `data.path` to the one to read")
    return first


def _format_by_name(path: Path) -> str | None:
    """Raises `ContractError` for what is known to be no table that can be read."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zip")
    for suffixes, remedy in _REMEDIES.items():
        if name.endswith(suffixes):
            raise ContractError(f"{path} {remedy}")
    if path.suffix.lower() == ".zip" and Path(name).suffix not in _FORMATS:
        with readable(path, "zip"):
            name = _zip_member(path).lower()
    return _FORMATS.get(Path(name).suffix)


def _zip_member(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.startswith("__MACOSX") and not name.endswith("/")]
    if "[Content_Types].xml" in names:
        raise ContractError(f"{path} is a spreadsheet: save the sheet as CSV (UTF-8)")
    names = [name for name in names if not _DOCUMENT.fullmatch(Path(name).name.lower())]
    if len(names) != 1:
        raise ContractError(
            f"{path} holds {len(names)} files: unpack it, and set `data.path` to the folder or a file of it"
        )
    return names[0]


def _nearest_file(path: Path) -> str:
    if re.search(r"(^|/)[a-z][a-z0-9+.-]+:/", str(path)):
        return ": files are read from this machine only, so copy it here"
    if set(path.name) & set("*?["):
        return ": a pattern is not understood, so name the folder"
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3, cutoff=0.4)
    return f" (that folder has {', '.join(near)})" if near else ""
