"""Grades that people gave later teach the student only on the scale of its pairs."""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import HUMAN_LABELS
from student.distill import distill
from student.rows import read_rows
from tests.student.conftest import make_rows

SCALE = ["grade 0", "grade 1", "grade 2"]  # of `write_pairs`


def write_labels(path: Path, count: int, scale: list[str] | None, grade: int = 1, **more: Any) -> list[dict[str, Any]]:
    """Labels of the first `count` pairs of the pool."""
    now = datetime.now(UTC)
    about = {"rater": "anna", "draw": "", "note": "", "labelled_at": now, "imported_at": now, "scale": scale, **more}
    ids = [row["pair_id"] for row in make_rows() if row["split"] == "pool"][:count]
    rows = [{"pair_id": pair_id, "grade": grade} | about for pair_id in ids]
    pq.write_table(pa.Table.from_pylist(rows, schema=HUMAN_LABELS), path)
    return rows


def learned(tiny: Any, quick: Any, folder: Path, file: Path) -> tuple[int, dict[str, Any]]:
    """Human grades learned from, and the stage's metrics."""
    seen = []

    def spy(config: Any, *arguments: Any) -> Any:
        seen.append(rows := read_rows(config, *arguments))
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("student.distill.read_rows", spy)
        output = distill(quick(epochs=1), tiny["base"], tiny["pairs"], tiny["annotations"], folder, human_labels=file)
    return seen[0].training.n_gold, output.figures


@pytest.mark.parametrize(
    "scale",
    [SCALE, ["grade 0", "partial", "grade 2"], SCALE[:2], SCALE[::-1]],
    ids=["same", "renamed", "fewer", "reordered"],
)
def test_labels_of_another_scale_are_left_out_and_counted(tiny, quick, tmp_path, caplog, scale):
    gold = sum(row["split"] == "train" and row["grade"] is not None for row in make_rows())
    write_labels(tmp_path / "labels.parquet", 12, scale)
    with caplog.at_level(logging.WARNING):
        n_gold, metrics = learned(tiny, quick, tmp_path / "out", tmp_path / "labels.parquet")
    said = [message for message in caplog.messages if "human labels" in message]
    if scale == SCALE:
        assert (n_gold, metrics.get("human_labels_skipped"), said) == (gold + 12, None, [])
    else:
        assert (n_gold, metrics["human_labels_skipped"], len(said)) == (gold, 12, 1)
        assert "12 human labels are left out" in said[0]


@pytest.mark.parametrize("grade", [1, 3])
def test_labels_that_do_not_say_their_scale_are_learned_if_all_are_on_the_pairs_own(
    tiny, quick, tmp_path, caplog, grade
):
    gold = sum(row["split"] == "train" and row["grade"] is not None for row in make_rows())
    write_labels(tmp_path / "labels.parquet", 12, None, grade)
    table = pq.read_table(tmp_path / "labels.parquet").drop_columns(["scale"])
    pq.write_table(table, tmp_path / "labels.parquet")
    with caplog.at_level(logging.WARNING):
        n_gold, metrics = learned(tiny, quick, tmp_path / "out", tmp_path / "labels.parquet")
    (said,) = [message for message in caplog.messages if "human labels" in message]
    assert "do not say their scale" in said
    assert (n_gold, metrics.get("human_labels_skipped")) == ((gold + 12, None) if grade < 3 else (gold, 12))
