"""Files on disk: which there are, which columns they must have, how Python and Spark open them. Files are local."""

from __future__ import annotations

import difflib
import gzip
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from data.contracts import ContractError


def list_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder (hidden ones and markers left out), sorted; never empty."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise ContractError(f"there is no file {path}{_nearest_file(path)}; check `data.path`")
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "_")))
    if not files:
        raise ContractError(f"the folder {path} holds no file to read; check `data.path`")
    return files


def open_text(path: Path, encoding: str = "utf-8") -> IO[str]:
    """A text file, gzipped or not; undecodable bytes become U+FFFD."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    # utf-8-sig: the mark that Excel puts first is no part of a column's name.
    name = "utf-8-sig" if encoding == "utf-8" else encoding
    return opened(path, "rt", encoding=name, errors="replace", newline="")  # type: ignore[operator]


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


def one_file(path: Path) -> Path:
    """`path` when it is a file, or the only file of that folder."""
    first, *more = list_files(path)
    if more:
        raise ContractError(f"{path} holds {len(more) + 1} files; set `data.path` to the one to read")
    return first


def require_columns(columns: Mapping[Any, str], found: list[str], where: Path) -> None:
    """Raise `ContractError` for the first mapped column that is not in `found`, naming the nearest ones that are."""
    for ours, theirs in columns.items():
        if theirs in found:
            continue
        folded = {name.casefold(): name for name in found}
        near = [folded[n] for n in difflib.get_close_matches(theirs.casefold(), list(folded), n=3, cutoff=0.4)]
        hint = f"{'the nearest are' if near else 'it has'} {', '.join(map(repr, near or found[:10]))}"
        raise ContractError(f"{where} has no column '{theirs}' for our '{ours}': {hint}; mend `data.columns`")


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3, cutoff=0.4)
    return f" (that folder has {', '.join(near)})" if near else ""
