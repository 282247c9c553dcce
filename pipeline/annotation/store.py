"""How annotations get into their folder: whole files by atomic rename, from one run at a time.

A run owns the folder from `take_over` until the next run takes it over. Workers of a killed run may outlive it for a
moment; they look before every rename whether they still own the folder, under a lock that `take_over` holds alone. So no
pair is ever there twice under a key. The folder is one that all workers can write, with POSIX rename and locks (a local
disk, NFS 4, Lustre); object stores have neither, so mount one with a file system that does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.contracts import ContractError, digest

log = logging.getLogger(__name__)

# Names with a leading "_" are skipped by Arrow, by Spark and by `files_of`.
TEMPORARY = "_tmp-"
DAMAGED = "_damaged-"
_OWNER = "_owner.json"
_LOCK = "_lock"
_MAGIC = b"PAR1"


def files_of(out: Path, key: str) -> list[Path]:
    """The files with rows of an annotation key, sorted by name."""
    return sorted(out.glob(f"{key}-*.parquet"))


def take_over(out: Path) -> str:
    """Make this run the owner of the folder and return its name; clears away what killed runs left.

    Half-written files go. A file that is not whole (a disk or a file system failed under it) is set aside, so that its
    pairs are done again.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = uuid.uuid4().hex
    with disk_errors(out), _locked(out, fcntl.LOCK_EX):
        (out / _OWNER).write_text(json.dumps({"run": run, "pid": os.getpid()}) + "\n", encoding="utf-8")
    for leftover in out.glob(f"{TEMPORARY}*"):
        leftover.unlink(missing_ok=True)
    for file in out.glob("[!_]*.parquet"):
        if not _whole(file):
            log.warning("annotate: %s is damaged and set aside; its pairs are done again", file)
            file.rename(file.with_name(f"{DAMAGED}{file.name}"))
    return run


def part_path(out: Path, key: str, pair_ids: list[str]) -> Path:
    """A part's file: its name follows from the key and the pairs, so that the same part is never there twice."""
    return out / f"{key}-{digest(sorted(pair_ids))}.parquet"


def commit(path: Path, table: pa.Table, run: str) -> None:
    """Write a table so that the file is there complete or not at all, and only while `run` owns the folder.

    Raises `ContractError` when the disk is full or another run has taken the folder over.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with disk_errors(path.parent):
            with temporary.open("wb") as file:
                pq.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())  # before the rename: a name must not outlive a power cut that its bytes do not
            with _locked(path.parent, fcntl.LOCK_SH):
                check_owner(path.parent, run)
                temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_owner(out: Path, run: str) -> None:
    """Raise `ContractError` when `run` does not own the folder any more."""
    owner = json.loads((out / _OWNER).read_text(encoding="utf-8"))
    if owner["run"] != run:
        raise ContractError(
            f"another run (process {owner['pid']}) has taken {out} over and goes on with it; this one ends here"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into a `ContractError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ContractError(
                f"the disk of {folder} is full; free some space and run this again: finished annotations are kept"
            ) from error
        raise


@contextmanager
def _locked(out: Path, how: int) -> Iterator[None]:
    with (out / _LOCK).open("a") as file:
        fcntl.flock(file, how)
        yield


def _whole(file: Path) -> bool:
    with file.open("rb") as content:
        size = content.seek(0, os.SEEK_END)
        content.seek(max(0, size - 4))
        return size > 12 and content.read() == _MAGIC
