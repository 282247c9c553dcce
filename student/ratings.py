"""What a human rating that lies between two grades teaches."""

from __future__ import annotations

import logging

import numpy as np

logger = logging.getLogger(__name__)
Array = np.ndarray

# Share of the lowest (highest) grade's ratings below (above) which a rating is wholly that grade: one slip of the pen
# must not stretch the scale.
_TAIL = 0.05


def rating_targets(grade: Array, rating: Array, size: int) -> Array:
    """Distributions (N, size) over the grades, rows sum to 1; 0 in the rows of grade −1.

    Each grade has a place on the scale of ratings: the mean rating of its rows, and the ends of the scale for the lowest
    and the highest grade that occur. A rating between two places is shared between their grades in proportion to its
    distance from each, as if raters had voted for the one and the other. A row without a rating, and every row where ratings
    do not rise from grade to grade, has all its weight on its grade; so has every row where a grade has one rating only.

    Parameters: grade int64 (N,), −1 where unknown; rating (N,) the source's own rating, NaN where there is none.
    """
    known = grade >= 0
    target = np.zeros((len(grade), size))
    target[known, grade[known]] = 1.0
    rated = known & np.isfinite(rating)
    present = np.unique(grade[rated])
    if len(present) < 2:
        return target
    of_grade = [rating[rated & (grade == g)] for g in present]
    places = np.array([ratings.mean() for ratings in of_grade])
    places[0], places[-1] = np.quantile(of_grade[0], _TAIL), np.quantile(of_grade[-1], 1 - _TAIL)
    if (np.diff(places) <= 0).any():
        logger.warning("student: the ratings do not rise from grade to grade; only the grades are learned from")
        return target
    place = np.interp(rating[rated], places, np.arange(len(present)))
    below = np.minimum(place.astype(np.int64), len(present) - 2)
    share, rows = place - below, np.flatnonzero(rated)
    target[rows] = 0.0
    target[rows, present[below]] = 1 - share
    target[rows, present[below + 1]] = share
    return target
