"""Measures of a relevance model, each with a 95 % bootstrap interval resampled by query.

Pairs of one query are not independent, so whole queries are drawn. A resample is a weight for each row (how often its
query was drawn), and every measure has a weighted form that takes all resamples at once, without a Python loop.
Point values come from scikit-learn where it has the measure, and tests hold the weighted forms against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from pydantic import BaseModel
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from data.schema import ContractError

Array = np.ndarray
# (n_rows,) weights of several resamples, (resamples, n_rows), to one value each, (resamples,); NaN = undefined.
Weighted = Callable[[Array], Array]

ECE_BINS = 15
_BUDGET = 4_000_000  # numbers in one block of resample weights: 32 MB


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
    grade, probs = np.asarray(y_true_grade, dtype=np.int64), np.asarray(grade_probs, dtype=np.float64)
    query = _dense(query_id)
    _check(grade, probs, query)
    score = probs[:, relevant_from:].sum(axis=1)
    measured = _system(grade, score, query, relevant_from, threshold) | _graded(grade, probs, score, relevant_from)
    found = _evaluation(grade, query, relevant_from, measured, n_boot, seed)
    for name, mask in (slices or {}).items():
        kept = np.flatnonzero(mask)
        if not len(kept):
            continue
        part = evaluate(
            grade[kept],
            probs[kept],
            query[kept],
            relevant_from=relevant_from,
            threshold=threshold,
            n_boot=min(n_boot, 300),
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
    grade, score = np.asarray(y_true_grade, dtype=np.int64), np.asarray(score, dtype=np.float64)
    query = _dense(query_id)
    _check(grade, score, query)
    measured = _system(grade, score, query, relevant_from, threshold)
    return _evaluation(grade, query, relevant_from, measured, n_boot, seed)


def compare(
    a: Array,
    b: Array,
    y_true_grade: Array,
    query_id: Array,
    *,
    relevant_from: int,
    metric: str = "roc_auc",
    names: tuple[str, str] = ("a", "b"),
    n_boot: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap of two systems' scores (N,) on the same rows; `metric` is roc_auc, pr_auc or ndcg_at_10."""
    grade, query = np.asarray(y_true_grade, dtype=np.int64), _dense(query_id)
    systems = []
    for score in (a, b):
        _check(grade, np.asarray(score), query)
        systems.append(_system(grade, np.asarray(score, dtype=np.float64), query, relevant_from, None)[metric])
    (value_a, weighted_a), (value_b, weighted_b) = systems
    draws = _bootstrap({metric: lambda w: weighted_a(w) - weighted_b(w)}, query, n_boot, seed)[metric]
    low, high = _limits(draws)
    difference = None if np.isnan(value_a) or np.isnan(value_b) else float(value_a - value_b)
    return Comparison(a=names[0], b=names[1], metric=metric, n=len(grade), difference=difference, low=low, high=high)


def roc_auc(relevant: Array, score: Array) -> float:
    """ROC-AUC, NaN when only one class is there."""
    return float(roc_auc_score(relevant, score)) if 0 < relevant.sum() < len(relevant) else float("nan")


def expected_calibration_error(relevant: Array, p: Array) -> float:
    """ECE of probabilities p (N,) against 0/1 outcomes (N,), 15 bins of equal width."""
    return float(_weighted_ece(relevant.astype(float), p)(np.ones((1, len(p))))[0])


# --- measures: (value, weighted form) -------------------------------------------------------------------------------


def _system(
    grade: Array, score: Array, query: Array, relevant_from: int, threshold: float | None
) -> dict[str, tuple[float, Weighted]]:
    relevant = grade >= relevant_from
    both = 0 < relevant.sum() < len(relevant)
    nan = float("nan")
    ndcg, ranked = ndcg_by_query(grade, score, query)
    measured: dict[str, tuple[float, Weighted]] = {
        "roc_auc": (roc_auc(relevant, score), _weighted_roc_auc(relevant, score)),
        "pr_auc": (
            float(average_precision_score(relevant, score)) if both else nan,
            _weighted_average_precision(relevant, score),
        ),
        "ndcg_at_10": (float(ndcg[ranked].mean()) if ranked.any() else nan, _weighted_by_query(ndcg, ranked, query)),
    }
    if threshold is not None:
        predicted = score >= threshold
        value = float(f1_score(relevant, predicted, zero_division=0.0)) if relevant.any() else nan
        measured["f1"] = (value, _weighted_f1(relevant, predicted))
    return measured


def _graded(grade: Array, probs: Array, score: Array, relevant_from: int) -> dict[str, tuple[float, Weighted]]:
    predicted = probs.argmax(axis=1)
    relevant = (grade >= relevant_from).astype(float)
    hit = (predicted == grade).astype(float)
    present = np.union1d(grade, predicted)
    macro = float(f1_score(grade, predicted, labels=present, average="macro", zero_division=0.0))
    ece = _weighted_ece(relevant, score)
    return {
        "macro_f1": (macro, _weighted_macro_f1(grade, predicted, present)),
        "accuracy": (float(hit.mean()), lambda w: w @ hit / w.sum(axis=1)),
        "ece": (float(ece(np.ones((1, len(grade))))[0]), ece),
    }


