"""The bootstrap behind every interval: whole queries are drawn, since pairs of one query are not independent.

A resample is a count for each query (how often it was drawn). Two kinds of measures cover all that we report: functions of
sums over rows, whose sums by query are made once so that all resamples are one matrix product; and measures of a ranking,
which share one sorting of the rows and cost a few passes over them for each resample. A million rows and a thousand
resamples take well under a minute on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm
from scipy.stats import t as student_t

Array = np.ndarray
_BUDGET = 4_000_000  # numbers in one block of counts: 32 MB


@dataclass(frozen=True)
class Measures:
    """Some measures of one system: their values on the rows, NaN where undefined, and what resamples make of them.

    `resampled` takes counts float64 (B, Q) and gives values (B,) by name; of a sum of absolute values its terms (B, F).
    """

    values: dict[str, float]
    resampled: Callable[[Array], dict[str, Array]]


def summed(by_query: Array, combine: Callable[[Array], dict[str, Array]]) -> Measures:
    """Measures that are functions of sums over rows.

    Parameters: by_query (Q, F) the sums within each query; combine from sums (B, F) to values (B,) by name.
    """
    values = {name: float(value[0]) for name, value in combine(by_query.sum(axis=0, keepdims=True)).items()}
    return Measures(values, lambda counts: combine(counts @ by_query))


def sums_by_query(columns: Sequence[Array], query: Array) -> Array:
    """Sums (Q, F) of F columns (N,) within each query; query (N,) in 0 … Q − 1."""
    q = int(query.max()) + 1
    return np.stack([np.bincount(query, column, minlength=q) for column in columns], axis=1)


def ranked(relevant: Array, score: Array, query: Array) -> Callable[[Array], dict[str, Array]]:
    """ROC-AUC and average precision (`roc_auc`, `pr_auc`) of weighted rows; a tie counts half, as in scikit-learn.

    Parameters: relevant bool (N,), score (N,), query (N,) in 0 … Q − 1.
    """
    order = np.argsort(-score, kind="stable")
    ordered, query, positive = score[order], query[order], relevant[order].astype(float)
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    tied = len(starts) < len(ordered)

    def one(counts: Array) -> tuple[float, float]:
        every = counts[query]
        right = every * positive
        if tied:
            every, right = np.add.reduceat(every, starts), np.add.reduceat(right, starts)
        right_above, all_above = np.cumsum(right), np.cumsum(every)
        n_right, n = right_above[-1], all_above[-1]
        wrong = every - right
        if not 0 < n_right < n:
            return float("nan"), float("nan")
        auc = (wrong @ right_above - (wrong @ right) / 2) / (n_right * (n - n_right))
        precision = right_above / np.maximum(all_above, 1.0)  # counts are whole: below 1 there is nothing above either
        return auc, (right @ precision) / n_right

    def resampled(counts: Array) -> dict[str, Array]:
        auc, precision = np.array([one(row) for row in counts]).T
        return {"roc_auc": auc, "pr_auc": precision}

    return resampled


def bootstrap(measures: Sequence[Measures], n_queries: int, n_boot: int, seed: int) -> list[dict[str, Array]]:
    """For each of `measures`, its values (n_boot,) by name; all see the same resamples."""
    blocks = [[measure.resampled(counts) for measure in measures] for counts in _counts(n_queries, n_boot, seed)]
    return [
        {name: np.concatenate([block[i][name] for block in blocks]) for name in measure.values}
        for i, measure in enumerate(measures)
    ]


def limits_of(measure: Measures, name: str, draws: Array, n_queries: int) -> tuple[float | None, float | None]:
    """The 95 % interval of one of `measure` from what `bootstrap` gives for it; the value of a sum always lies inside."""
    if draws.ndim == 1:
        return limits(draws, n_queries)
    terms = measure.resampled(np.ones((1, n_queries)))[name][0]
    low, high = absolute_sum_limits(terms, draws, n_queries)
    # The noise in the value can leave the truth below it.
    return low, None if high is None else max(high, measure.values[name])


def limits(draws: Array, n_queries: int) -> tuple[float | None, float | None]:
    """The 95 % interval from draws (B,): expanded percentiles (Hesterberg 2015, arXiv 1411.5279, section 5.3).

    Plain percentiles are too narrow for few queries; these are those of Student's t. None when most resamples left the
    measure undefined, and for one query, which can only be drawn again.
    """
    defined = draws[np.isfinite(draws)]
    if n_queries < 2 or 2 * len(defined) <= len(draws):
        return None, None
    tail = _tail(n_queries)
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def absolute_sum_limits(terms: Array, draws: Array, n_queries: int) -> tuple[float | None, float | None]:
    """The 95 % interval of a sum of absolute values Σ|μ_f|, such as ECE, from its terms (F,) and draws of them (B, F).

    Noise in the terms can only add to such a sum: on a sample it is too large, on a resample twice so, and percentiles can
    miss the truth altogether. Here the limits are the multiples c·Σ|terms| from which noise would lead to this sum with
    probability 2.5 %: quantiles of Σ|c · terms + (draw − terms)| in c. None for one query.
    """
    if n_queries < 2:
        return None, None
    total, noise, tail = float(np.abs(terms).sum()), draws - terms, _tail(n_queries)

    def excess(c: float, share: float) -> float:
        return float(np.quantile(np.abs(c * terms + noise).sum(axis=1), share)) - total

    def multiple(share: float) -> float:
        high = 1.0
        if total == 0 or excess(0.0, share) >= 0:
            return 0.0
        while excess(high, share) < 0:
            high *= 2
        return float(brentq(excess, 0.0, high, args=(share,), xtol=1e-6))

    return multiple(1 - tail) * total, multiple(tail) * total


def _tail(n: int) -> float:
    """Share of the draws outside each limit, for n queries: Φ(−√(n/(n−1)) · t), t the 97.5 % quantile of Student's t."""
    return float(norm.cdf(np.sqrt(n / (n - 1)) * student_t.ppf(0.025, n - 1)))


def _counts(n_queries: int, n_boot: int, seed: int) -> Iterator[Array]:
    """Blocks (B, Q) of how often each query was drawn."""
    rng = np.random.default_rng(seed)
    block = max(1, _BUDGET // n_queries)
    for start in range(0, n_boot, block):
        drawn = [rng.integers(n_queries, size=n_queries) for _ in range(min(block, n_boot - start))]
        yield np.stack([np.bincount(row, minlength=n_queries) for row in drawn]).astype(float)
