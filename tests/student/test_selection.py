"""Which pairs are annotated first."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from student import selection

SIZE = 400
RNG = np.random.default_rng(0)
P = RNG.uniform(0.5, 1, SIZE)
PROBS = np.stack([P, 1 - P, np.zeros(SIZE)], axis=1)
RARE = np.arange(SIZE) % 4 == 0  # three quarters of the pairs are nearly the same
VECTORS = RNG.normal(0, np.where(RARE, 1, 0.01)[:, None], (SIZE, 20))


def choose(strategy: str, count: int, seed: int = 0) -> selection.Selection:
    rng = np.random.default_rng(seed)
    match strategy:
        case "random":
            return selection.random(SIZE, count, rng)
        case "uncertain":
            return selection.uncertain(PROBS, count, rng)
        case "diverse":
            return selection.diverse(VECTORS, count, rng)
        case "by_stratum":
            return selection.by_stratum(np.where(RARE, "tail", "head"), count, rng)
    parts = {name: choose(name, count, seed) for name in ("uncertain", "random")}
    return selection.mixture(parts, {"uncertain": 0.75, "random": 0.25}, count)


@pytest.mark.parametrize("strategy", ["random", "uncertain", "diverse", "by_stratum", "mixture"])
def test_a_small_budget_is_the_beginning_of_a_large_one(strategy: str) -> None:
    everything = choose(strategy, SIZE)
    assert sorted(everything.rows) == list(range(SIZE))
    for count in (1, 50, 300):
        rows, why = choose(strategy, count)
        assert rows.tolist() == everything.rows[:count].tolist()
        assert why == everything.why[:count]
        assert all(why)


def test_uncertain_pairs_are_those_between_two_grades() -> None:
    assert set(choose("uncertain", 40).rows) == set(np.argsort(P)[:40])


def test_rare_topics_and_strata_get_more_than_their_share() -> None:
    assert RARE[choose("diverse", 60).rows].mean() > 2 * RARE.mean()
    assert Counter(choose("by_stratum", 60).why) == {"head": 30, "tail": 30}


def test_a_mixture_has_the_shares_and_no_pair_twice() -> None:
    rows, why = choose("mixture", 100)
    assert len(set(rows)) == 100
    assert Counter(each.split(":")[0] for each in why) == {"uncertain": 75, "random": 25}