def _weighted_roc_auc(relevant: Array, score: Array) -> Weighted:
    order = np.argsort(score, kind="stable")
    starts = _group_starts(score[order])
    positive = relevant[order].astype(float)

    def weighted(w: Array) -> Array:
        w = w[:, order]
        p = np.add.reduceat(w * positive, starts, axis=1)
        n = np.add.reduceat(w * (1 - positive), starts, axis=1)
        below = np.cumsum(n, axis=1) - n / 2  # a tie counts half
        with np.errstate(invalid="ignore", divide="ignore"):
            return (p * below).sum(axis=1) / (p.sum(axis=1) * n.sum(axis=1))

    return weighted


def _weighted_average_precision(relevant: Array, score: Array) -> Weighted:
    order = np.argsort(-score, kind="stable")
    starts = _group_starts(score[order])
    positive = relevant[order].astype(float)

    def weighted(w: Array) -> Array:
        w = w[:, order]
        p = np.add.reduceat(w * positive, starts, axis=1)
        taken = np.cumsum(np.add.reduceat(w, starts, axis=1), axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.where(taken > 0, np.cumsum(p, axis=1) / np.maximum(taken, 1e-12), 0.0)
            return (p * precision).sum(axis=1) / p.sum(axis=1)

    return weighted


def _weighted_f1(relevant: Array, predicted: Array) -> Weighted:
    hit, either = (relevant & predicted).astype(float), relevant.astype(float) + predicted.astype(float)

    def weighted(w: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return 2 * (w @ hit) / (w @ either)

    return weighted


def _weighted_macro_f1(grade: Array, predicted: Array, labels: Array) -> Weighted:
    true, guess = grade[:, None] == labels, predicted[:, None] == labels
    hit, either = (true & guess).astype(float), true.astype(float) + guess.astype(float)

    def weighted(w: Array) -> Array:
        total = w @ either
        # A grade that a resample neither holds nor predicts is left out of its mean, as scikit-learn leaves it out.
        f1 = np.where(total > 0, 2 * (w @ hit) / np.maximum(total, 1e-12), 0.0)
        return f1.sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1)

    return weighted


def _weighted_ece(relevant: Array, p: Array) -> Weighted:
    place = np.minimum((p * ECE_BINS).astype(int), ECE_BINS - 1)
    gap = np.zeros((len(p), ECE_BINS))
    gap[np.arange(len(p)), place] = relevant - p
    return lambda w: np.abs(w @ gap).sum(axis=1) / w.sum(axis=1)


def _weighted_by_query(value: Array, counted: Array, query: Array) -> Weighted:
    first = np.unique(query, return_index=True)[1]  # all rows of a query have one weight: take its first row's
    kept, kept_value = first[counted], value[counted]

    def weighted(w: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (w[:, kept] @ kept_value) / w[:, kept].sum(axis=1)

    return weighted


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


# --- resampling -----------------------------------------------------------------------------------------------------


def _resamples(query: Array, n_boot: int, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    n_queries = int(query.max()) + 1
    block = max(1, _BUDGET // max(len(query), n_queries))
    for start in range(0, n_boot, block):
        size = min(block, n_boot - start)
        yield rng.multinomial(n_queries, np.full(n_queries, 1 / n_queries), size=size)[:, query].astype(float)


def _bootstrap(measures: Mapping[str, Weighted], query: Array, n_boot: int, seed: int) -> dict[str, Array]:
    draws: dict[str, list[Array]] = {name: [] for name in measures}
    for weights in _resamples(query, n_boot, seed):
        for name, weighted in measures.items():
            draws[name].append(weighted(weights))
    return {name: np.concatenate(parts) for name, parts in draws.items()}


def _limits(draws: Array) -> tuple[float | None, float | None]:
    """The 2.5 % and 97.5 % quantiles; None when most resamples left the measure undefined."""
    defined = draws[np.isfinite(draws)]
    if 2 * len(defined) < len(draws):
        return None, None
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def _evaluation(
    grade: Array,
    query: Array,
    relevant_from: int,
    measured: dict[str, tuple[float, Weighted]],
    n_boot: int,
    seed: int,
) -> Evaluation:
    draws = _bootstrap({name: weighted for name, (_, weighted) in measured.items()}, query, n_boot, seed)
    metrics = {}
    for name, (value, _) in measured.items():
        low, high = _limits(draws[name])
        metrics[name] = Interval(value=None) if np.isnan(value) else Interval(value=value, low=low, high=high)
    return Evaluation(
        n=len(grade),
        n_queries=int(query.max()) + 1,
        n_relevant=int((grade >= relevant_from).sum()),
        n_ranked_queries=int(ndcg_by_query(grade, grade.astype(float), query)[1].sum()),
        metrics=metrics,
    )


def _group_starts(ordered: Array) -> Array:
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def _dense(query_id: Array) -> Array:
    return np.unique(np.asarray(query_id), return_inverse=True)[1].reshape(-1)


def _check(grade: Array, scores: Array, query: Array) -> None:
    if not len(grade):
        raise ContractError("there is nothing to evaluate: no row has a human grade; label some rows of this split")
    if not len(grade) == len(scores) == len(query):
        raise ContractError(f"{len(grade)} grades, {len(scores)} scores and {len(query)} query ids: one for each row")
    if not np.isfinite(scores).all():
        raise ContractError("a score is not a finite number: the model has diverged; lower its learning rate")
