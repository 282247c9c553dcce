"""Measures of a relevance model, each with a 95 % bootstrap interval resampled by query.

Point values come from scikit-learn where it has the measure; `student.resampling` has what resamples make of them, and tests
hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from data.contracts import ContractError
from student.resampling import Measures, bootstrap, limits, limits_of, ranked, summed, sums_by_query

Array = np.ndarray

ECE_BINS = 15
SLICE_RESAMPLES = 300


class Interval(BaseModel):
    """A value and its 95 % bootstrap interval; None where it is not defined (say, ROC-AUC with one class only)."""

    value: float | None
    low: float | None = None
    high: float | None = None


class SliceResult(BaseModel):
    """The measures on some of the rows."""

    name: str
    n: int
    n_relevant: int
    metrics: dict[str, Interval]


class Evaluation(BaseModel):
    """All measures of one system on one set of rows."""

    n: int
    n_queries: int
    n_relevant: int
    n_ranked_queries: int
    metrics: dict[str, Interval]
    slices: list[SliceResult] = []


class Comparison(BaseModel):
    """The difference a − b of one measure, both on the same resamples; `low` > 0 means a is better."""

    a: str
    b: str
    metric: str
    n: int
    difference: float | None
    low: float | None
    high: float | None


def evaluate(
    y_true_grade: Array,
    grade_probs: Array,
    query_id: Array,
    *,
    relevant_from: int,
    threshold: float | None = None,
    slices: Mapping[str, Array] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Measure a system that gives grade probabilities.

    Gives roc_auc, pr_auc, ndcg_at_10, macro_f1 (over grades), accuracy, ece (of p_relevant, 15 bins of equal width;
    Naeini et al. 2015) and, with a `threshold` on p_relevant, f1. What is not defined on these rows has value None.
    NDCG@10 (gain 2^grade − 1, ties averaged) is the mean over queries whose rows have at least two different grades.

    Parameters: y_true_grade int (N,); grade_probs (N, K); query_id (N,), any integers; slices: name → bool mask (N,).
    Raises `ContractError` when there is no row or the lengths differ.
    """
    grade, probs = np.asarray(y_true_grade), np.asarray(grade_probs, dtype=np.float64)
    query = _dense(query_id)
    _check_probabilities(grade, probs, query, relevant_from)
    score = probs[:, relevant_from:].sum(axis=1)
    measured = [
        *_system(grade, score, query, relevant_from, threshold),
        _graded(grade, probs, score, query, relevant_from),
    ]
    found = _evaluation(grade, query, relevant_from, measured, n_boot, seed)
    for name, mask in (slices or {}).items():
        if len(mask) != len(grade):
            raise ContractError(f"the mask of slice '{name}' has {len(mask)} rows for {len(grade)} rows to evaluate")
        kept = np.flatnonzero(mask)
        if not len(kept):
            nothing = {metric: Interval(value=None) for metric in found.metrics}
            found.slices.append(SliceResult(name=name, n=0, n_relevant=0, metrics=nothing))
            continue
        part = evaluate(
            grade[kept],
            probs[kept],
            query[kept],
            relevant_from=relevant_from,
            threshold=threshold,
            n_boot=min(n_boot, SLICE_RESAMPLES),
            seed=seed,
        )
        found.slices.append(SliceResult(name=name, n=part.n, n_relevant=part.n_relevant, metrics=part.metrics))
    return found


