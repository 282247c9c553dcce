"""When a pair has enough samples: the sequential rule of adaptive annotation.

Adaptive-Consistency (arXiv 2305.11860) with its Beta criterion: v₁ votes for the leading grade and v₂ for the runner-up give
the leader's share among these two, under a uniform prior, the posterior Beta(v₁ + 1, v₂ + 1), and sampling stops as soon as
P(share > ½) reaches `confidence`. Two things differ from the paper. A vote is soft: a sample counts for each grade with the
model's own probability of it at the answer (`grade_probs`), so that two hesitant votes decide less than two firm ones. And
the next samples are drawn together, as many as must agree before the pair can be decided: nothing is drawn that drawing one
by one would have spared, and a pair comes back to the engine fewer times.
"""

from __future__ import annotations

from scipy.special import betainc

from teacher.reading import Aggregate


def further_samples(read: Aggregate, n_samples: int, n_max: int, confidence: float) -> int:
    """How many samples to add to `n_samples`, whose aggregate is `read`; 0 when its grade is decided or they are `n_max`.

    When no number of them up to `n_max` can decide the grade, all of them are taken.
    """
    left, leader, runner_up = n_max - n_samples, 0.0, 0.0
    if read.grade is not None and read.grade_probs is not None:
        soft_votes = [probability * len(read.votes) for probability in read.grade_probs]
        leader = soft_votes.pop(read.grade)
        runner_up = max(soft_votes)
    for more in range(left):
        # P(share > ½), if all of these vote for the leader
        if betainc(runner_up + 1, leader + more + 1, 0.5) >= confidence:
            return more
    return left
