"""Metrics of a relevance model, each with a 95 % bootstrap interval resampled by query.

Point values come from scikit-learn where it has the measure; `student.resampling` has what resamples make of them, and tests
hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from pydantic import BaseModel
from sklearn.metrics import average_precision_score, cohen_kappa_score, f1_score, roc_auc_score

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
    """The metrics on some of the rows."""

    name: str
    n: int
    n_relevant: int
    metrics: dict[str, Interval]


class Evaluation(BaseModel):
    """All metrics of one system on one set of rows."""

    n: int
    n_queries: int
    n_relevant: int
    n_ranked_queries: int
    metrics: dict[str, Interval]
    slices: list[SliceResult] = []


class Comparison(BaseModel):
    """The difference a − b of one metric, both on the same resamples; `low` > 0 means a is better."""

    a: str
    b: str
    metric: str
    n: int
    difference: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Labels:
    """The human grades that systems are measured against, and how their intervals are drawn.

    Parameters: grade int (N,); query_id (N,), any values; a grade counts as relevant from `relevant_from` on; `n_boot`
    resamples of the queries from `seed`. Raises `ContractError` when there is no row or the lengths differ.
    """

    grade: Array
    query_id: Array
    relevant_from: int
    n_boot: int = 1000
    seed: int = 0
    query: Array = field(init=False)
    """The queries' numbers (N,), 0 … Q − 1."""

    def __post_init__(self) -> None:
        if not len(self.grade):
            raise ContractError("there is nothing to evaluate: no row has a human grade; label some rows of this split")
        if len(self.grade) != len(self.query_id):
            raise ContractError(f"{len(self.grade)} grades and {len(self.query_id)} query ids: one for each row")
        if not np.issubdtype(self.grade.dtype, np.integer):
            raise ContractError(f"grades are whole numbers, 0 = irrelevant; these are {self.grade.dtype}")
        object.__setattr__(self, "query", np.unique(self.query_id, return_inverse=True)[1].reshape(-1))

    @property
    def relevant(self) -> Array:
        """Whether each grade counts as relevant, bool (N,)."""
        return self.grade >= self.relevant_from

    @property
    def n_queries(self) -> int:
        """Q, the number of queries."""
        return int(self.query.max()) + 1

    def take(self, rows: Array) -> Labels:
        """The labels of these row numbers, or of the rows of a bool mask (N,)."""
        return replace(self, grade=self.grade[rows], query_id=self.query_id[rows])


def evaluate(
    labels: Labels, output: Array, *, threshold: float | None = None, slices: Mapping[str, Array] | None = None
) -> Evaluation:
    """Measure a system by its output: a score (N,), or grade probabilities (N, K).

    A score gives roc_auc, pr_auc, ndcg_at_10 and, with a `threshold`, f1. Probabilities, whose score is p_relevant, also
    give macro_f1 (over grades), accuracy, quadratic_kappa (Cohen 1968) and ece (of p_relevant, 15 bins of equal width;
    Naeini et al. 2015). What is not defined on these rows has value None.
    NDCG@10 (gain 2^grade − 1, ties averaged) is the mean over queries whose rows have at least two different grades.

    Parameters: slices: name → bool mask (N,), each with a row. Raises `ContractError` for output that is not finite, of
    another length, or no distribution.
    """
    output = np.asarray(output, dtype=np.float64)
    score = output
    if output.ndim == 2:
        _check_probabilities(labels, output)
        score = output[:, labels.relevant_from :].sum(axis=1)
    measured = score_measures(labels, score, threshold)
    if output.ndim == 2:
        measured.append(grade_measures(labels, output, score))
    evaluation = _evaluation(labels, measured)
    short = replace(labels, n_boot=min(labels.n_boot, SLICE_RESAMPLES))
    for name, mask in (slices or {}).items():
        part = evaluate(short.take(mask), output[mask], threshold=threshold)
        evaluation.slices.append(SliceResult(name=name, n=part.n, n_relevant=part.n_relevant, metrics=part.metrics))
    return evaluation


