"""Temperature, offsets of the grades, and decision threshold, all fitted on split valid and on nothing else."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from sklearn.metrics import precision_recall_curve

from student.scorer import softmax

Array = np.ndarray


def fit_calibration(logits: Array, grade: Array, *, offsets: bool = True) -> tuple[float, Array]:
    """T in [0.05, 20] and offsets b (K,) that minimise the negative log-likelihood of grades (N,) under
    softmax(logits (N, K) / T + b).

    Bias-corrected temperature scaling (Alexandari et al., arXiv 1901.06852; T alone: Guo et al., arXiv 1706.04599). T says
    how sure the model is; b sets right how often it says each grade, which a teacher's grades or ratings between two grades
    teach otherwise than the human grades here. b has a standard normal prior, so that a grade that valid lacks, or a valid
    of a few rows, does not take it to infinity; without `offsets` it is 0.
    """
    n, k = logits.shape
    rows, truth = np.arange(n), np.eye(k)[grade]

    def nll(x: Array) -> tuple[float, Array]:
        rate, b = np.exp(-x[0]), x[1:] if offsets else np.zeros(k)
        p = softmax(logits * rate + b)
        error = (p - truth) / n
        value = -np.log(np.maximum(p[rows, grade], 1e-300)).mean() + b @ b / (2 * n)
        slope = np.r_[-(error * logits).sum() * rate, error.sum(axis=0) + b / n if offsets else ()]
        return float(value), slope

    bounds = [(np.log(0.05), np.log(20.0))] + [(None, None)] * (k if offsets else 0)
    x = minimize(nll, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=bounds, options={"gtol": 1e-9}).x
    return float(np.exp(x[0])), x[1:] if offsets else np.zeros(k)


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
