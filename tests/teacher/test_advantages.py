"""The properties that AGPO must have, and agreement with references written separately from the formulas."""

import itertools
import math
import statistics
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher.advantages import ESTIMATORS, agpo

SIGNS = st.sampled_from([-1.0, 1.0])
GROUPS = st.lists(SIGNS, min_size=2, max_size=16)
DELTAS = st.floats(0.05, 5.0)
NEGATIVES = st.floats(-3.0, 0.0)


def scored(group):
    return [r for r in group if not math.isnan(r)]


def slow_agpo(group, delta=1.0, negative=-1.0):
    """One group, plain Python, straight from the definition."""
    mean, deviation = statistics.fmean(scored(group)), statistics.pstdev(scored(group))
    return [(r - mean) / math.sqrt(deviation**2 + delta**2) + (negative if r < 0 else 0.0) for r in group]


def slow_grpo(group, epsilon=1e-4):
    kept = scored(group)
    deviation = statistics.stdev(kept) if len(kept) > 1 else 0.0
    return [(r - statistics.fmean(kept)) / (deviation + epsilon) for r in group]


def slow_rloo(group):
    result = []
    for i, r in enumerate(group):
        others = scored(group[:i] + group[i + 1 :])
        result.append(r - statistics.fmean(others) if others else 0.0)
    return result


def slow_ngrpo(group, epsilon=1e-4):
    kept = [*scored(group), 1.0]
    return [(r - statistics.fmean(kept)) / (statistics.stdev(kept) + epsilon) for r in group]


def slow_mc_grpo(group, floor=1e-3):
    median = statistics.median(scored(group))
    spread = statistics.median(abs(r - median) for r in scored(group))
    return [(r - median) / max(spread, floor) for r in group]


def slow_a_grae(group, batch_mean=None, epsilon=1e-6, alpha=1.0, clip=10.0):
    p = statistics.fmean(scored(group))
    batch_mean = p if batch_mean is None else batch_mean
    result = []
    for a in slow_grpo(group, epsilon):
        easy, hard = a / 2 / (1 - math.sqrt(p) + epsilon), a / 2 / (math.sqrt(p) + epsilon)
        mixed = (1 - batch_mean) * easy + batch_mean * hard
        mixed *= min(1.0, batch_mean / alpha) if mixed > 0 else 1.0
        result.append(max(-clip, min(clip, mixed)))
    return result


# Written from the formulas of DESIGN and the papers, not from the code. NaN in, NaN out: the test puts the 0 there.
REFERENCES = {
    "agpo": slow_agpo,
    "grpo": slow_grpo,
    "dr_grpo": lambda group: [r - statistics.fmean(scored(group)) for r in group],
    "rloo": slow_rloo,
    "psr": lambda group: [1.0 if r == 1 else 0.0 for r in group],
    "nsr": lambda group: [-1.0 if r == 0 else 0.0 for r in group],
    "w_reinforce": lambda group: [0.1 if r == 1 else -1.0 for r in group],
    "ngrpo": slow_ngrpo,
    "mc_grpo": slow_mc_grpo,
    "a_grae": slow_a_grae,
}


def expected(name, group, **options):
    if not scored(group):
        return [0.0] * len(group)
    made = REFERENCES[name](group, **options)
    return [0.0 if math.isnan(r) else a for r, a in zip(group, made, strict=True)]


def found(name, groups, **options):
    return ESTIMATORS[name](torch.tensor(groups, dtype=torch.float64), **options).tolist()


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


def values_of(name):
    return (-1.0, 1.0) if name == "agpo" else (0.0, 1.0)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_estimator_matches_its_slow_reference_on_random_groups(name):
    low, high = values_of(name)
    by_size = {}
    for group in random_groups(1000, (low, high)):
        by_size.setdefault(len(group), []).append(group)
    seen = Counter()
    for groups in by_size.values():
        scorable = [statistics.fmean(scored(group)) for group in groups if scored(group)]
        # The one estimator that looks at the whole batch.
        options = {"batch_mean": statistics.fmean(scorable)} if name == "a_grae" else {}
        for group, advantages in zip(groups, found(name, groups), strict=True):
            assert advantages == pytest.approx(expected(name, group, **options), abs=1e-9)
            seen.update([len(group), frozenset(scored(group)), "nan" if len(scored(group)) < len(group) else ""])
    # the groups that break estimators are among them: pairs, all right, all wrong, mixed, unscorable
    assert min(seen[kind] for kind in (2, "nan", frozenset({low}), frozenset({high}), frozenset({low, high}))) >= 100


def test_options_reach_the_formulas():
    groups = list(random_groups(50, (-1.0, 1.0)))
    assert all(
        one(group, delta=0.7, negative=-0.4) == pytest.approx(expected("agpo", group, delta=0.7, negative=-0.4))
        for group in groups
    )
    mixed = [1.0, 0.0, 0.0, 1.0, 0.0]
    assert found("w_reinforce", [mixed], weight=0.5)[0] == [0.5, -1.0, -1.0, 0.5, -1.0]
    assert found("mc_grpo", [mixed], floor=0.25)[0] == [4.0, 0.0, 0.0, 4.0, 0.0]
    assert found("a_grae", [mixed], alpha=0.5)[0] == pytest.approx(slow_a_grae(mixed, alpha=0.5))
    assert found("a_grae", [[0.0] + [1.0] * 15], clip=3.0)[0][0] == -3.0
    assert found("ngrpo", [mixed], epsilon=1.0)[0] == pytest.approx(slow_ngrpo(mixed, epsilon=1.0))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_an_estimator_keeps_shape_and_dtype_and_leaves_its_input_alone(name):
    rewards = torch.tensor([[1.0, values_of(name)[0], math.nan], [1.0, 1.0, 1.0], [math.nan] * 3])
    before = rewards.clone()
    made = ESTIMATORS[name](rewards)
    assert made.shape == rewards.shape
    assert made.dtype == rewards.dtype
    assert torch.isfinite(made).all()
    assert made[2].tolist() == [0.0] * 3  # nothing could be scored
    assert torch.equal(rewards.nan_to_num(9.0), before.nan_to_num(9.0))


def test_what_all_wrong_groups_teach():
    """The difference that the asymmetric estimators are about."""
    teach = {name: found(name, [[values_of(name)[0]] * 4])[0][0] for name in ESTIMATORS}
    assert {name for name, advantage in teach.items() if advantage < 0} == {"agpo", "nsr", "w_reinforce", "ngrpo"}


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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("agpo", {"delta": 0.0}),
        ("agpo", {"negative": 0.1}),
        ("w_reinforce", {"weight": -0.1}),
        ("mc_grpo", {"floor": 0.0}),
        ("a_grae", {"alpha": 0.0}),
        ("a_grae", {"clip": -1.0}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=f"{name} needs .*{next(iter(options))}"):
        ESTIMATORS[name](torch.ones(1, 2), **options)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_rewards_must_be_groups(name):
    with pytest.raises(ValueError, match="num_groups"):
        ESTIMATORS[name](torch.ones(4))
