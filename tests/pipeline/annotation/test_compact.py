"""Small files of annotations become few, whatever is killed in between."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import ANNOTATIONS, ContractError, read_table
from pipeline.annotation import compact as annotate_compact
from pipeline.annotation.compact import compact, finish_merges
from pipeline.annotation.store import commit, files_of, take_over
from pipeline.annotation.worker import Answer, table_of

KEY = "0123456789abcdef"


def filled(out: Path, files: int, rows: int = 10, key: str = KEY) -> str:
    run = take_over(out)
    for number in range(files):
        ids = [f"{key[:2]}{number}-{row}" for row in range(rows)]
        commit(out / f"{key}-{number:04d}.parquet", table_of(key, ids, [Answer(None, "none", 0)] * rows), run)
    return run


def content(out: Path) -> list[dict]:
    return sorted(read_table(out, ANNOTATIONS).to_pylist(), key=lambda row: row["pair_id"])


def test_small_files_are_merged_and_large_ones_stay(tmp_path: Path):
    run = filled(tmp_path, 23)
    large = table_of(KEY, [f"large{i}" for i in range(60)], [Answer(None, "none", 0)] * 60)
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


@pytest.mark.parametrize("steps", range(14))
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
        patch.setattr(annotate_compact, "write_json", mortal(annotate_compact.write_json))
        try:
            compact(tmp_path, KEY, run, 100)
        except KeyboardInterrupt:
            assert steps < 13
    take_over(tmp_path)
    finish_merges(tmp_path)
    assert content(tmp_path) == before
    assert not list(tmp_path.glob("_merged-*"))
    assert len(files_of(tmp_path, KEY)) in (1, 4)


def test_only_the_owner_merges(tmp_path: Path):
    run = filled(tmp_path, 4)
    take_over(tmp_path)
    with pytest.raises(ContractError, match="another run"):
        compact(tmp_path, KEY, run, 100)
    assert Counter(row["pair_id"] for row in content(tmp_path)).total() == 40
    assert pa.Table.from_pylist(content(tmp_path), schema=ANNOTATIONS).num_rows == 40
