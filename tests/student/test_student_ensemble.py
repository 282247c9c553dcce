"""Soft labels of a teacher and of a student of human labels together."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.contracts import GradeScale, MetricsLog, read_json
from student.dataset import read_examples
from student.distill import distill
from student.ensemble import MIN_ROWS, choose_weight, pooled
from student.fit import _validate
from student.rows import read_rows
from student.scorer import load_tokenizer, softmax
from student.setup import Setup

from .conftest import annotate_pool, make_rows, write_annotations

DISTRIBUTIONS = st.lists(st.lists(st.floats(0.001, 1), min_size=3, max_size=3), min_size=1, max_size=5)


@given(DISTRIBUTIONS, st.floats(0, 1))
def test_a_pool_is_a_distribution_between_its_two(values, weight):
    teacher = np.array(values) / np.sum(values, axis=1, keepdims=True)
    student = teacher[:, ::-1]
    pool = pooled(teacher, student, weight)
    assert np.allclose(pool.sum(axis=1), 1)
    assert np.allclose(pooled(teacher, student, 1.0), teacher)
    assert np.allclose(pooled(teacher, student, 0.0), student)
    assert np.allclose(pooled(teacher, teacher, weight), teacher)
    ratio = np.log(pool[:, 0] / pool[:, 1])
    ends = np.sort([np.log(p[:, 0] / p[:, 1]) for p in (teacher, student)], axis=0)
    assert (ends[0] - 1e-6 <= ratio).all()
    assert (ratio <= ends[1] + 1e-6).all()


def test_the_weight_is_that_of_who_is_right():
    rng = np.random.default_rng(0)
    grade = rng.integers(3, size=400)
    noise = rng.normal(size=(2, 400, 3))

    def annotator(signal, error):
        logits = signal * np.eye(3)[grade] + error
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    good, bad = annotator(2.0, 0.7 * noise[0]), annotator(0.0, 2 * noise[1])
    assert choose_weight(good, bad, grade)["weight"] > 0.85
    assert choose_weight(bad, good, grade)["weight"] < 0.15
    both = choose_weight(annotator(1.0, noise[0]), annotator(1.0, noise[1]), grade)
    assert 0.3 < both["weight"] < 0.7
    assert both["rows"] == 400
    assert both["log_loss"]["pool"] < min(both["log_loss"]["teacher"], both["log_loss"]["student"])
    assert choose_weight(good[:10], bad[:10], grade[:10])["weight"] == 0.5
    assert choose_weight(good[:0], bad[:0], grade[:0]) == {"weight": 0.5, "rows": 0, "log_loss": {}}


@pytest.mark.parametrize("valid_rows", [0, 48])
def test_a_student_learns_from_both_and_the_first_one_is_trained_once(valid_rows, tiny, quick, tmp_path):
    rows = make_rows()
    valid = [row | {"split": "pool"} for row in rows if row["split"] == "valid"][:valid_rows]
    annotations = write_annotations(tmp_path / "annotations", annotate_pool(rows) + annotate_pool(valid))
    config = quick(epochs=1, gold_only_baseline=True, soft_labels="ensemble")
    both = distill(config, tiny["base"], tiny["pairs"], annotations, tmp_path / "both").figures
    pool = read_json(tmp_path / "both" / "evaluation.json")["ensemble"]
    assert pool["rows"] == valid_rows
    assert 0 <= pool["weight"] <= 1
    assert both["teacher_weight"] == pool["weight"]
    assert both["n_annotated"] == 48
    gold = distill(quick(epochs=2), tiny["base"], tiny["pairs"], None, tmp_path / "gold").figures
    assert both["gold_only_roc_auc"] == gold["test_roc_auc"]
    epochs = [
        line for line in MetricsLog(tmp_path / "both" / "metrics.jsonl").read("gold_only") if "valid_roc_auc" in line
    ]
    assert len(epochs) == 2
    distill(quick(epochs=1), tiny["base"], tiny["pairs"], annotations, tmp_path / "other")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("both", "other")]
    assert weights[0] != weights[1]


def test_where_valid_is_annotated_the_epoch_is_chosen_by_what_is_trained(tiny, quick):
    scale = GradeScale.load(tiny["pairs"])
    setup = Setup(quick(), tiny["base"], load_tokenizer(tiny["base"] / "tokenizer.json", 32), scale, "cpu")
    valid = read_examples(tiny["pairs"], scale, "valid")
    valid = valid.joined(valid)
    rng = np.random.default_rng(0)
    logits, soft = rng.normal(size=(2, len(valid), scale.size))
    soft = softmax(soft)
    score, measured = _validate(setup, logits, valid)
    assert score == measured["valid_roc_auc"]
    # A few annotated pairs would be noisier still.
    few = replace(valid, soft=np.where(np.arange(len(valid))[:, None] < MIN_ROWS - 1, soft, 0.0))
    assert _validate(setup, logits, few) == (score, measured)
    chosen, more = _validate(setup, logits, replace(valid, soft=soft))
    log = np.log(softmax(logits))
    by_people, by_annotators = -log[np.arange(len(valid)), valid.grade].mean(), -(soft * log).sum(axis=1).mean()
    assert more == measured | {"valid_soft_loss": pytest.approx(by_annotators)}
    assert chosen == pytest.approx(-(by_people + by_annotators) / 2)


def test_the_annotated_pairs_of_valid_have_the_soft_labels_that_are_trained(tiny, quick, tmp_path):
    rows = make_rows()
    pool = annotate_pool([row | {"split": "pool"} for row in rows if row["split"] == "valid"])
    annotations = write_annotations(tmp_path / "annotations", pool[:30])
    scale = GradeScale.load(tiny["pairs"])
    judged = read_rows(quick(), tiny["pairs"], annotations, scale).judged
    probs = {row["pair_id"]: row["grade_probs"] for row in pool[:30]}
    for pair_id, soft in zip(judged.pair_ids, judged.soft, strict=True):
        assert soft.tolist() == probs.get(pair_id, [0.0] * scale.size)
    assert len(probs) == 30
