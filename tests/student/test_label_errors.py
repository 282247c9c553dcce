"""Label errors: planted ones are found by what never saw them, and leaving them out is shown."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data.contracts import GradeScale
from student.config import StudentConfig
from student.dataset import Annotated, read_examples
from student.distill import distill
from student.label_errors import cross_fitted, find, ranked
from student.model import save_tokenizer
from student.setup import Setup

from .conftest import make_rows, write_pairs


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
