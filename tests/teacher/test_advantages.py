"""The properties that AGPO must have, and agreement with references written separately from the formulas."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.advantages import ESTIMATORS, agpo, grpo

SIGNS = st.sampled_from([-1.0, 1.0])
GROUPS = st.lists(SIGNS, min_size=2, max_size=16)
DELTAS = st.floats(0.05, 5.0)
NEGATIVES = st.floats(-3.0, 0.0)


def slow_agpo(group, delta, negative):
    """One group, plain Python, straight from the definition; None is an unscorable completion."""
    scored = [r for r in group if not math.isnan(r)]
    if not scored:
        return [0.0] * len(group)
    mean, deviation = statistics.fmean(scored), statistics.pstdev(scored)
    result = []
    for r in group:
        if math.isnan(r):
            result.append(0.0)
        else:
            result.append((r - mean) / math.sqrt(deviation**2 + delta**2) + (negative if r < 0 else 0.0))
    return result


def slow_grpo(group, epsilon=1e-4):
    scored = [r for r in group if not math.isnan(r)]
    if not scored:
        return [0.0] * len(group)
    mean = statistics.fmean(scored)
    deviation = statistics.stdev(scored) if len(scored) > 1 else 0.0
    return [0.0 if math.isnan(r) else (r - mean) / (deviation + epsilon) for r in group]


def one(group, **options):
    return agpo(torch.tensor([group], dtype=torch.float64), **options)[0].tolist()


def random_groups(count, values):
    generator = torch.Generator().manual_seed(7)
    for index in range(count):
        size = 2 if index % 5 == 0 else int(torch.randint(2, 17, (), generator=generator))
        share = float(torch.rand((), generator=generator))
        if index % 7 == 0:
            share = float(index % 2)  # all wrong, all right
        group = [values[int(torch.rand((), generator=generator) < share)] for _ in range(size)]
        if index % 3 == 0:
            group[0] = math.nan
        yield group


def test_agpo_matches_the_slow_reference_on_random_groups():
    for group in random_groups(1000, (-1.0, 1.0)):
        assert one(group, delta=0.7, negative=-0.4) == pytest.approx(slow_agpo(group, 0.7, -0.4), abs=1e-9)


def test_grpo_matches_the_slow_reference_on_random_groups():
    for group in random_groups(1000, (0.0, 1.0)):
        found = grpo(torch.tensor([group], dtype=torch.float64))[0].tolist()
        assert found == pytest.approx(slow_grpo(group), abs=1e-9)


@given(st.integers(2, 32), DELTAS, NEGATIVES)
def test_the_positive_advantage_falls_as_the_success_rate_rises(size, delta, negative):
    positives = []
    for right in range(1, size + 1):
        advantages = one([1.0] * right + [-1.0] * (size - right), delta=delta, negative=negative)
        positives.append(advantages[0])
        assert advantages[0] <= 2 / delta + 1e-9
    assert all(a > b for a, b in itertools.pairwise(positives))
    assert positives[-1] == pytest.approx(0.0, abs=1e-12)


@given(st.integers(2, 32), DELTAS, NEGATIVES)
def test_an_all_wrong_group_is_pushed_down_by_r(size, delta, negative):
    assert one([-1.0] * size, delta=delta, negative=negative) == pytest.approx([negative] * size)


@given(GROUPS, DELTAS, NEGATIVES)
def test_a_groups_total_is_never_positive(group, delta, negative):
    assert sum(one(group, delta=delta, negative=negative)) <= 1e-9


@given(GROUPS, st.randoms())
def test_the_order_within_a_group_does_not_matter(group, random):
    order = list(range(len(group)))
    random.shuffle(order)
    straight = one(group)
    shuffled = one([group[i] for i in order])
    assert shuffled == pytest.approx([straight[i] for i in order])


@settings(max_examples=50)
@given(GROUPS, GROUPS)
def test_groups_do_not_touch_each_other(first, second):
    size = min(len(first), len(second))
    both = agpo(torch.tensor([first[:size], second[:size]], dtype=torch.float64))
    assert both[0].tolist() == pytest.approx(one(first[:size]))
    assert both[1].tolist() == pytest.approx(one(second[:size]))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_an_unscorable_group_is_left_alone(name):
    rewards = torch.full((1, 4), math.nan)
    assert ESTIMATORS[name](rewards).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("options", [{"delta": 0.0}, {"negative": 0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="delta > 0"):
        agpo(torch.ones(1, 2), **options)


def test_rewards_must_be_groups():
    with pytest.raises(ValueError, match="num_groups"):
        agpo(torch.ones(4))
