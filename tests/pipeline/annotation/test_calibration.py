"""Calibrated probabilities: which map is chosen, what it changes and what not, and once through the whole job."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.replay import load_replay
from data.contracts import ANNOTATIONS, ContractError, read_table
from pipeline.annotation import calibration as module
from pipeline.annotation.calibration import MIN_ISOTONIC_ROWS, Calibration, calibrated, fit
from pipeline.annotation.config import AnnotateConfig
from pipeline.annotation.job import annotate
from pipeline.annotation.store import files_of
from pipeline.annotation.worker import Answer, table_of
from student.dataset import read_annotated
from teacher.reading import Sample, aggregate
from tests.pipeline.annotation.helpers import replayed, tiny_teacher, write_pairs


def a_sample(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True probabilities (N, 3), grades drawn from them, and queries of four pairs each."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet((0.7, 0.7, 0.7), size=count)
    grade = (probs.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)
    return probs, grade, np.arange(count) // 4


def overconfident(probs: np.ndarray) -> np.ndarray:
    sharp = probs**3
    return sharp / sharp.sum(axis=1, keepdims=True)


def stepped(probs: np.ndarray) -> np.ndarray:
    """Says nearly the same of nearly all pairs, in the right order: no temperature undoes that."""
    odd = np.where(probs > 0.9, 0.40, np.where(probs > 0.5, 0.36, 0.30)) + probs / 100
    return odd / odd.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("distort", "count", "method"),
    [
        (overconfident, 600, "temperature"),
        (overconfident, 40, "none"),
        (stepped, 4 * MIN_ISOTONIC_ROWS, "isotonic"),
        (stepped, MIN_ISOTONIC_ROWS - 4, "temperature"),
    ],
)
def test_the_method_with_the_least_held_out_log_loss_is_chosen(distort, count, method):
    probs, grade, query = a_sample(count)
    fitted = fit(distort(probs), grade, query)
    assert (fitted.method, fitted.rows, fitted.queries) == (method, count, count // 4)
    assert fitted.log_loss == {} or fitted.log_loss[method] == min(fitted.log_loss.values())
    fresh = a_sample(3000)[0]
    made = Calibration.model_validate_json(fitted.model_dump_json()).apply(distort(fresh))
    np.testing.assert_allclose(made.sum(axis=1), 1)
    if method != "none":  # nearer to the truth than what the teacher said
        assert np.abs(made - fresh).mean() < 0.6 * np.abs(distort(fresh) - fresh).mean()


def test_what_is_right_already_stays_nearly_as_it_is():
    probs, grade, query = a_sample(2000)
    assert np.abs(fit(probs, grade, query).apply(probs) - probs).max() < 0.06


def answers() -> list[Answer]:
    read = aggregate([Sample(1, [0.2, 0.8], "why")], 2)
    return [Answer("ok", "", 3, read, 1, 5), Answer("unparsed", "no grade", 3), Answer("ok", "", 3, read, 1, 5)]


def test_raw_probabilities_stay_beside_and_nothing_else_changes():
    table = table_of("k", ["a", "b", "c"], answers())
    made = calibrated(table, Calibration(method="temperature", temperature=2.0, offsets=[0.0, 0.0]))
    assert made.schema == ANNOTATIONS
    assert made["grade_probs_raw"].to_pylist() == [[0.2, 0.8], None, [0.2, 0.8]]
    assert made["grade_probs"][0].as_py() == pytest.approx([1 / 3, 2 / 3], abs=1e-3)
    assert made["grade_probs"][1].as_py() is None
    others = [name for name in ANNOTATIONS.names if not name.startswith("grade_probs")]
    assert made.select(others) == table.select(others)
    # What was calibrated once is calibrated anew from the raw ones.
    assert calibrated(made, Calibration())["grade_probs"].to_pylist() == made["grade_probs_raw"].to_pylist()
    nothing = calibrated(table.slice(1, 1), Calibration(method="temperature", offsets=[0.0, 0.0]))
    assert nothing["grade_probs"].to_pylist() == [None]


def answered(pair_id: str) -> int:
    """The grade that the replayed teacher gives a pair."""
    return hash((int(pair_id, 16),)) % 4


def labelled_pairs(folder: Path) -> Path:
    """80 labelled pairs in valid and 20 in test, of which the teacher grades three in four right, and 30 in the pool."""
    rows = []
    for number in range(130):
        pair_id, split = f"{number:016x}", "valid" if number < 80 else "test" if number < 100 else "pool"
        grade = None if split == "pool" else (answered(pair_id) + (number % 4 == 0)) % 4
        texts = {"query": f"q {number}", "query_id": f"q {number}", "ad_title": "ad", "source": "test"}
        rows.append({"pair_id": pair_id, "split": split, "grade": grade, **texts})
    return write_pairs(folder, rows)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    real = tiny_teacher(labelled_pairs(tmp_path / "data"), tmp_path / "real")
    return replayed(real, [f"why <answer>{grade}</answer>" for grade in range(4)], tmp_path / "teacher")


@pytest.mark.spark
def test_the_job_labels_valid_and_test_first_and_calibrates_every_row(tmp_path, spark, teacher, monkeypatch):
    pairs, out = tmp_path / "data", tmp_path / "out"
    config = AnnotateConfig(n=1, valid_pairs=60, test_pairs=5, max_in_flight=40)
    made = annotate(config, teacher, pairs, out, spark, load_replay)
    key = made.figures["annotation_key"]
    assert (made.figures["pairs"], made.figures["n_new"], made.figures["ok"]) == (30, 30, 30)
    assert (made.figures["calibration"], made.figures["n_calibration"]) == ("temperature", 60)
    assert made.figures["valid_log_loss_temperature"] < made.figures["valid_log_loss_none"]
    rows = {row["pair_id"]: row for row in read_table(out, ANNOTATIONS).to_pylist()}
    assert sorted(rows) == [f"{number:016x}" for number in (*range(60), *range(80, 85), *range(100, 130))]
    for pair_id, row in rows.items():
        assert row["grade"] == answered(pair_id)
        assert row["grade_probs_raw"] == [float(grade == row["grade"]) for grade in range(4)]
        assert 0.6 < row["grade_probs"][row["grade"]] < 0.9

    stamps = {file: file.stat().st_mtime_ns for file in files_of(out, key)}
    again = annotate(config, teacher, pairs, out, spark, load_replay)
    assert (again.fingerprint, again.figures["n_new"], again.figures["n_reused"]) == (made.fingerprint, 0, 30)
    assert {file: file.stat().st_mtime_ns for file in files_of(out, key)} == stamps

    # As an earlier version left it: no raw probabilities, and none of the pairs that measure the teacher.
    (out / f"_calibration-{key}.json").unlink()
    for file in files_of(out, key):
        table = pq.read_table(file)
        table = table.set_column(2 + 1, "grade_probs", table["grade_probs_raw"]).drop_columns("grade_probs_raw")
        old = table.filter([int(pair_id, 16) >= 100 for pair_id in table["pair_id"].to_pylist()])
        pq.write_table(old, file) if old.num_rows else file.unlink()
    assert len(read_annotated(out, key)[1]) == 30
    real, calls = module.commit, []

    def dying(path, table, run):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, table, run)

    monkeypatch.setattr(module, "commit", dying)
    with pytest.raises(KeyboardInterrupt):
        annotate(config, teacher, pairs, out, spark, load_replay)
    assert len(read_annotated(out, key)[1]) == 95
    monkeypatch.setattr(module, "commit", real)
    mended = annotate(config, teacher, pairs, out, spark, load_replay)
    assert (mended.fingerprint, mended.figures["n_reused"]) == (made.fingerprint, 30)
    uncalibrated = annotate(config.model_copy(update={"valid_pairs": 0}), teacher, pairs, out, spark, load_replay)
    assert uncalibrated.figures["calibration"] == "none"
    assert all(max(row["grade_probs"]) == 1 for row in read_table(out, ANNOTATIONS).to_pylist())


@pytest.mark.spark
def test_a_table_without_labels_is_annotated_all_the_same(tmp_path, spark, teacher):
    table = pq.read_table(tmp_path / "data" / "pairs" / "part.parquet")
    table = table.filter(pa.compute.equal(table["split"], "pool"))
    pq.write_table(table, tmp_path / "data" / "pairs" / "part.parquet")
    made = annotate(AnnotateConfig(n=1), teacher, tmp_path / "data", tmp_path / "out", spark, load_replay)
    assert (made.figures["pairs"], made.figures["calibration"]) == (30, "none")
    with pytest.raises(ContractError, match=r"split 'valid' .* has no pairs"):
        annotate(AnnotateConfig(split="valid"), teacher, tmp_path / "data", tmp_path / "out", spark, load_replay)
