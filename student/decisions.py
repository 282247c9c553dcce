"""Decisions that a business takes: drop what is irrelevant with 95 % precision, keep what brings 90 % of the relevant ads.

Thresholds are chosen on split valid and measured on split test. An event belongs to each grade: this grade or worse where
the grade does not count as relevant, else this grade or better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.isotonic import IsotonicRegression

from data.contracts import ContractError, GradeScale
from student.metrics import Interval, Labels, intervals
from student.resampling import summed, sums_by_query
from student.scorer import decision_threshold, event_score, parse_decision

Array = np.ndarray
MIN_CAUGHT = 10
"""Pairs of split valid that a threshold catches at least: of fewer, no precision can be told."""
MAX_POINTS = 200
SHARES = tuple(share / 10 for share in range(1, 11))
"""Shares of the traffic kept for which the rate of bad ads is measured."""


def check_decisions(decisions: Sequence[str], scale: GradeScale) -> GradeScale:
    """The scale; raises `ContractError` when one of `decisions` cannot be read, see `parse_decision`."""
    for text in decisions:
        try:
            parse_decision(text, scale.model_dump(mode="json"))
        except ValueError as error:
            raise ContractError(f"student.decisions: {error}") from None
    return scale


def in_event(grades: Array, grade: int, relevant_from: int) -> Array:
    """Whether human grades (N,) belong to a grade's event, bool (N,); `event_score` is the probability of it."""
    return grades >= grade if grade >= relevant_from else grades <= grade


def operating_curves(grade: Array, probs: Array, relevant_from: int) -> list[dict[str, list[float]]]:
    """For each grade's event, thresholds of its probability, falling, with the precision and recall at each; empty lists
    where no threshold is possible.

    Parameters: grades (N,) and calibrated probabilities (N, K) of split valid. Precision is that of the isotonic fit to the
    events, which is the convex hull of the ROC curve: as measured, it rises and falls by luck, and the best of many
    thresholds would promise too much.
    """
    curves: list[dict[str, list[float]]] = []
    for k in range(probs.shape[1]):
        event = in_event(grade, k, relevant_from)
        score = event_score(probs, k, relevant_from)
        order = np.argsort(-score, kind="stable")
        hits = np.cumsum(IsotonicRegression().fit_transform(score, event)[order])
        caught = np.arange(1, len(order) + 1)
        lowest = np.flatnonzero(np.r_[score[order][1:] < score[order][:-1], True] & (caught >= MIN_CAUGHT))
        if not event.any() or not len(lowest):
            curves.append({"threshold": [], "precision": [], "recall": []})
            continue
        lowest = lowest[np.unique(np.linspace(0, len(lowest) - 1, MAX_POINTS).round().astype(int))]
        # Half-way to the next score, so that rounding does not move a pair.
        below = np.r_[score[order], 0.0][lowest + 1]
        points = {
            "threshold": (score[order][lowest] + below) / 2,
            "precision": hits[lowest] / caught[lowest],
            "recall": hits[lowest] / event.sum(),
        }
        curves.append({name: values.tolist() for name, values in points.items()})
    return curves


def measure_decisions(
    decisions: Sequence[str], scale: GradeScale, curves: list[dict[str, list[float]]], labels: Labels, probs: Array
) -> list[dict[str, Any]]:
    """What each of `decisions` does to these rows, whose labels had no part in its threshold.

    Keys: `decision`, the `grade` of its event and whether `or_better`, `threshold`, and the intervals of `precision`,
    `recall` and `caught`, the share of all pairs; of a decision that cannot be taken `fault` says why.
    """
    rows: list[dict[str, Any]] = []
    measures, sizes, grades = [], [], scale.model_dump(mode="json")
    for text in decisions:
        grade, _, _ = parse_decision(text, grades)
        rows.append({"decision": text, "grade": grade, "or_better": grade >= scale.relevant_from})
        rows[-1] |= {"threshold": None, "fault": None}
        try:
            rows[-1]["threshold"] = decision_threshold(text, grades, curves)
        except ValueError as error:
            rows[-1]["fault"] = str(error)
            continue
        caught = event_score(probs, grade, scale.relevant_from) >= rows[-1]["threshold"]
        event = in_event(labels.grade, grade, scale.relevant_from)
        columns = sums_by_query([caught & event, caught, event, np.ones(len(caught))], labels.query)
        measures.append(summed(columns, _decided))
        sizes.append({"precision": columns[:, 1], "recall": columns[:, 2]})
    measured = iter(zip(intervals(labels, measures), sizes, strict=True))
    for row in rows:
        if row["threshold"] is not None:
            shares, size = next(measured)
            row |= {name: _widened(value, size.get(name)).model_dump() for name, value in shares.items()}
    return rows


def bad_ad_rates(labels: Labels, probs: Array) -> list[dict[str, Any]]:
    """The share of bad ads among those kept, for each of `SHARES` of the rows kept, best first.

    Keys: the share `kept` (more than asked where scores are equal), its `threshold` of p(relevant), and `rates`, for each
    grade that does not count as relevant the interval of the rate of ads of this grade or worse.
    """
    score = event_score(probs, labels.relevant_from, labels.relevant_from)
    ranked = -np.sort(-score)
    rows: list[dict[str, Any]] = []
    measures, sizes = [], []
    for share in SHARES:
        threshold = float(ranked[max(1, round(share * len(score))) - 1])
        kept = score >= threshold
        worse = [kept & (labels.grade <= k) for k in range(labels.relevant_from)]
        columns = sums_by_query([kept, *worse], labels.query)
        measures.append(summed(columns, _rates))
        sizes.append(columns[:, 0])
        rows.append({"kept": float(kept.mean()), "threshold": threshold})
    for row, rates, size in zip(rows, intervals(labels, measures), sizes, strict=True):
        row["rates"] = [_widened(value, size).model_dump() for value in rates.values()]
    return rows


def _decided(sums: Array) -> dict[str, Array]:
    hit, caught, event, n = sums.T
    return {
        "precision": np.where(caught > 0, hit / np.maximum(caught, 1.0), np.nan),
        "recall": np.where(event > 0, hit / np.maximum(event, 1.0), np.nan),
        "caught": caught / n,
    }


def _rates(sums: Array) -> dict[str, Array]:
    rates = sums[:, 1:] / np.maximum(sums[:, :1], 1.0)
    return {str(k): np.where(sums[:, 0] > 0, rate, np.nan) for k, rate in enumerate(rates.T)}


def _widened(interval: Interval, size: Array | None) -> Interval:
    """An interval that says more than "always": where no row of a share is otherwise, all resamples are alike.

    Then it is the exact binomial one (Clopper and Pearson 1934) of as many trials as queries have rows; `size` (Q,) has the
    rows of each query that the share is of.
    """
    if size is None or interval.low is None or interval.value not in (0.0, 1.0):
        return interval
    trials = int((size > 0).sum())
    exact = binomtest(round(interval.value * trials), trials).proportion_ci(0.95)
    return Interval(value=interval.value, low=float(exact.low), high=float(exact.high))
