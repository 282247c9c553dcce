"""Which pairs of a pool to annotate first. Every strategy orders all N pairs and gives the first `count` of them, with a
reason for each, so that with one seed the choice for a small budget is the beginning of that for a larger one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Array = np.ndarray
CLUSTERS = 500  # at most, and at most one for ten pairs


class Selection(NamedTuple):
    """Row numbers (count,) of the chosen pairs, the first choice first, and the reason for each."""

    rows: Array
    why: list[str]


def random(size: int, count: int, rng: np.random.Generator) -> Selection:
    """Any of `size` pairs."""
    rows = rng.permutation(size)[:count]
    return Selection(rows, ["random"] * len(rows))


def uncertain(probs: Array, count: int, rng: np.random.Generator) -> Selection:
    """Those first whose two likeliest grades differ least in probability (margin sampling: Scheffer, Decomain and Wrobel
    2001); `probs` (N, K) are a student's."""
    margin = np.diff(np.sort(probs, axis=1)[:, -2:], axis=1)[:, 0]
    rows = np.lexsort((rng.random(len(margin)), margin))[:count]
    return Selection(rows, [f"margin {value:.3f}" for value in margin[rows]])


def diverse(vectors: Array, count: int, rng: np.random.Generator) -> Selection:
    """Equally many from each cluster of the encoder's vectors (N, D), by k-means."""
    from sklearn.cluster import MiniBatchKMeans

    seed = int(rng.integers(2**31))
    means = MiniBatchKMeans(min(CLUSTERS, -(-len(vectors) // 10)), n_init=1, batch_size=4096, random_state=seed)
    return by_stratum(np.array([f"cluster {i}" for i in means.fit_predict(vectors)]), count, rng)


def by_stratum(stratum: Array, count: int, rng: np.random.Generator) -> Selection:
    """Equally many from each stratum, as far as it goes; `stratum` (N,) are the strata's names."""
    _, number = np.unique(stratum, return_inverse=True)
    shuffled = rng.permutation(len(number))
    grouped = shuffled[np.argsort(number[shuffled], kind="stable")]
    sizes = np.bincount(number)
    turn = np.arange(len(number)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = grouped[np.lexsort((rng.random(len(number)), turn))][:count]
    return Selection(rows, stratum[rows].tolist())


def mixture(selections: Mapping[str, Selection], shares: Mapping[str, float], count: int) -> Selection:
    """Pairs of several selections, of each its share; a pair that several chose counts for the first of them to come to it.

    Each of the selections has `count` pairs, or all that there are.
    """
    chosen: dict[int, str] = {}
    given = dict.fromkeys(shares, 0)
    left = {name: zip(selections[name].rows.tolist(), selections[name].why, strict=True) for name in shares}
    while left and len(chosen) < count:
        name = max(left, key=lambda each: shares[each] * (len(chosen) + 1) - given[each])
        row, why = next(((row, why) for row, why in left[name] if row not in chosen), (None, ""))
        if row is None:
            del left[name]
            continue
        chosen[row] = f"{name}: {why}" if why != name else name
        given[name] += 1
    return Selection(np.array(list(chosen), dtype=np.int64), list(chosen.values()))
