"""The collapse detector: what it stops and what it lets pass."""

import pytest

from teacher.collapse_detector import collapse
from teacher.config import CollapseConfig

HEALTHY = {"entropy": 1.0, "parse_rate": 0.9, "accuracy": 0.5}
LIMITS = CollapseConfig(window=5)


def history(*parts):
    """Steps by (count, what differs from a healthy step)."""
    return [{**HEALTHY, **changed} for count, changed in parts for _ in range(count)]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"entropy": 0.04}, "entropy fell"),
        ({"entropy": 5.5}, "entropy rose"),
        ({"parse_rate": 0.6}, "parse rate fell"),
        ({"accuracy": 0.2}, "accuracy fell"),
    ],
)
def test_a_collapse_is_named_once_a_whole_window_shows_it(changed, word):
    assert word in collapse(history((10, {}), (5, changed)), LIMITS)
    assert collapse(history((10, {}), (1, changed), (4, {})), LIMITS) is None


@pytest.mark.parametrize("changed", [{"entropy": 0.2}, {"parse_rate": 0.7}, {"accuracy": 0.3}, {"accuracy": 0.9}])
def test_ordinary_changes_pass(changed):
    assert collapse(history((10, {}), (50, changed)), LIMITS) is None


def test_a_training_in_which_nothing_is_learnt_is_stopped():
    idle = {"advantage/positive": 0.0, "advantage/negative": 0.0}
    limits = CollapseConfig(window=5, max_idle_steps=20)
    assert "in 20 steps every advantage was 0" in collapse(
        history((3, {"advantage/negative": -1.0}), (20, idle)), limits
    )
    assert collapse(history((19, idle)), limits) is None
    assert collapse(history((30, idle), (1, {**idle, "advantage/negative": -0.1})), limits) is None
    assert collapse(history((30, idle)), CollapseConfig(window=0)) is None


def test_a_policy_that_never_answers_is_stopped_after_two_windows():
    silent = {"parse_rate": 0.0}
    assert "in 10 steps no completion had an answer" in collapse(history((10, silent)), LIMITS)
    assert collapse(history((9, silent)), LIMITS) is None
    assert "no completion" not in collapse(history((1, {"parse_rate": 0.01}), (9, silent)), LIMITS)


def test_it_is_silent_without_enough_steps_values_or_when_off():
    fallen = history((4, {}), (5, {"accuracy": 0.0}))
    assert collapse(fallen, LIMITS) is None
    assert collapse([], LIMITS) is None
    assert collapse(history((10, {}), (5, {"accuracy": 0.0})), CollapseConfig(window=0)) is None
    assert collapse([{"loss": 1.0}] * 30, LIMITS) is None


@pytest.mark.parametrize("every", [1, 2, 5])
def test_steps_that_share_completions_are_judged_by_them(every):
    """With `generation_batches` above 1, only the steps that sample log what is known of the completions."""

    def logged(steps):
        return [step if i % every == 0 else {"entropy": step["entropy"]} for i, step in enumerate(steps)]

    idle = {"advantage/positive": 0.0, "advantage/negative": 0.0}
    limits = CollapseConfig(window=5, max_idle_steps=20)
    assert "in 20 steps every advantage" in collapse(
        logged(history((10, {"advantage/negative": -1.0}), (20, idle))), limits
    )
    assert "accuracy fell" in collapse(logged(history((10, {}), (15, {"accuracy": 0.1}))), LIMITS)
    assert "no completion had an answer" in collapse(logged(history((20, {"parse_rate": 0.0}))), LIMITS)
    assert collapse(logged(history((40, {}))), LIMITS) is None
