"""Many small files of annotations become few.

A merge is noted before it is done: the merged file is written under a hidden name, then a note of its sources, then the
sources go and the merged file gets its name. Whatever is killed in between, `finish_merges` (which every run calls first)
brings it to its end, so that no row is lost and none is there twice.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq

from data.contracts import ANNOTATIONS, digest, write_json
from pipeline.annotation.store import check_owner, disk_errors, files_of

log = logging.getLogger(__name__)

_MERGED = "_merged-"
_ROW_GROUP = 100_000
_THREADS = 4


def compact(out: Path, key: str, run: str, rows: int) -> int:
    """Merge the files of `key` with fewer than half of `rows` rows into files of about `rows`; how many files went away.

    `run` must own the folder (see `annotate_commit.take_over`). Memory holds a row group for each of at most four threads.
    """

    def merge(group: Sequence[Path]) -> int:
        check_owner(out, run)
        with disk_errors(out):
            note = _merge(out, key, group)
        _finish(note)
        return len(group) - 1

    with ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0)))) as pool:
        gone = sum(pool.map(merge, list(_groups(out, key, rows))))
    if gone:
        log.info("annotate: %d files merged away, %d left", gone, len(files_of(out, key)))
    return gone


def finish_merges(out: Path) -> None:
    """Bring merges that were killed to their end, or forget them where they had hardly begun."""
    for note in out.glob(f"{_MERGED}*.json"):
        _finish(note)
    for leftover in out.glob(f"{_MERGED}*"):
        leftover.unlink()


def _groups(out: Path, key: str, rows: int) -> Iterator[list[Path]]:
    group: list[Path] = []
    held = 0
    for file in files_of(out, key):
        count = pq.read_metadata(file).num_rows
        if 2 * count >= rows:
            continue
        group.append(file)
        held += count
        if held >= rows:
            yield group
            group, held = [], 0
    if len(group) > 1:
        yield group


def _merge(out: Path, key: str, group: Sequence[Path]) -> Path:
    """Write the merged file and, last, the note that makes it count."""
    name = digest([file.name for file in group])
    hidden = out / f"{_MERGED}{name}.parquet"
    with hidden.open("wb") as sink:
        with pq.ParquetWriter(sink, ANNOTATIONS, compression="zstd") as writer:
            for file in group:
                # Threads of Arrow's own would read no faster and have their allocator keep 40 MiB more.
                for batch in pq.ParquetFile(file).iter_batches(_ROW_GROUP, use_threads=False):
                    writer.write_batch(batch.cast(ANNOTATIONS))
        sink.flush()
        os.fsync(sink.fileno())
    note = out / f"{_MERGED}{name}.json"
    write_json(note, {"target": f"{key}-{name}.parquet", "sources": [file.name for file in group]})
    return note


def _finish(note: Path) -> None:
    content = json.loads(note.read_text(encoding="utf-8"))
    hidden = note.with_suffix(".parquet")
    for source in content["sources"]:
        (note.parent / source).unlink(missing_ok=True)
    if hidden.exists():  # else it has its name already
        hidden.rename(note.parent / content["target"])
    note.unlink()
