"""What a stratified sample of answers says of all annotations: their accuracy with its interval, and raters' agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import NormalDist

import numpy as np
from pydantic import BaseModel
from sklearn.metrics import cohen_kappa_score

_PRIOR = 2.0
"""Pairs of average accuracy that a stratum's variance is estimated with, so that a few equal answers do not say 0."""


class Accuracy(BaseModel):
    """The share of a population that has the grade people give, with its interval; None where nothing is answered."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Answered pairs."""
    covered: float
    """Share of the population whose strata have an answer; the value is of these."""


class Agreement(BaseModel):
    """Two who graded the same pairs: the share of equal grades, and Cohen's kappa with equal and with quadratic weights.

    A kappa is None where it is not defined: both gave one grade only.
    """

    a: str
    b: str
    n: int
    same: float
    kappa: float | None
    quadratic_kappa: float | None


def accuracy(populations: Mapping[str, int], answers: Mapping[str, Sequence[float]], level: float = 0.95) -> Accuracy:
    """The stratified estimate Σ W_h ȳ_h, unbiased where each stratum's answers are a simple random sample of it.

    Its interval is Wilson's (1927) with the effective sample size p(1 − p) / V, as for complex surveys (Korn and Graubard
    1998): V = Σ W_h² (1 − f_h) s_h² / n_h, with s_h² of the stratum's share, drawn towards the whole by two pairs.

    Parameters: populations, pairs of each stratum; answers of each stratum, from 0 (wrong) to 1 (right).
    """
    sampled = [name for name in populations if answers.get(name)]
    total, covered = sum(populations.values()), sum(populations[name] for name in sampled)
    n = sum(len(answers[name]) for name in sampled)
    if not n:
        return Accuracy(value=None, low=None, high=None, n=0, covered=0.0)
    weight = np.array([populations[name] / covered for name in sampled])
    size = np.array([len(answers[name]) for name in sampled])
    mean = np.array([np.mean(answers[name]) for name in sampled])
    value = float(weight @ mean)
    middle = (n * value + 1) / (n + 2)  # never 0 or 1
    share = (size * mean + _PRIOR * middle) / (size + _PRIOR)
    left = 1 - size / np.array([populations[name] for name in sampled])
    variance = float((weight**2 * left * share * (1 - share) / size).sum())
    spread = float(weight @ share) * (1 - float(weight @ share))
    low, high = wilson(value, spread / variance, level) if variance > 0 else (value, value)
    return Accuracy(value=value, low=low, high=high, n=n, covered=covered / total)


def wilson(share: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """The limits of Wilson's score interval for a share of `n` (also not whole) independent pairs."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def agreements(grades: Mapping[str, Mapping[str, int]], weights: Mapping[str, float], size: int) -> list[Agreement]:
    """The agreement of every two who graded a pair both; the first of `grades` is compared with the others first.

    Parameters: grades, by name and then by pair; weights of pairs (1 where not given), the inverse of the probability that
    it was drawn with, so that the agreement is that over the population; size K of the scale.
    """
    found = []
    for a, b in combinations(grades, 2):
        pairs = sorted(grades[a].keys() & grades[b].keys())
        if pairs:
            first, second = ([grades[name][pair] for pair in pairs] for name in (a, b))
            weight = [weights.get(pair, 1.0) for pair in pairs]
            found.append(_agreement(a, b, first, second, weight, size))
    return found


def _agreement(a: str, b: str, first: list[int], second: list[int], weight: list[float], size: int) -> Agreement:
    def kappa(kind: str | None) -> float | None:
        if len({*first, *second}) < 2:  # chance alone would give all of them
            return None
        return float(cohen_kappa_score(first, second, labels=range(size), weights=kind, sample_weight=weight))

    same = float(np.average(np.equal(first, second), weights=weight))
    return Agreement(a=a, b=b, n=len(first), same=same, kappa=kappa(None), quadratic_kappa=kappa("quadratic"))


def allocation(
    populations: Mapping[str, int], spread: Mapping[str, float], size: int, least: int = 8
) -> dict[str, int]:
    """How many of `size` pairs each stratum gives: in proportion to its pairs times their spread (Neyman 1934), rounded by
    D'Hondt's rule, but `least` at least, or all it has; so they may be more than `size` in all.
    """
    drawn = {name: min(populations[name], least) for name in populations}
    for _ in range(min(size, sum(populations.values())) - sum(drawn.values())):
        open_strata = [name for name in populations if drawn[name] < populations[name]]
        drawn[max(open_strata, key=lambda name: populations[name] * spread[name] / (drawn[name] + 1))] += 1
    return drawn
