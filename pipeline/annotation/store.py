"""The folder of annotations: whole files by atomic rename, from one run at a time; small files merged.

A run owns the folder from `take_over` until the next run takes it over. Workers of a killed run may outlive it for a
moment; they check before every rename whether their run still owns the folder, under a lock that `take_over` holds alone.
So no pair is ever there twice under a key. All workers must be able to write the folder, with POSIX rename and locks (a
local disk, NFS 4, Lustre); object stores have neither, so mount one with a file system that does.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.contracts import ANNOTATIONS, ContractError, digest, read_json, write_json

log = logging.getLogger(__name__)

# Names with a leading "_" are skipped by Arrow, by Spark and by `files_of`.
TEMPORARY = "_tmp-"
DAMAGED = "_damaged-"
_MERGED = "_merged-"
_OWNER = "_owner.json"
_MAGIC = b"PAR1"
_ROW_GROUP = 100_000
_MERGE_THREADS = 4


def files_of(out: Path, key: str) -> list[Path]:
    """The files with rows of an annotation key, sorted by name."""
    return sorted(out.glob(f"{key}-*.parquet"))


def read_file(file: Path) -> pa.Table:
    """The rows of a file, as `ANNOTATIONS`."""
    return pq.read_table(file, schema=ANNOTATIONS)


def part_path(out: Path, key: str, pair_ids: Sequence[str]) -> Path:
    """A part's file: its name follows from the key and the pairs, so that the same part is never there twice."""
    return out / f"{key}-{digest(sorted(pair_ids))}.parquet"


def take_over(out: Path) -> str:
    """Make this run the owner of the folder and return its name; completes or clears away what killed runs left.

    Half-written files go, and merges that were begun are finished. A file that is not whole (a disk or a file system failed
    under it) is set aside, so that its pairs are annotated again.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = uuid.uuid4().hex
    with disk_errors(out), _locked(out, fcntl.LOCK_EX):
        write_json(out / _OWNER, {"run": run, "pid": os.getpid()})
        for note in out.glob(f"{_MERGED}*.json"):
            _finish_merge(note)
        for leftover in [*out.glob(f"{TEMPORARY}*"), *out.glob(f"{_MERGED}*")]:
            leftover.unlink(missing_ok=True)
    for file in out.glob("[!_]*.parquet"):
        if not _whole(file):
            log.warning("annotate: %s is damaged and set aside; its pairs are annotated again", file)
            file.rename(file.with_name(f"{DAMAGED}{file.name}"))
    return run


def commit(path: Path, table: pa.Table, run: str) -> None:
    """Write a table so that the file is there complete or not at all, and only while `run` owns the folder.

    Raises `ContractError` when the disk is full or another run has taken the folder over.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with disk_errors(path.parent):
            _write(temporary, [table])
            with _locked(path.parent, fcntl.LOCK_SH):
                _check_owner(path.parent, run)
                temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def drop(out: Path, key: str, run: str, where: pc.Expression) -> int:
    """Take the rows of `key` for which `where` holds out of their files, one file at a time; returns how many they were."""
    dropped = 0
    for file in files_of(out, key):
        table = read_file(file)
        remaining = table.filter(~where)
        dropped += table.num_rows - remaining.num_rows
        # Under the old name, by one rename: no row is ever there twice. A new part cannot have this name, as its pairs
        # would be those of the old one, of which some are still here.
        if not remaining.num_rows:
            with _locked(out, fcntl.LOCK_SH):
                _check_owner(out, run)
                file.unlink()
        elif remaining.num_rows < table.num_rows:
            commit(file, remaining, run)
    return dropped


def compact(out: Path, key: str, run: str, rows: int) -> int:
    """Merge the files of `key` with fewer than half of `rows` rows into files of about `rows`; how many files went away.

    A merge is noted before it is done: the merged file is written under a hidden name, then a note of its sources; then the
    sources go, and the merged file gets its name. `take_over` completes one that was killed, so no row is lost and none is
    there twice. `run` must own the folder. Memory holds a row group for each of at most four threads.
    """

    def merge(sources: Sequence[Path]) -> int:
        _check_owner(out, run)
        with disk_errors(out):
            merged = _write_merged(out, sources)
            with _locked(out, fcntl.LOCK_SH):
                _check_owner(out, run)  # else the new owner has cleared the merged file away, and needs the sources
                _finish_merge(_note_merge(merged, key, sources))
        return len(sources) - 1

    with ThreadPoolExecutor(min(_MERGE_THREADS, len(os.sched_getaffinity(0)))) as pool:
        gone = sum(pool.map(merge, list(_small_files(out, key, rows))))
    if gone:
        log.info("annotate: %d files merged away, %d left", gone, len(files_of(out, key)))
    return gone


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


def _small_files(out: Path, key: str, rows: int) -> Iterator[list[Path]]:
    """Groups of files to be merged, each of about `rows` rows in all."""
    group: list[Path] = []
    total = 0
    for file in files_of(out, key):
        count = pq.read_metadata(file).num_rows
        if 2 * count < rows:
            group.append(file)
            total += count
        if total >= rows:
            yield group
            group, total = [], 0
    if len(group) > 1:
        yield group


def _write_merged(out: Path, sources: Sequence[Path]) -> Path:
    """The rows of `sources` in one file, under a hidden name."""
    name = digest([file.name for file in sources])
    # Threads of Arrow's own would read no faster and have their allocator keep 40 MiB more.
    readers = (pq.ParquetFile(file).iter_batches(_ROW_GROUP, use_threads=False) for file in sources)
    merged = out / f"{_MERGED}{name}.parquet"
    _write(merged, (_complete(batch) for batches in readers for batch in batches))
    return merged


def _note_merge(merged: Path, key: str, sources: Sequence[Path]) -> Path:
    """Write the note that makes a merged file count."""
    target = f"{key}-{merged.stem.removeprefix(_MERGED)}.parquet"
    note = merged.with_suffix(".json")
    write_json(note, {"target": target, "sources": [file.name for file in sources]})
    return note


def _finish_merge(note: Path) -> None:
    content, merged = read_json(note), note.with_suffix(".parquet")
    for source in content["sources"]:
        (note.parent / source).unlink(missing_ok=True)
    if merged.exists():  # else it has its name already
        merged.rename(note.parent / content["target"])
    note.unlink()


def _write(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write annotations and sync them: a name must not outlive a power cut that its bytes do not."""
    with path.open("wb") as sink:
        with pq.ParquetWriter(sink, ANNOTATIONS, compression="zstd") as writer:
            for table in tables:
                writer.write(table.cast(ANNOTATIONS))
        sink.flush()
        os.fsync(sink.fileno())


def _complete(batch: pa.RecordBatch) -> pa.Table:
    """With the columns that files of earlier versions lack, null."""
    table = pa.Table.from_batches([batch])
    for place, field in enumerate(ANNOTATIONS):
        if field.name not in table.column_names:
            table = table.add_column(place, field, pa.nulls(len(table), field.type))
    return table


def _check_owner(out: Path, run: str) -> None:
    owner = read_json(out / _OWNER)
    if owner["run"] != run:
        raise ContractError(
            f"another run (process {owner['pid']}) has taken {out} over and goes on with it; this one ends here"
        )


@contextmanager
def _locked(out: Path, how: int) -> Iterator[None]:
    with (out / "_lock").open("a") as file:
        fcntl.flock(file, how)
        yield


def _whole(file: Path) -> bool:
    with file.open("rb") as content:
        size = content.seek(0, os.SEEK_END)
        content.seek(max(0, size - 4))
        return size > 12 and content.read() == _MAGIC
