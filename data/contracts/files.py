"""Small files and fingerprints: JSON that is there whole or not at all, digests of values and of files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.contracts.errors import ContractError


def digest(value: object) -> str:
    """SHA-256 (first 16 hex digits) of a JSON-able value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return digest_bytes([text.encode("utf-8", "surrogatepass")])


def digest_files(files: Iterable[Path]) -> str:
    """SHA-256 (first 16 hex digits) over the names and the content of files, in the order given."""

    def parts() -> Iterator[bytes]:
        for file in files:
            yield file.name.encode("utf-8", "surrogateescape")
            with file.open("rb") as content:
                yield hashlib.file_digest(content, "sha256").digest()

    return digest_bytes(parts())


def digest_bytes(parts: Iterable[bytes]) -> str:
    """SHA-256 (first 16 hex digits) of the parts, one after the other."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()[:16]


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old file or the new one, never a half."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` in one step when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    yield temporary
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `FileNotFoundError`, and `ContractError` when the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ContractError(f"{path} is damaged ({error}); run its stage again") from None
    if not isinstance(content, dict):
        raise ContractError(f"{path} is damaged (no JSON object); run its stage again")
    return content