def evaluate_ranking(
    y_true_grade: Array,
    score: Array,
    query_id: Array,
    *,
    relevant_from: int,
    threshold: float | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Measure a system that only gives a score (N,): roc_auc, pr_auc, ndcg_at_10 and, with a `threshold`, f1."""
    grade, score = np.asarray(y_true_grade), np.asarray(score, dtype=np.float64)
    query = _dense(query_id)
    _check(grade, score, query)
    return _evaluation(
        grade, query, relevant_from, _system(grade, score, query, relevant_from, threshold), n_boot, seed
    )


def compare(
    a: Array,
    b: Array,
    y_true_grade: Array,
    query_id: Array,
    *,
    relevant_from: int,
    metric: str = "roc_auc",
    thresholds: tuple[float | None, float | None] = (None, None),
    names: tuple[str, str] = ("a", "b"),
    n_boot: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap of two systems' scores (N,) on the same rows; `metric` is roc_auc, pr_auc or ndcg_at_10.

    With `thresholds`, chosen without these rows, it may also be f1, each system at its own.
    Raises `ContractError` as `evaluate` does, and for another `metric`.
    """
    grade, query = np.asarray(y_true_grade), _dense(query_id)
    systems = []
    for score, threshold in zip(
        (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)), thresholds, strict=True
    ):
        _check(grade, score, query)
        found = [part for part in _system(grade, score, query, relevant_from, threshold) if metric in part.values]
        if not found:
            raise ContractError(
                f"'{metric}' cannot be compared; choose roc_auc, pr_auc, ndcg_at_10, or f1 with thresholds"
            )
        systems += found
    draws_a, draws_b = bootstrap(systems, int(query.max()) + 1, n_boot, seed)
    low, high = limits(draws_a[metric] - draws_b[metric], int(query.max()) + 1)
    value = systems[0].values[metric] - systems[1].values[metric]
    difference = None if np.isnan(value) else float(value)
    if difference is None:
        low = high = None
    return Comparison(a=names[0], b=names[1], metric=metric, n=len(grade), difference=difference, low=low, high=high)


def roc_auc(relevant: Array, score: Array) -> float:
    """ROC-AUC, NaN when only one class is there."""
    return float(roc_auc_score(relevant, score)) if 0 < relevant.sum() < len(relevant) else float("nan")


def expected_calibration_error(relevant: Array, p: Array) -> float:
    """ECE of probabilities p (N,) against 0/1 outcomes (N,), 15 bins of equal width."""
    gaps = np.bincount(_bins(p), relevant - p, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(p))


# --- measures -------------------------------------------------------------------------------------------------------


def _system(grade: Array, score: Array, query: Array, relevant_from: int, threshold: float | None) -> list[Measures]:
    """What a score (N,) alone gives."""
    relevant = grade >= relevant_from
    both = 0 < relevant.sum() < len(relevant)
    precision = float(average_precision_score(relevant, score)) if both else float("nan")
    values = {"roc_auc": roc_auc(relevant, score), "pr_auc": precision}
    ndcg, counted = ndcg_by_query(grade, score, query)
    measures = [
        Measures(values, ranked(relevant, score, query)),
        summed(
            np.stack([ndcg * counted, counted], axis=1), lambda sums: {"ndcg_at_10": _ratio(sums[:, 0], sums[:, 1])}
        ),
    ]
    if threshold is not None:
        predicted = score >= threshold
        columns = sums_by_query([relevant & predicted, relevant.astype(int) + predicted, relevant], query)
        measures.append(summed(columns, _f1))
    return measures


def _graded(grade: Array, probs: Array, score: Array, query: Array, relevant_from: int) -> Measures:
    """What grade probabilities (N, K) give beyond their score."""
    predicted, labels = probs.argmax(axis=1), range(probs.shape[1])
    place, gap = _bins(score), (grade >= relevant_from) - score
    columns = [
        predicted == grade,
        *((grade == k) & (predicted == k) for k in labels),
        *((grade == k).astype(int) + (predicted == k) for k in labels),
        *(gap * (place == b) for b in range(ECE_BINS)),
        np.ones(len(grade)),
    ]
    values = {
        "macro_f1": float(f1_score(grade, predicted, average="macro", zero_division=0.0)),
        "accuracy": float((predicted == grade).mean()),
        "ece": expected_calibration_error(grade >= relevant_from, score),
    }
    sums = sums_by_query(columns, query)
    return Measures(values, lambda counts: _combine_graded(counts @ sums, len(labels)))


def _combine_graded(sums: Array, size: int) -> dict[str, Array]:
    hit, total, rows = sums[:, 1 : 1 + size], sums[:, 1 + size : 1 + 2 * size], sums[:, -1]
    # A grade that a resample neither holds nor predicts is left out of its mean, as scikit-learn leaves it out.
    f1 = np.where(total > 0, 2 * hit / np.maximum(total, 1.0), 0.0)
    return {
        "macro_f1": f1.sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1),
        "accuracy": sums[:, 0] / rows,
        "ece": sums[:, 1 + 2 * size : -1] / rows[:, None],  # the gap of each bin; see absolute_sum_limits
    }


