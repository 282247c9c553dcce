"""How annotations get into their folder: whole or not at all, from one run at a time, merged whatever is killed."""

import os
import subprocess
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data.contracts import ANNOTATIONS, ContractError, read_table
from pipeline.annotation import store
from pipeline.annotation.store import DAMAGED, TEMPORARY, commit, compact, drop, files_of, part_path, take_over
from pipeline.annotation.worker import Answer, table_of

KEY = "0123456789abcdef"


def rows(count: int, size: int = 0) -> pa.Table:
    """Failed rows whose errors are of `size` random letters, which do not compress."""
    answers = [Answer("failed", os.urandom(size).hex(), 0) for _ in range(count)]
    return table_of(KEY, [f"p{i}" for i in range(count)], answers)


def test_a_part_is_named_by_its_pairs(tmp_path: Path):
    assert part_path(tmp_path, KEY, ["a", "b"]) == part_path(tmp_path, KEY, ["b", "a"])
    assert part_path(tmp_path, KEY, ["a", "b"]) != part_path(tmp_path, KEY, ["a"])


def test_a_run_that_was_taken_over_writes_nothing_more(tmp_path: Path):
    first = take_over(tmp_path)
    commit(tmp_path / f"{KEY}-1.parquet", rows(2), first)
    second = take_over(tmp_path)
    with pytest.raises(ContractError, match=rf"another run \(process {os.getpid()}\) has taken .* over"):
        commit(tmp_path / f"{KEY}-2.parquet", rows(2), first)
    commit(tmp_path / f"{KEY}-3.parquet", rows(2), second)
    assert [file.name for file in files_of(tmp_path, KEY)] == [f"{KEY}-1.parquet", f"{KEY}-3.parquet"]
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


def test_what_is_half_written_goes_and_what_is_damaged_is_set_aside(tmp_path: Path):
    run = take_over(tmp_path)
    for name in "abc":
        commit(tmp_path / f"{KEY}-{name}.parquet", rows(50), run)
    (tmp_path / f"{TEMPORARY}x").write_bytes(b"PAR1")
    whole = (tmp_path / f"{KEY}-b.parquet").read_bytes()
    (tmp_path / f"{KEY}-b.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"{KEY}-c.parquet").write_bytes(b"")
    take_over(tmp_path)
    assert [file.name for file in files_of(tmp_path, KEY)] == [f"{KEY}-a.parquet"]
    assert read_table(tmp_path, ANNOTATIONS).num_rows == 50
    assert len(list(tmp_path.glob(f"{DAMAGED}*"))) == 2
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1 MiB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_only_whole_files(small_disk: Path):
    run = take_over(small_disk)

    def fill() -> None:
        for number in range(100):
            commit(small_disk / f"{KEY}-{number}.parquet", rows(10, 10_000), run)

    with pytest.raises(ContractError, match=r"^the disk of .* is full; free some space"):
        fill()
    assert not list(small_disk.glob(f"{TEMPORARY}*"))
    kept = files_of(small_disk, KEY)
    assert len(kept) >= 3
    assert read_table(small_disk, ANNOTATIONS).num_rows == 10 * len(kept)
    kept[0].unlink()
    kept[1].unlink()
    commit(small_disk / f"{KEY}-again.parquet", rows(10, 10_000), take_over(small_disk))


def filled(out: Path, files: int, rows: int = 10, key: str = KEY) -> str:
    run = take_over(out)
    for number in range(files):
        ids = [f"{key[:2]}{number}-{row}" for row in range(rows)]
        commit(out / f"{key}-{number:04d}.parquet", table_of(key, ids, [Answer("failed", "none", 0)] * rows), run)
    return run


def content(out: Path) -> list[dict]:
    return sorted(read_table(out, ANNOTATIONS).to_pylist(), key=lambda row: row["pair_id"])


def test_small_files_are_merged_and_large_ones_stay(tmp_path: Path):
    run = filled(tmp_path, 23)
    large = table_of(KEY, [f"large{i}" for i in range(60)], [Answer("failed", "none", 0)] * 60)
    commit(tmp_path / f"{KEY}-large.parquet", large, run)
    filled(tmp_path, 3, key="fedcba9876543210")
    before, kept = content(tmp_path), (tmp_path / f"{KEY}-large.parquet").stat().st_mtime_ns
    run = take_over(tmp_path)
    assert compact(tmp_path, KEY, run, 100) == 23 - 3
    sizes = sorted(pq.read_metadata(file).num_rows for file in files_of(tmp_path, KEY))
    assert sizes == [30, 60, 100, 100]
    assert (tmp_path / f"{KEY}-large.parquet").stat().st_mtime_ns == kept
    assert len(files_of(tmp_path, "fedcba9876543210")) == 3
    assert content(tmp_path) == before
    assert compact(tmp_path, KEY, run, 60) == 0
    assert not list(tmp_path.glob("_merged-*"))


@pytest.mark.parametrize("steps", range(15))
def test_a_merge_that_is_killed_anywhere_loses_and_doubles_nothing(tmp_path: Path, steps: int, monkeypatch):
    """Every change of the folder counts as a step; the process dies before step number `steps`."""
    run = filled(tmp_path, 4)
    before = content(tmp_path)
    left = steps

    def mortal(real):
        def step(*arguments, **options):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return real(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", mortal(Path.unlink))
        patch.setattr(Path, "rename", mortal(Path.rename))
        patch.setattr(Path, "open", mortal(Path.open))
        patch.setattr(store, "write_json", mortal(store.write_json))
        try:
            compact(tmp_path, KEY, run, 100)
        except KeyboardInterrupt:
            assert steps < 14
    take_over(tmp_path)
    assert content(tmp_path) == before
    assert not list(tmp_path.glob("_merged-*"))
    assert len(files_of(tmp_path, KEY)) in (1, 4)


@pytest.mark.parametrize("when", ["before the note", "with the note"])
def test_a_run_that_is_taken_over_while_it_merges_loses_nothing(tmp_path: Path, when: str, monkeypatch):
    run = filled(tmp_path, 4)
    before = content(tmp_path)
    name = "_write_merged" if when == "before the note" else "_check_owner"
    real, taken = getattr(store, name), []

    def taken_over(*arguments):
        result = real(*arguments)
        if not taken and (when == "before the note" or list(tmp_path.glob("_merged-*.parquet"))):
            taken.append(threading.Thread(target=take_over, args=(tmp_path,)))
            taken[0].start()
            taken[0].join(0.0 if when == "with the note" else None)  # who holds the lock goes on first
        return result

    monkeypatch.setattr(store, name, taken_over)
    if when == "before the note":
        with pytest.raises(ContractError, match="another run"):
            compact(tmp_path, KEY, run, 100)
    else:
        compact(tmp_path, KEY, run, 100)
    taken[0].join()
    assert content(tmp_path) == before


def test_a_run_that_was_taken_over_drops_nothing(tmp_path: Path):
    run = filled(tmp_path, 2)
    before = content(tmp_path)
    take_over(tmp_path)
    with pytest.raises(ContractError, match="another run"):
        drop(tmp_path, KEY, run, pc.is_valid(pc.field("pair_id")))
    assert content(tmp_path) == before


def test_only_the_owner_merges(tmp_path: Path):
    run = filled(tmp_path, 4)
    take_over(tmp_path)
    with pytest.raises(ContractError, match="another run"):
        compact(tmp_path, KEY, run, 100)
    assert len({row["pair_id"] for row in content(tmp_path)}) == len(content(tmp_path)) == 40
