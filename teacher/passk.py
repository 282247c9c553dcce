"""pass@k and majority@k from n samples a prompt."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> NDArray[np.float64]:
    """Unbiased estimate of the chance that at least one of k samples is right: 1 − C(n−c, k) / C(n, k).

    Resampling with replacement would underestimate it. Source: arXiv 2107.03374.

    Args:
        n: samples drawn for each prompt; any shape.
        c: how many of them are right; broadcasts with n.
        k: 1 ≤ k ≤ every n.

    Returns:
        Values in [0, 1], in the broadcast shape of n and c.

    Raises:
        ValueError: k or c out of range.
    """
    total, right = np.broadcast_arrays(np.asarray(n, dtype=np.int64), np.asarray(c, dtype=np.int64))
    if k < 1 or bool((total < k).any()):
        raise ValueError(f"pass@k needs 1 <= k <= n, got k = {k} and n as small as {total.min()}")
    if bool(((right < 0) | (right > total)).any()):
        raise ValueError("pass@k needs 0 <= c <= n")
    # C(n−c, k) / C(n, k) as a product of k ratios in [0, 1]: no factorial that could overflow, and 0 once n−c < k.
    steps = np.arange(k)
    ratios = np.clip((total - right)[..., None] - steps, 0, None) / (total[..., None] - steps)
    return 1.0 - ratios.prod(axis=-1)


def majority_at_k(votes: NDArray[np.int64], gold: NDArray[np.int64], k: int) -> float:
    """Share of prompts whose most frequent vote among the first k is right; ties go to the lower grade.

    Args:
        votes: (prompts, n) grades; −1 stands for an unparsed completion and is no vote.
        gold: (prompts,) human grades.
        k: votes used, 1 ≤ k ≤ n.
    """
    if not 1 <= k <= votes.shape[1]:
        raise ValueError(f"majority@k needs 1 <= k <= {votes.shape[1]}, got {k}")
    used = votes[:, :k]
    grades = np.arange(max(int(used.max(initial=0)), int(gold.max(initial=0))) + 1)
    counts = (used[:, :, None] == grades).sum(axis=1)
    winner = np.where(counts.sum(axis=1) > 0, counts.argmax(axis=1), -1)
    return float((winner == gold).mean())