def compare(
    labels: Labels,
    a: Array,
    b: Array,
    *,
    metric: str = "roc_auc",
    thresholds: tuple[float | None, float | None] = (None, None),
    names: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Paired bootstrap of two systems' scores (N,) on the same rows; `metric` is roc_auc, pr_auc or ndcg_at_10.

    With `thresholds`, chosen without these rows, it may also be f1, each system at its own.
    Raises `ContractError` as `evaluate` does, and for another `metric`.
    """
    systems = [
        part
        for score, threshold in zip((a, b), thresholds, strict=True)
        for part in score_measures(labels, np.asarray(score, dtype=np.float64), threshold)
        if metric in part.values
    ]
    if not systems:
        raise ContractError(f"'{metric}' cannot be compared; choose roc_auc, pr_auc, ndcg_at_10, or f1 with thresholds")
    draws_a, draws_b = bootstrap(systems, labels.n_queries, labels.n_boot, labels.seed)
    low, high = limits(draws_a[metric] - draws_b[metric], labels.n_queries)
    value = systems[0].values[metric] - systems[1].values[metric]
    found = {"low": None, "high": None} if np.isnan(value) else {"low": low, "high": high}
    difference = None if np.isnan(value) else float(value)
    return Comparison(a=names[0], b=names[1], metric=metric, n=len(labels.grade), difference=difference, **found)


def roc_auc(relevant: Array, score: Array) -> float:
    """ROC-AUC, NaN when only one class is there."""
    return float(roc_auc_score(relevant, score)) if 0 < relevant.sum() < len(relevant) else float("nan")


def expected_calibration_error(relevant: Array, p: Array) -> float:
    """ECE of probabilities p (N,) against 0/1 outcomes (N,), 15 bins of equal width."""
    gaps = np.bincount(_bins(p), relevant - p, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(p))


def score_measures(labels: Labels, score: Array, threshold: float | None = None) -> list[Measures]:
    """What a score (N,) alone gives: its values and what a resample makes of them."""
    if len(score) != len(labels.grade):
        raise ContractError(f"{len(labels.grade)} grades and {len(score)} scores: one for each row")
    if not np.isfinite(score).all():
        raise ContractError("a score is not a finite number: the model has diverged; lower its learning rate")
    relevant, query = labels.relevant, labels.query
    both = 0 < relevant.sum() < len(relevant)
    precision = float(average_precision_score(relevant, score)) if both else float("nan")
    values = {"roc_auc": roc_auc(relevant, score), "pr_auc": precision}
    ndcg, counted = ndcg_by_query(labels.grade, score, query)
    of_score = [
        Measures(values, ranked(relevant, score, query)),
        summed(np.stack([ndcg * counted, counted], axis=1), _mean_ndcg),
    ]
    if threshold is not None:
        predicted = score >= threshold
        columns = sums_by_query([relevant & predicted, relevant.astype(int) + predicted, relevant], query)
        of_score.append(summed(columns, _f1))
    return of_score


def grade_measures(labels: Labels, probs: Array, score: Array) -> Measures:
    """What grade probabilities (N, K) give beyond their score."""
    grade, predicted, size = labels.grade, probs.argmax(axis=1), probs.shape[1]
    place, gap, cell = _bins(score), labels.relevant - score, grade * size + predicted
    columns = [*(cell == c for c in range(size**2)), *(gap * (place == b) for b in range(ECE_BINS))]
    values = {
        "macro_f1": float(f1_score(grade, predicted, average="macro", zero_division=0.0)),
        "accuracy": float((predicted == grade).mean()),
        "quadratic_kappa": _kappa(grade, predicted, size),
        "ece": expected_calibration_error(labels.relevant, score),
    }
    sums = sums_by_query(columns, labels.query)
    return Measures(values, lambda counts: _combine_graded(counts @ sums, size))


def _kappa(grade: Array, predicted: Array, size: int) -> float:
    one_grade = len(np.unique([grade, predicted])) == 1
    return float("nan") if one_grade else cohen_kappa_score(grade, predicted, labels=range(size), weights="quadratic")


def _combine_graded(sums: Array, size: int) -> dict[str, Array]:
    cells, gaps = sums[:, : size**2], sums[:, size**2 :]
    confusion = cells.reshape(len(sums), size, size)  # by human grade, then by predicted grade
    human, predicted, rows = confusion.sum(axis=2), confusion.sum(axis=1), cells.sum(axis=1)
    hit, total = np.diagonal(confusion, axis1=1, axis2=2), human + predicted
    # A grade that a resample neither holds nor predicts is left out of its mean, as scikit-learn leaves it out.
    f1 = np.where(total > 0, 2 * hit / np.maximum(total, 1.0), 0.0)
    cost = np.subtract.outer(np.arange(size), np.arange(size)) ** 2.0  # Cohen 1968
    by_chance = np.einsum("bi,ij,bj->b", human, cost, predicted) / rows
    return {
        "macro_f1": f1.sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1),
        "accuracy": hit.sum(axis=1) / rows,
        "quadratic_kappa": 1 - (confusion * cost).sum(axis=(1, 2)) / np.where(by_chance > 0, by_chance, np.nan),
        "ece": gaps / rows[:, None],  # the gap of each bin; see absolute_sum_limits
    }


def _f1(sums: Array) -> dict[str, Array]:
    hit, either, relevant = sums.T
    return {"f1": np.where(relevant > 0, 2 * hit / np.maximum(either, 1.0), np.nan)}


def _mean_ndcg(sums: Array) -> dict[str, Array]:
    total, counted = sums.T
    return {"ndcg_at_10": np.where(counted > 0, total / np.maximum(counted, 1.0), np.nan)}


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


def intervals(labels: Labels, measured: Sequence[Measures]) -> list[dict[str, Interval]]:
    """For each of `measured`, its values with their intervals by name; all on the same resamples."""
    n_queries, results = labels.n_queries, []
    for part, draws in zip(measured, bootstrap(measured, n_queries, labels.n_boot, labels.seed), strict=True):
        metrics = {}
        for name, value in part.values.items():
            low, high = limits_of(part, name, draws[name], n_queries)
            if low is not None and high is not None:  # rounding may put the value just outside
                low, high = min(low, value), max(high, value)
            metrics[name] = Interval(value=None) if np.isnan(value) else Interval(value=value, low=low, high=high)
        results.append(metrics)
    return results


def _evaluation(labels: Labels, measured: Sequence[Measures]) -> Evaluation:
    return Evaluation(
        n=len(labels.grade),
        n_queries=labels.n_queries,
        n_relevant=int(labels.relevant.sum()),
        n_ranked_queries=int(ndcg_by_query(labels.grade, labels.grade.astype(float), labels.query)[1].sum()),
        metrics={name: value for part in intervals(labels, measured) for name, value in part.items()},
    )


def _check_probabilities(labels: Labels, probs: Array) -> None:
    size, grade = probs.shape[1], labels.grade
    if not 1 <= labels.relevant_from < size:
        raise ContractError(f"relevant_from lies in 1 … K − 1; it is {labels.relevant_from} and K is {size}")
    if grade.min() < 0 or grade.max() >= size:
        raise ContractError(f"grades lie in 0 … {size - 1}; found {grade.min()} … {grade.max()}")
    # NaN passes here: `score_measures` says what it means.
    if probs.min() < 0 or (np.abs(probs.sum(axis=1) - 1) > 1e-3).any():
        raise ContractError("a row of grade_probs is not a distribution: its numbers are not below 0 and sum to 1")
