"""pass@k against exact combinatorics, majority@k by hand."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from teacher.passk import majority_at_k, pass_at_k


def exact(n, c, k):
    return float(1 - Fraction(comb(n - c, k), comb(n, k)))


def test_equals_the_exact_value_for_all_small_n():
    for n in range(1, 65):
        c = np.arange(n + 1)
        for k in range(1, n + 1):
            expected = [exact(n, int(right), k) for right in c]
            assert np.abs(pass_at_k(n, c, k) - expected).max() <= 1e-12


@pytest.mark.parametrize("k", [1, 2, 64, 256, 1023, 1024])
@pytest.mark.parametrize("c", [0, 1, 5, 500, 1024])
def test_is_right_for_large_n(c, k):
    assert float(pass_at_k(1024, c, k)) == pytest.approx(exact(1024, c, k), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_values_out_of_range_are_refused(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def test_majority_counts_votes_and_breaks_ties_downwards():
    votes = np.array([[1, 1, 2, 3], [2, 1, -1, -1], [-1, -1, -1, -1], [3, 0, 3, 0]])
    gold = np.array([1, 1, 0, 0])
    # 1 wins; a tie of 1 and 2 goes to 1; nothing parsed is wrong; a tie of 0 and 3 goes to 0.
    assert majority_at_k(votes, gold, 4) == 0.75
    # The first vote alone: 1 right, 2 wrong, unparsed wrong, 3 wrong.
    assert majority_at_k(votes, gold, 1) == 0.25
    with pytest.raises(ValueError, match="majority@k"):
        majority_at_k(votes, gold, 5)
