"""Soft labels of two annotators together: the teacher, and a student that has learned the human labels alone.

What the two get wrong differs: a teacher knows what words mean, a warmed-up student what the pool looks like. Their
geometric mean (a logarithmic opinion pool; Heskes, NIPS 1997) is better than either, and a student can learn it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from student.scorer import softmax

Array = np.ndarray
MIN_ROWS = 50  # below it both count alike
_FLOOR = 1e-4
_WEIGHTS = np.linspace(0, 1, 21)


def pooled(teacher: Array, student: Array, weight: float) -> Array:
    """The distributions (N, K) proportional to teacher^weight · student^(1 − weight), for teacher and student (N, K)."""
    logs = [np.log(np.maximum(probs, _FLOOR)) for probs in (teacher, student)]
    return softmax(weight * logs[0] + (1 - weight) * logs[1])


def choose_weight(teacher: Array, student: Array, grade: Array) -> dict[str, Any]:
    """The teacher's `weight` in 0, 0.05 … 1 whose pool gives human grades (N,) the least log loss; 0.5 below `MIN_ROWS`.

    Also the number of `rows` and the `log_loss` of the pool, the teacher and the student on them, none without rows.
    """
    at = np.arange(len(grade))
    losses = [-np.log(pooled(teacher, student, weight)[at, grade]).mean() for weight in _WEIGHTS] if len(grade) else []
    best = int(np.argmin(losses)) if len(grade) >= MIN_ROWS else len(_WEIGHTS) // 2
    names = {"pool": best, "teacher": -1, "student": 0}
    log_loss = {name: float(losses[place]) for name, place in names.items()} if losses else {}
    return {"weight": float(_WEIGHTS[best]), "rows": len(grade), "log_loss": log_loss}
