from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, ndcg_score, roc_auc_score

from data.contracts import ContractError
from student import metrics
from student.calibration import best_f1_threshold, fit_calibration
from student.resampling import ranked
from student.scorer import softmax


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grades, probabilities with ties, query ids with gaps; 400 rows, 60 queries, 4 grades."""
    rng = np.random.default_rng(0)
    grade = rng.integers(4, size=400)
    logits = np.eye(4)[grade] * 1.5 + rng.normal(size=(400, 4))
    return grade, softmax(np.round(logits, 1)), rng.integers(60, size=400) * 7 + 3


def test_point_values_agree_with_scikit_learn(sample):
    grade, probs, query = sample
    found = metrics.evaluate(grade, probs, query, relevant_from=2, threshold=0.4, n_boot=100).metrics
    relevant, score = grade >= 2, probs[:, 2:].sum(axis=1)
    ndcg = [
        ndcg_score([2.0 ** grade[query == q] - 1], [score[query == q]], k=10)
        for q in np.unique(query)
        if len(set(grade[query == q])) > 1
    ]
    assert found["roc_auc"].value == pytest.approx(roc_auc_score(relevant, score))
    assert found["pr_auc"].value == pytest.approx(average_precision_score(relevant, score))
    assert found["f1"].value == pytest.approx(f1_score(relevant, score >= 0.4))
    assert found["macro_f1"].value == pytest.approx(f1_score(grade, probs.argmax(axis=1), average="macro"))
    assert found["ndcg_at_10"].value == pytest.approx(np.mean(ndcg))


def test_a_resample_gives_what_scikit_learn_gives_on_the_repeated_rows(sample):
    grade, probs, query = sample
    query = np.unique(query, return_inverse=True)[1]
    counts = np.random.default_rng(1).multinomial(query.max() + 1, np.full(query.max() + 1, 1 / (query.max() + 1)))
    rows = np.repeat(np.arange(len(grade)), counts[query])
    relevant, score = grade >= 2, probs[:, 2:].sum(axis=1)
    measures = [*metrics._system(grade, score, query, 2, 0.4), metrics._graded(grade, probs, score, query, 2)]
    expected = {
        "roc_auc": roc_auc_score(relevant[rows], score[rows]),
        "pr_auc": average_precision_score(relevant[rows], score[rows]),
        "f1": f1_score(relevant[rows], score[rows] >= 0.4),
        "macro_f1": f1_score(grade[rows], probs[rows].argmax(axis=1), average="macro"),
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
        auc = metrics.evaluate(grade, probs, query, relevant_from=1, n_boot=400).metrics["roc_auc"]
        assert auc.low < auc.value < auc.high
        return auc.high - auc.low

    assert width(np.repeat(np.arange(50), 8)) > 1.8 * width(np.arange(400))


def test_compare_is_paired(sample):
    grade, probs, query = sample
    score = probs[:, 2:].sum(axis=1)
    slightly_worse = score + np.random.default_rng(0).normal(size=len(score)) * 0.05
    same = metrics.compare(score, score.copy(), grade, query, relevant_from=2, n_boot=200)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    found = metrics.compare(score, slightly_worse, grade, query, relevant_from=2, n_boot=400)
    alone = metrics.evaluate_ranking(grade, score, query, relevant_from=2, n_boot=400).metrics["roc_auc"]
    assert found.high - found.low < 0.6 * (alone.high - alone.low)
    assert metrics.compare(score, -score, grade, query, relevant_from=2, n_boot=200).low > 0


def test_f1_is_compared_at_each_system_s_own_threshold(sample):
    grade, probs, query = sample
    score, relevant = probs[:, 2:].sum(axis=1), grade >= 2
    found = metrics.compare(
        score, score / 2, grade, query, relevant_from=2, metric="f1", thresholds=(0.5, 0.25), n_boot=200
    )
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    found = metrics.compare(score, score, grade, query, relevant_from=2, metric="f1", thresholds=(0.5, 0.9), n_boot=200)
    assert found.difference == pytest.approx(f1_score(relevant, score >= 0.5) - f1_score(relevant, score >= 0.9))
    assert found.low < found.difference < found.high
    with pytest.raises(ContractError, match="or f1 with thresholds"):
        metrics.compare(score, score, grade, query, relevant_from=2, metric="f1")


def test_one_class_only_gives_none_and_stays_json(sample):
    _, probs, query = sample
    found = metrics.evaluate(np.zeros(400, int), probs, query, relevant_from=1, threshold=0.5, n_boot=100)
    for name in ("roc_auc", "pr_auc", "f1", "ndcg_at_10"):
        assert found.metrics[name].value is None
    assert found.metrics["accuracy"].value is not None
    json.loads(json.dumps(found.model_dump(), allow_nan=False))


def test_no_rows_and_bad_scores_are_refused(sample):
    grade, probs, query = sample
    with pytest.raises(ContractError, match="nothing to evaluate"):
        metrics.evaluate(grade[:0], probs[:0], query[:0], relevant_from=2)
    with pytest.raises(ContractError, match="diverged"):
        metrics.evaluate(grade, probs * np.nan, query, relevant_from=2)
    with pytest.raises(ContractError, match="one for each row"):
        metrics.evaluate(grade[1:], probs, query, relevant_from=2)
    with pytest.raises(ContractError, match="not a distribution"):
        metrics.evaluate(grade, probs * 2, query, relevant_from=2)
    with pytest.raises(ContractError, match=r"grades lie in 0 … 3; found -1"):
        metrics.evaluate(np.where(grade == 0, -1, grade), probs, query, relevant_from=2)
    with pytest.raises(ContractError, match="whole numbers"):
        metrics.evaluate(grade / 2, probs, query, relevant_from=2)
    with pytest.raises(ContractError, match="relevant_from"):
        metrics.evaluate(grade, probs, query, relevant_from=4)
    with pytest.raises(ContractError, match="mask of slice"):
        metrics.evaluate(grade, probs, query, relevant_from=2, slices={"part": np.ones(3, bool)})
    with pytest.raises(ContractError, match="cannot be compared"):
        metrics.compare(grade, grade, grade, query, relevant_from=2, metric="ece")


def test_one_query_has_values_and_no_intervals(sample):
    grade, probs, _ = sample
    found = metrics.evaluate(grade, probs, np.zeros(400, int), relevant_from=2, n_boot=100).metrics
    assert found["roc_auc"].value == pytest.approx(roc_auc_score(grade >= 2, probs[:, 2:].sum(axis=1)))
    assert all((interval.low, interval.high) == (None, None) for interval in found.values())
    compared = metrics.compare(probs[:, 3], probs[:, 2], grade, np.zeros(400, int), relevant_from=2, n_boot=100)
    assert compared.difference is not None
    assert (compared.low, compared.high) == (None, None)


def test_scores_that_are_all_equal_rank_nothing(sample):
    grade, _, query = sample
    found = metrics.evaluate(grade, np.full((400, 4), 0.25), query, relevant_from=2, threshold=0.5, n_boot=100).metrics
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
    kept = np.repeat(np.arange(rows), counts[query])
    found = ranked(relevant, score, query)(counts[None, :].astype(float))
    if 0 < relevant[kept].sum() < len(kept):
        assert found["roc_auc"][0] == pytest.approx(roc_auc_score(relevant[kept], score[kept]), abs=1e-9)
        assert found["pr_auc"][0] == pytest.approx(average_precision_score(relevant[kept], score[kept]), abs=1e-9)
    else:
        assert np.isnan(found["roc_auc"][0])


def test_slices_measure_their_rows_only(sample):
    grade, probs, query = sample
    mask = grade % 2 == 0
    found = metrics.evaluate(
        grade, probs, query, relevant_from=2, slices={"even": mask, "none": mask & ~mask}, n_boot=100
    )
    assert [part.name for part in found.slices] == ["even", "none"]
    assert found.slices[1].n == 0
    assert {interval.value for interval in found.slices[1].metrics.values()} == {None}
    assert found.slices[0].n == mask.sum()
    expected = roc_auc_score(grade[mask] >= 2, probs[mask, 2:].sum(axis=1))
    assert found.slices[0].metrics["roc_auc"].value == pytest.approx(expected)


def test_ece_is_zero_for_a_calibrated_bin_and_the_gap_otherwise():
    p = np.full(100, 0.3)
    relevant = np.arange(100) < 30
    assert metrics.expected_calibration_error(relevant, p) == pytest.approx(0)
    assert metrics.expected_calibration_error(relevant, p + 0.4) == pytest.approx(0.4)


def test_the_interval_of_ece_holds_the_truth_where_percentiles_miss_it():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(20):  # a calibrated model: the truth is 0, every sample's value is above it
        p = rng.random(300)
        probs = np.stack([1 - p, p], axis=1)
        found = metrics.evaluate(
            (rng.random(300) < p).astype(int), probs, np.arange(300), relevant_from=1, n_boot=200, seed=seed
        )
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