def _f1(sums: Array) -> dict[str, Array]:
    hit, either, relevant = sums.T
    return {"f1": np.where(relevant > 0, 2 * hit / np.maximum(either, 1.0), np.nan)}


def _ratio(above: Array, below: Array) -> Array:
    return np.where(below > 0, above / np.maximum(below, 1.0), np.nan)


def _bins(p: Array) -> Array:
    return np.minimum((p * ECE_BINS).astype(int), ECE_BINS - 1)


def ndcg_by_query(grade: Array, score: Array, query: Array, k: int = 10) -> tuple[Array, Array]:
    """NDCG@k of each query (Q,) and whether it counts (Q,): a query whose rows all have one grade cannot be misranked.

    Gain 2^grade − 1, discount 1/log2(rank + 1); rows of equal score share the mean of their discounts.
    """
    q = int(query.max()) + 1
    gain = 2.0**grade - 1

    def dcg(by: Array) -> Array:
        order = np.lexsort((-by, query))
        sizes = np.bincount(query, minlength=q)
        rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        discount = np.where(rank < k, 1 / np.log2(rank + 2), 0.0)
        sorted_query, sorted_by = query[order], by[order]
        new = np.r_[True, (sorted_query[1:] != sorted_query[:-1]) | (sorted_by[1:] != sorted_by[:-1])]
        group = np.cumsum(new) - 1
        mean = np.bincount(group, discount) / np.bincount(group)
        return np.bincount(sorted_query, mean[group] * gain[order], minlength=q)

    lowest, highest = np.full(q, np.inf), np.full(q, -np.inf)
    np.minimum.at(lowest, query, grade)
    np.maximum.at(highest, query, grade)
    ideal = dcg(gain)
    return dcg(score) / np.where(ideal > 0, ideal, 1.0), highest > lowest


def _evaluation(
    grade: Array, query: Array, relevant_from: int, measured: Sequence[Measures], n_boot: int, seed: int
) -> Evaluation:
    n_queries = int(query.max()) + 1
    metrics = {}
    for part, draws in zip(measured, bootstrap(measured, n_queries, n_boot, seed), strict=True):
        for name, value in part.values.items():
            low, high = limits_of(part, name, draws[name], n_queries)
            metrics[name] = Interval(value=None) if np.isnan(value) else Interval(value=value, low=low, high=high)
    return Evaluation(
        n=len(grade),
        n_queries=n_queries,
        n_relevant=int((grade >= relevant_from).sum()),
        n_ranked_queries=int(ndcg_by_query(grade, grade.astype(float), query)[1].sum()),
        metrics=metrics,
    )


def _dense(query_id: Array) -> Array:
    return np.unique(np.asarray(query_id), return_inverse=True)[1].reshape(-1)


def _check(grade: Array, scores: Array, query: Array) -> None:
    if not len(grade):
        raise ContractError("there is nothing to evaluate: no row has a human grade; label some rows of this split")
    if not len(grade) == len(scores) == len(query):
        raise ContractError(f"{len(grade)} grades, {len(scores)} scores and {len(query)} query ids: one for each row")
    if not np.issubdtype(grade.dtype, np.integer):
        raise ContractError(f"grades are whole numbers, 0 = irrelevant; these are {grade.dtype}")
    if not np.isfinite(scores).all():
        raise ContractError("a score is not a finite number: the model has diverged; lower its learning rate")


def _check_probabilities(grade: Array, probs: Array, query: Array, relevant_from: int) -> None:
    _check(grade, probs, query)
    if probs.ndim != 2 or not 1 <= relevant_from < probs.shape[1]:
        raise ContractError(
            f"grade_probs is (N, K) and relevant_from lies in 1 … K − 1; found {probs.shape}, {relevant_from}"
        )
    if grade.min() < 0 or grade.max() >= probs.shape[1]:
        raise ContractError(f"grades lie in 0 … {probs.shape[1] - 1}; found {grade.min()} … {grade.max()}")
    if probs.min() < 0 or np.abs(probs.sum(axis=1) - 1).max() > 1e-3:
        raise ContractError("a row of grade_probs is not a distribution: its numbers are not below 0 and sum to 1")
