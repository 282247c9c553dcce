"""Label errors: planted ones are found by what never saw them, and leaving them out is shown."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data.contracts import HUMAN_LABELS, ContractError, GradeScale
from student.config import StudentConfig
from student.dataset import Annotated, read_examples
from student.distill import distill
from student.fit import fit
from student.label_errors import cross_fitted, find, ranked
from student.model import save_tokenizer
from student.setup import Setup

from .conftest import annotate_pool, make_rows, write_annotations, write_pairs


def noisy(count: int, seed: int = 0):
    """Grades with one in ten wrong, which ones those are, and the output of a scorer that is mostly right."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, count)
    wrong = rng.random(count) < 0.1
    grade = np.where(wrong, (truth + rng.integers(1, 3, count)) % 3, truth)
    probs = np.eye(3)[truth] * 4 + rng.normal(size=(count, 3))
    probs = np.exp(probs) / np.exp(probs).sum(axis=1, keepdims=True)
    return grade, wrong, probs


def test_planted_errors_come_first():
    grade, wrong, probs = noisy(2000)
    rows, likely = ranked(grade, probs)
    assert wrong[rows[:100]].mean() > 0.95
    assert wrong[rows].sum() > 0.85 * wrong.sum()
    assert (likely != grade[rows]).all()
    clean = np.eye(3)[grade] * 0.9 + 0.1 / 3
    assert len(ranked(grade, clean)[0]) == 0


def test_no_row_is_judged_by_what_learned_from_it():
    seen = []

    def scorer(train, held):
        assert not set(train) & set(held)
        seen.extend(held)
        return np.stack([held, train.mean() + 0 * held], axis=1)

    probs = cross_fitted(101, scorer, seed=1)
    assert sorted(seen) == list(range(101))
    assert probs[:, 0].tolist() == list(range(101))


def test_the_teacher_is_heard_where_it_was_not_trained(tiny, quick, tmp_path):
    scale = GradeScale.load(tiny["pairs"])
    tokenizer = save_tokenizer(tiny["base"], tmp_path / "tokenizer", 32)
    setup = Setup(quick(), tiny["base"], tokenizer, scale, "cpu")
    human = read_examples(tiny["pairs"], scale, "train")
    first, second = human.pair_ids[:2]
    sure = Annotated(np.eye(3)[(human.grade[0] + 2) % 3].tolist(), 1.0, "it says otherwise")

    def scorer(train, held):
        return np.eye(3)[human.grade[held]] * 0.3 + 0.7 / 3

    find(setup, frozenset({first}), human, {first: sure, second: sure}, scorer, tmp_path)
    (suspect,) = pq.read_table(tmp_path / "suspects.parquet").to_pylist()
    assert suspect["pair_id"] == first
    assert suspect["reasoning"] == "it says otherwise"
    assert suspect["teacher_grade"] == suspect["likely_grade"] != suspect["human_grade"]


@pytest.mark.parametrize("how", ["features", "student"])
def test_leaving_suspects_out_is_compared(tiny, quick, tmp_path, how):
    rows = [
        row | {"grade": 2 - row["grade"]} if row["split"] == "train" and i % 48 == 0 else row
        for i, row in enumerate(make_rows())
    ]
    pairs = write_pairs(tmp_path / "pairs", rows)
    epochs = 1 if how == "student" else 8
    figures = distill(
        quick(suspects=how, drop_suspects=0.1, epochs=epochs), tiny["base"], pairs, None, tmp_path / "out"
    ).figures
    suspects = pq.read_table(tmp_path / "out" / "suspects.parquet").to_pylist()
    losses = [row["expected_loss"] for row in suspects]
    assert losses == sorted(losses, reverse=True)
    if suspects:
        assert figures["n_gold"] == 48 - min(5, len(suspects))
        evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert "with_suspects" in {row["b"] for row in evaluation["comparisons"]}
    assert suspects or how == "student"


def test_dropping_needs_suspects():
    with pytest.raises(ValidationError, match="drop_suspects"):
        StudentConfig(drop_suspects=0.1)


LABELS = [row for row in make_rows() if row["split"] == "train"]


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        ([], "there are 0: it needs 5 at least; set it to 'off'"),
        (LABELS[:4], "there are 4: it needs 5 at least"),
        ([row | {"grade": 1} for row in LABELS], None),
        (
            [row | {"grade": int(i == 0)} for i, row in enumerate(LABELS)],
            None,
        ),  # in one fold all others are of one grade
    ],
)
def test_few_or_one_sided_labels_are_judged_or_refused_in_a_sentence(tiny, quick, tmp_path, labels, fault):
    others = [row for row in make_rows() if row["split"] != "train"]
    pairs = write_pairs(tmp_path / "pairs", others + labels)
    config = quick(suspects="features", epochs=1)
    if fault is None:
        distill(config, tiny["base"], pairs, None, tmp_path / "out")
        assert len(pq.read_table(tmp_path / "out" / "suspects.parquet")) <= 1
        return
    with pytest.raises(ContractError, match=fault):
        distill(config, tiny["base"], pairs, tiny["annotations"], tmp_path / "out")


@pytest.mark.parametrize("soft_labels", ["teacher", "ensemble"])
def test_with_and_without_suspects_learn_the_same_of_what_both_have(tiny, quick, tmp_path, monkeypatch, soft_labels):
    learned = {}

    def spy(setup, rows, valid, *, phase, **more):
        learned[phase] = rows
        return fit(setup, rows, valid, phase=phase, **more)

    monkeypatch.setattr("student.distill.fit", spy)
    labels = [row | {"grade": 2 - row["grade"]} if i % 4 == 0 else row for i, row in enumerate(LABELS)]
    others = [row for row in make_rows() if row["split"] != "train"]
    pairs = write_pairs(tmp_path / "pairs", others + labels)
    # Valid is annotated as well, by which the ensemble is weighted.
    rows = [row | {"split": "pool"} for row in others if row["split"] in ("pool", "valid")]
    annotations = write_annotations(tmp_path / "annotations", annotate_pool(rows))
    config = quick(suspects="features", drop_suspects=0.2, soft_labels=soft_labels)
    distill(config, tiny["base"], pairs, annotations, tmp_path / "out")
    without, whole = learned["student"], learned["with_suspects"]
    assert len(without) < len(whole)
    same = whole.take(np.flatnonzero(np.isin(whole.pair_ids.astype(str), without.pair_ids.astype(str))))
    assert (same.pair_ids == without.pair_ids).all()
    np.testing.assert_array_equal(same.soft, without.soft)


def test_a_suspect_has_the_reason_of_the_teacher(tiny, quick, tmp_path):
    now = datetime.now(UTC)
    about = {"rater": "anna", "draw": "", "note": "", "labelled_at": now, "imported_at": now}
    pool = [row for row in make_rows() if row["split"] == "pool"]
    labels = [
        about | {"pair_id": row["pair_id"], "grade": (row["grade"] + (i % 4 == 0)) % 3} for i, row in enumerate(pool)
    ]
    pq.write_table(pa.Table.from_pylist(labels, schema=HUMAN_LABELS), file := tmp_path / "labels.parquet")
    config = quick(suspects="features", epochs=1)
    distill(config, tiny["base"], tiny["pairs"], tiny["annotations"], tmp_path / "out", human_labels=file)
    suspects = pq.read_table(tmp_path / "out" / "suspects.parquet").to_pylist()
    heard = [row["reasoning"] for row in suspects if row["teacher_grade"] is not None]
    assert set(heard) == {"because"}
