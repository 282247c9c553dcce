"""Temperature, offsets, isotonic curves of the grades, and decision threshold, fitted on split valid and nothing else."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import log_loss, precision_recall_curve
from sklearn.model_selection import GroupKFold

from student.scorer import probabilities, softmax

Array = np.ndarray
Curves = list[list[list[float]]]
"""For each grade the probabilities before and after, as `student.scorer.probabilities` takes them."""
FOLDS = 5
STEP = 0.02
"""Curves bend at multiples of this only: a cliff would make a visible difference of the last digits of a logit."""


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


def fit_isotonic(probs: Array, grade: Array) -> Curves:
    """Isotonic curves that take each grade's probability in probs (N, K) to how often grades (N,) are it.

    One grade against the rest, normalised afterwards (Zadrozny and Elkan, KDD 2002). No curve reaches 0 or 1: the rows are
    too few to say "never".
    """
    limit = 1 / (len(grade) + 2)
    curves = []
    for k in range(probs.shape[1]):
        rounded = np.round(probs[:, k] / STEP) * STEP
        fitted = IsotonicRegression(y_min=limit, y_max=1 - limit).fit(rounded, grade == k)
        curves.append([fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist()])
    return curves


def isotonic_losses(logits: Array, grade: Array, query_id: Array, *, offsets: bool = True) -> tuple[float, float]:
    """Cross-validated log loss of `fit_calibration` alone, and with `fit_isotonic` on top; folds do not share a query.

    NaN for both with fewer than two queries.
    """
    folds = min(FOLDS, len(np.unique(query_id)))
    if folds < 2:
        return float("nan"), float("nan")
    before, after = np.zeros_like(logits), np.zeros_like(logits)
    for rows, held_out in GroupKFold(folds).split(logits, grade, query_id):
        temperature, b = fit_calibration(logits[rows], grade[rows], offsets=offsets)
        scaled = softmax(logits / temperature + b)
        before[held_out] = scaled[held_out]
        after[held_out] = probabilities(np.log(scaled[held_out]), curves=fit_isotonic(scaled[rows], grade[rows]))
    labels = range(logits.shape[1])
    return float(log_loss(grade, before, labels=labels)), float(log_loss(grade, after, labels=labels))


def one_class(relevant: Array, split: str) -> str:
    """What labels (N,) of one class in `split` leave open; empty when they are of both."""
    if 0 < relevant.sum() < len(relevant):
        return ""
    kind, other = ("relevant", "irrelevant") if relevant.all() else ("irrelevant", "relevant")
    open_ = "the decision threshold is 0.5, chosen by no label" if split == "valid" else "there is no ROC-AUC"
    return f"all {len(relevant)} human grades of split '{split}' are {kind}, so {open_}; label some {other} pairs too"


def best_f1_threshold(relevant: Array, score: Array) -> float:
    """The threshold t for which `score >= t` has the best F1 against 0/1 outcomes; scores and outcomes (N,).

    It lies half-way between two neighbouring scores, so that rounding does not flip a row.

    Outcomes of one class, or none at all, say nothing of where to cut: with all relevant the best F1 is that of a threshold
    which lets everything pass, and with none F1 is 0 whatever it is. The threshold is then 0.5, which is right for
    calibrated probabilities, or the middle of the scores where these are none.
    """
    if not 0 < relevant.sum() < len(relevant):
        within = not len(score) or (score.min() >= 0 and score.max() <= 1)
        return 0.5 if within else float((score.min() + score.max()) / 2)
    precision, recall, thresholds = precision_recall_curve(relevant, score)
    total = precision[:-1] + recall[:-1]
    f1 = np.where(total > 0, 2 * precision[:-1] * recall[:-1] / np.maximum(total, 1e-12), 0.0)
    at = thresholds[int(f1.argmax())]
    below = score[score < at]
    return float((at + below.max()) / 2) if len(below) else float(at)
