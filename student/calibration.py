"""Temperature and decision threshold, both fitted on split valid and on nothing else."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.metrics import precision_recall_curve

from student.serve import softmax

Array = np.ndarray


def fit_temperature(logits: Array, grade: Array) -> float:
    """The T in [0.05, 20] that minimises the negative log-likelihood of grades (N,) under softmax(logits (N, K) / T).

    Temperature scaling (Guo et al., arXiv 1706.04599): it changes no ranking of grades, only how sure the model is.
    """

    def nll(log_t: float) -> float:
        p = softmax(logits, float(np.exp(log_t)))[np.arange(len(grade)), grade]
        return float(-np.log(np.maximum(p, 1e-300)).mean())

    found = minimize_scalar(nll, bounds=(np.log(0.05), np.log(20.0)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def best_f1_threshold(relevant: Array, score: Array) -> float:
    """The threshold t for which `score >= t` has the best F1 against 0/1 outcomes; scores and outcomes (N,).

    It lies half-way between two neighbouring scores, so that rounding does not flip a row. With one class only, the
    choice is free and the threshold is 0.5 for probabilities (the middle of the scores in general).
    """
    if not 0 < relevant.sum() < len(relevant):
        return 0.5 if score.min() >= 0 and score.max() <= 1 else float((score.min() + score.max()) / 2)
    precision, recall, thresholds = precision_recall_curve(relevant, score)
    total = precision[:-1] + recall[:-1]
    f1 = np.where(total > 0, 2 * precision[:-1] * recall[:-1] / np.maximum(total, 1e-12), 0.0)
    at = thresholds[int(f1.argmax())]
    below = score[score < at]
    return float((at + below.max()) / 2) if len(below) else float(at)
