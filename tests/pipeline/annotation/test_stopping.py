"""When a pair has enough samples."""

from itertools import product

import pytest

from pipeline.annotation.stopping import further_samples
from teacher.reading import Sample, aggregate


def more(votes, confidence=0.85, n_max=8, probs=None):
    """Further samples after these votes (None is unparsed)."""
    samples = [Sample(vote, probs if vote is not None else None, "why") for vote in votes]
    return further_samples(aggregate(samples, 4), len(samples), n_max, confidence)


@pytest.mark.parametrize(
    ("votes", "confidence", "expected"),
    [
        ([2, 2], 0.85, 0),  # 1 − ½³ = 0.875
        ([2, 2], 0.9, 1),  # 1 − ½⁴ = 0.9375 after a third
        ([2, 2], 0.95, 2),  # 1 − ½⁵ = 0.969 after a fourth
        ([2, 1], 0.85, 3),  # Beta(5, 2): 0.891; Beta(4, 2): 0.8125
        ([2, 2, 1, 2, 2], 0.85, 0),
        ([2, 1, 3, 0], 0.85, 3),  # the runner-up has one vote, whoever it is
        ([2, 2, 1, 1, 0], 0.85, 3),  # nothing decides it any more: all that is left
        ([None, None], 0.85, 2),
        ([2, None], 0.85, 1),
        ([2, 1, 2, 1, 2, 1, 2, 1], 0.85, 0),
    ],
)
def test_as_many_as_must_agree_before_the_grade_can_be_decided(votes, confidence, expected):
    assert more(votes, confidence) == expected


def test_hesitant_votes_decide_less_than_firm_ones():
    assert more([2, 2], probs=[0.0, 0.0, 1.0, 0.0]) == 0
    assert more([2, 2], probs=[0.0, 0.3, 0.7, 0.0]) == 2


def test_drawing_together_takes_the_same_samples_as_one_by_one():
    for votes in product((0, 1, 2), repeat=6):
        taken = 2
        while step := more(votes[:taken], 0.9, n_max=6):
            # Each next sample alone would not have decided the grade earlier.
            assert all(more(votes[:part], 0.9, n_max=6) for part in range(taken, taken + step))
            taken += step
        assert taken <= 6
