from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student.ratings import rating_targets


def test_a_rating_between_two_grades_is_shared_by_its_distance_from_their_places():
    # Ratings from 1 to 3 as means of raters: up to 1.67 grade 0, below 2.33 grade 1, else grade 2. Grade 1's mean is 2.
    rating = np.array([1.0, 1.5, 1.9, 2.1, 2.25, 2.5, 3.0, np.nan, 7.0])
    grade = np.array([0, 0, 1, 1, 2, 2, 2, 2, -1])
    target = rating_targets(grade, rating, 3)
    high = 3.0 - 0.1 * (3.0 - 2.5)  # the 95th percentile of 2.25, 2.5, 3
    low = 1.0 + 0.05 * 0.5  # the 5th of 1, 1.5
    assert target[0].tolist() == [1, 0, 0]
    assert target[1] == pytest.approx([(2 - 1.5) / (2 - low), (1.5 - low) / (2 - low), 0])
    assert target[3] == pytest.approx([0, 1 - 0.1 / (high - 2), 0.1 / (high - 2)])
    assert target[5] == pytest.approx([0, 1 - 0.5 / (high - 2), 0.5 / (high - 2)])
    assert target[6].tolist() == [0, 0, 1]
    assert target[7].tolist() == [0, 0, 1]  # no rating: its grade
    assert target[8].tolist() == [0, 0, 0]  # no grade: nothing


def test_one_rating_for_each_grade_teaches_the_grade():
    grade = np.array([0, 1, 2, 3, 0, 3])
    gains = np.array([0.0, 0.01, 0.1, 1.0])[grade]
    assert (rating_targets(grade, gains, 4) == np.eye(4)[grade]).all()


def test_ratings_against_the_grades_are_not_learned_from(caplog):
    grade = np.array([0, 0, 1, 1])
    target = rating_targets(grade, np.array([3.0, 2.5, 1.5, 1.0]), 2)
    assert (target == np.eye(2)[grade]).all()
    assert "do not rise" in caplog.text


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 2**31))
def test_rows_are_distributions_that_rise_with_the_rating(n, size, seed):
    rng = np.random.default_rng(seed)
    rating = rng.uniform(0, 10, n).round(1)
    grade = np.minimum((rating / 10 * size).astype(np.int64), size - 1)
    rating[rng.random(n) < 0.1] = np.nan
    target = rating_targets(grade, rating, size)
    assert target.min() >= 0
    assert target.sum(axis=1) == pytest.approx(np.ones(n))
    order = np.argsort(rating)[: int(np.isfinite(rating).sum())]
    assert (np.diff((target @ np.arange(size))[order]) >= -1e-9).all()
