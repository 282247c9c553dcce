from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, cohen_kappa_score, f1_score, ndcg_score, roc_auc_score

from data.contracts import ContractError
from student import metrics
from student.calibration import best_f1_threshold, fit_calibration, fit_isotonic, isotonic_losses, one_class
from student.metrics import Labels
from student.resampling import ranked
from student.scorer import probabilities, softmax


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grades, probabilities with ties, query ids with gaps; 400 rows, 60 queries, 4 grades."""
    rng = np.random.default_rng(0)
    grade = rng.integers(4, size=400)
    logits = np.eye(4)[grade] * 1.5 + rng.normal(size=(400, 4))
    return grade, softmax(np.round(logits, 1)), rng.integers(60, size=400) * 7 + 3


def test_ndcg_agrees_with_scikit_learn(sample):
    grade, probs, query = sample
    score = probs[:, 2:].sum(axis=1)
    several = [q for q in np.unique(query) if len(set(grade[query == q])) > 1]
    expected = [ndcg_score([2.0 ** grade[query == q] - 1], [score[query == q]], k=10) for q in several]
    found = metrics.evaluate(Labels(grade, query, 2, 100), score).metrics["ndcg_at_10"]
    assert found.value == pytest.approx(np.mean(expected))


def test_a_resample_gives_what_scikit_learn_gives_on_the_repeated_rows(sample):
    grade, probs, query = sample
    query = np.unique(query, return_inverse=True)[1]
    counts = np.random.default_rng(1).multinomial(query.max() + 1, np.full(query.max() + 1, 1 / (query.max() + 1)))
    rows = np.repeat(np.arange(len(grade)), counts[query])
    relevant, score = grade >= 2, probs[:, 2:].sum(axis=1)
    labels = Labels(grade, query, 2)
    measures = [*metrics.score_measures(labels, score, 0.4), metrics.grade_measures(labels, probs, score)]
    expected = {
        "roc_auc": roc_auc_score(relevant[rows], score[rows]),
        "pr_auc": average_precision_score(relevant[rows], score[rows]),
        "f1": f1_score(relevant[rows], score[rows] >= 0.4),
        "macro_f1": f1_score(grade[rows], probs[rows].argmax(axis=1), average="macro"),
        "quadratic_kappa": cohen_kappa_score(grade[rows], probs[rows].argmax(axis=1), weights="quadratic"),
        "accuracy": np.mean(grade[rows] == probs[rows].argmax(axis=1)),
        "ece": metrics.expected_calibration_error(relevant[rows], score[rows]),
    }
    found = _resampled(measures, counts)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    # The weighted form at weights of one is the point value, for every measure.
    plain = _resampled(measures, np.ones_like(counts))
    assert plain == pytest.approx({name: v for part in measures for name, v in part.values.items()}, abs=1e-9)


def _resampled(measures, counts) -> dict[str, float]:
    return {
        name: float(np.abs(value[0]).sum() if name == "ece" else value[0])
        for part in measures
        for name, value in part.resampled(counts[None, :].astype(float)).items()
    }


def test_intervals_hold_the_value_and_are_wider_when_rows_of_a_query_agree():
    rng = np.random.default_rng(0)
    grade = np.repeat(rng.integers(2, size=50), 8)
    score = np.repeat(rng.normal(size=50), 8) + grade
    probs = softmax(np.stack([-score, score], axis=1))

    def width(query: np.ndarray) -> float:
        auc = metrics.evaluate(Labels(grade, query, 1, 400), probs).metrics["roc_auc"]
        assert auc.low < auc.value < auc.high
        return auc.high - auc.low

    assert width(np.repeat(np.arange(50), 8)) > 1.8 * width(np.arange(400))


def test_compare_is_paired(sample):
    grade, probs, query = sample
    score = probs[:, 2:].sum(axis=1)
    slightly_worse = score + np.random.default_rng(0).normal(size=len(score)) * 0.05
    labels = Labels(grade, query, 2, 400)
    same = metrics.compare(labels, score, score.copy())
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    found = metrics.compare(labels, score, slightly_worse)
    alone = metrics.evaluate(labels, score).metrics["roc_auc"]
    assert found.high - found.low < 0.6 * (alone.high - alone.low)
    assert metrics.compare(labels, score, -score).low > 0


def test_f1_is_compared_at_each_system_s_own_threshold(sample):
    grade, probs, query = sample
    score, relevant = probs[:, 2:].sum(axis=1), grade >= 2
    labels = Labels(grade, query, 2, 200)
    found = metrics.compare(labels, score, score / 2, metric="f1", thresholds=(0.5, 0.25))
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    found = metrics.compare(labels, score, score, metric="f1", thresholds=(0.5, 0.9))
    assert found.difference == pytest.approx(f1_score(relevant, score >= 0.5) - f1_score(relevant, score >= 0.9))
    assert found.low < found.difference < found.high
    with pytest.raises(ContractError, match="or f1 with thresholds"):
        metrics.compare(labels, score, score, metric="f1")


def test_one_class_only_gives_none_and_stays_json(sample):
    _, probs, query = sample
    found = metrics.evaluate(Labels(np.zeros(400, int), query, 1, 100), probs, threshold=0.5)
    for name in ("roc_auc", "pr_auc", "f1", "ndcg_at_10"):
        assert found.metrics[name].value is None
    assert found.metrics["accuracy"].value is not None
    json.loads(json.dumps(found.model_dump(), allow_nan=False))


def test_no_rows_and_bad_scores_are_refused(sample):
    grade, probs, query = sample

    def evaluate(grade=grade, probs=probs, query=query, relevant_from=2):
        return metrics.evaluate(Labels(grade, query, relevant_from), probs)

    for message, changed in (
        ("nothing to evaluate", {"grade": grade[:0]}),
        ("diverged", {"probs": probs * np.nan}),
        ("one for each row", {"grade": grade[1:]}),
        ("one for each row", {"probs": probs[1:]}),
        ("not a distribution", {"probs": probs * 2}),
        ("grades lie in 0 … 3; found -1", {"grade": np.where(grade == 0, -1, grade)}),
        ("whole numbers", {"grade": grade / 2}),
        ("relevant_from", {"relevant_from": 4}),
    ):
        with pytest.raises(ContractError, match=message):
            evaluate(**changed)
    with pytest.raises(ContractError, match="cannot be compared"):
        metrics.compare(Labels(grade, query, 2), grade, grade, metric="ece")


def test_one_query_has_values_and_no_intervals(sample):
    grade, probs, _ = sample
    found = metrics.evaluate(Labels(grade, np.zeros(400, int), 2, 100), probs).metrics
    assert found["roc_auc"].value == pytest.approx(roc_auc_score(grade >= 2, probs[:, 2:].sum(axis=1)))
    assert all((interval.low, interval.high) == (None, None) for interval in found.values())
    compared = metrics.compare(Labels(grade, np.zeros(400, int), 2, 100), probs[:, 3], probs[:, 2])
    assert compared.difference is not None
    assert (compared.low, compared.high) == (None, None)


def test_scores_that_are_all_equal_rank_nothing(sample):
    grade, _, query = sample
    found = metrics.evaluate(Labels(grade, query, 2, 100), np.full((400, 4), 0.25), threshold=0.5).metrics
    assert (found["roc_auc"].value, found["roc_auc"].low, found["roc_auc"].high) == (0.5, 0.5, 0.5)
    assert found["pr_auc"].value == pytest.approx((grade >= 2).mean())
    assert found["f1"].value == pytest.approx(f1_score(grade >= 2, np.ones(400)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 8), st.integers(1, 4))
def test_ranked_measures_equal_scikit_learn_on_any_counts(seed, rows, queries, levels):
    rng = np.random.default_rng(seed)
    relevant, score = rng.random(rows) < 0.5, rng.integers(levels, size=rows) / levels
    query = np.unique(rng.integers(queries, size=rows), return_inverse=True)[1]
    counts = rng.integers(4, size=query.max() + 1)
    drawn = np.repeat(np.arange(rows), counts[query])
    found = ranked(relevant, score, query)(counts[None, :].astype(float))
    if 0 < relevant[drawn].sum() < len(drawn):
        assert found["roc_auc"][0] == pytest.approx(roc_auc_score(relevant[drawn], score[drawn]), abs=1e-9)
        assert found["pr_auc"][0] == pytest.approx(average_precision_score(relevant[drawn], score[drawn]), abs=1e-9)
    else:
        assert np.isnan(found["roc_auc"][0])


def test_slices_measure_their_rows_only(sample):
    grade, probs, query = sample
    mask = grade % 2 == 0
    found = metrics.evaluate(Labels(grade, query, 2, 100), probs, slices={"even": mask})
    assert [part.name for part in found.slices] == ["even"]
    assert found.slices[0].n == mask.sum()
    expected = roc_auc_score(grade[mask] >= 2, probs[mask, 2:].sum(axis=1))
    assert found.slices[0].metrics["roc_auc"].value == pytest.approx(expected)


def test_the_interval_of_ece_holds_the_truth_where_percentiles_miss_it():
    rng = np.random.default_rng(0)
    p = np.full(100, 0.3)
    assert metrics.expected_calibration_error(np.arange(100) < 30, p) == pytest.approx(0)
    assert metrics.expected_calibration_error(np.arange(100) < 30, p + 0.4) == pytest.approx(0.4)
    held = 0
    for seed in range(20):  # a calibrated model: the truth is 0, every sample's value is above it
        p = rng.random(300)
        probs = np.stack([1 - p, p], axis=1)
        labels = Labels((rng.random(300) < p).astype(int), np.arange(300), 1, n_boot=200, seed=seed)
        found = metrics.evaluate(labels, probs)
        ece = found.metrics["ece"]
        assert 0 <= ece.low <= ece.value <= ece.high
        held += ece.low == 0
    assert held >= 17  # of 20; at 97.5 % expected, 16 or fewer has probability 0.00003


def test_temperature_is_found_again():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 3)) * 2
    cumulative = softmax(logits).cumsum(axis=1)
    grade = (rng.random((20_000, 1)) > cumulative).sum(axis=1).clip(max=2)
    temperature, offsets = fit_calibration(logits * 3, grade, offsets=False)
    assert temperature == pytest.approx(3, rel=0.05)
    assert not offsets.any()
    shifted = logits * 3 - 3 * np.array([0.5, 0.0, -1.0])
    temperature, offsets = fit_calibration(shifted, grade)
    assert temperature == pytest.approx(3, rel=0.05)
    assert offsets - offsets[1] == pytest.approx([0.5, 0.0, -1.0], abs=0.06)
    calibrated = softmax(shifted / temperature + offsets).mean(axis=0)
    assert calibrated == pytest.approx(np.bincount(grade) / len(grade), abs=1e-3)


def test_isotonic_curves_win_only_where_temperature_cannot_follow():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)) * 2
    query = np.arange(4000) // 4

    def drawn(probs: np.ndarray) -> np.ndarray:
        return (rng.random((4000, 1)) > probs.cumsum(axis=1)[:, :-1]).sum(axis=1)

    alone, curved = isotonic_losses(logits, drawn(softmax(logits)), query)
    assert alone < curved
    steps = np.where(softmax(logits) > 0.5, 0.8, 0.1)  # sure or not at all
    grade = drawn(steps / steps.sum(axis=1, keepdims=True))
    alone, curved = isotonic_losses(logits, grade, query)
    assert curved < alone - 0.01
    assert np.isnan(isotonic_losses(logits, grade, np.zeros(4000))).all()
    curves = fit_isotonic(softmax(logits), grade)
    probs = probabilities(logits, 1.0, curves)
    assert probs.sum(axis=1) == pytest.approx(1)
    assert probs.min() > 0
    assert probabilities(logits, 2.0) == pytest.approx(softmax(logits / 2))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 2**31))
def test_the_calibration_of_a_few_rows_is_finite(n, k, seed):
    rng = np.random.default_rng(seed)
    temperature, offsets = fit_calibration(rng.normal(size=(n, k)) * 5, rng.integers(k, size=n))
    assert 0.05 <= temperature <= 20.01
    assert np.abs(offsets).max() < 5


def test_threshold_has_the_best_f1():
    rng = np.random.default_rng(0)
    relevant = rng.random(300) < 0.3
    score = np.round(rng.random(300) * 0.6 + relevant * 0.3, 2)
    found = best_f1_threshold(relevant, score)
    best = max(f1_score(relevant, score >= t) for t in np.unique(score))
    assert f1_score(relevant, score >= found) == pytest.approx(best)
    assert found not in score
    assert best_f1_threshold(np.ones(3, bool), np.array([0.1, 0.2, 0.3])) == 0.5


@pytest.mark.parametrize(
    ("relevant", "score", "threshold"),
    [
        ([1, 1, 1], [0.1, 0.2, 0.3], 0.5),
        ([0, 0], [0.0, 1.0], 0.5),
        ([0], [0.9], 0.5),
        ([], [], 0.5),
        ([1, 1], [-0.4, 0.2], -0.1),  # cosines
        ([0, 0, 0], [2.0, 12.0, 4.0], 7.0),  # BM25
    ],
)
def test_labels_of_one_class_choose_no_threshold(relevant, score, threshold):
    assert best_f1_threshold(np.array(relevant, bool), np.array(score, float)) == pytest.approx(threshold)


def test_labels_of_one_class_are_remarked_on():
    assert one_class(np.array([True, False]), "valid") == ""
    said = one_class(np.ones(3, bool), "valid")
    assert said.startswith("all 3 human grades of split 'valid' are relevant, so the decision threshold is 0.5")
    assert said.endswith("label some irrelevant pairs too")
    assert "are irrelevant, so there is no ROC-AUC; label some relevant" in one_class(np.zeros(2, bool), "test")
