"""The collapse detector: says when a policy's training has gone wrong, from what was logged.

Policy gradients on verifiable rewards fail in known ways: the policy repeats one completion (entropy to 0), it dissolves
into noise (entropy up, answers no longer parse), or the reward falls for good (the paper reports this after hundreds of
steps without KL). A window of steps is judged, never a single one: single steps are noisy. A training in which nothing is
learnt looks healthy, with loss 0: every group's rewards are of one kind (huggingface/trl issue 3857).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from teacher.config import CollapseConfig


def collapse(history: Sequence[dict[str, float]], config: CollapseConfig) -> str | None:
    """Why the training should stop, in a sentence; None while it may go on.

    Args:
        history: the logged values of every step so far, in order: `entropy` (nats per token), `parse_rate` and `accuracy`
            are judged, each where it is logged, and `advantage/positive` and `advantage/negative` for idle steps. A step
            that sampled nothing (`generation_batches`) counts with those of the step before, whose completions it shares.
        config: window and limits. The first window is the measure for the later ones.
    """
    window = config.window
    if window and (idle := idle_steps(history)) >= config.max_idle_steps:
        return f"in {idle} steps every advantage was 0: all completions of a prompt get the same reward"
    if not window or len(history) < 2 * window:
        return None
    filled = _filled(history)

    def means(name: str) -> list[float]:
        """Of every window so far, the oldest first; empty when a step lacks the value."""
        values = [step[name] for step in filled if name in step]
        if len(values) != len(history):
            return []
        return [sum(values[end - window : end]) / window for end in range(window, len(values) + 1)]

    if entropy := means("entropy"):
        if entropy[-1] < config.min_entropy * entropy[0]:
            return f"entropy fell from {entropy[0]:.3g} to {entropy[-1]:.3g}: the policy repeats itself"
        if entropy[-1] > config.max_entropy * entropy[0]:
            return f"entropy rose from {entropy[0]:.3g} to {entropy[-1]:.3g}: the policy dissolves into noise"
    if (parsed := means("parse_rate")) and not any(parsed):
        return f"in {len(history)} steps no completion had an answer that can be read: there is nothing to learn from"
    if parsed and parsed[-1] < config.min_parse_rate * max(parsed):
        return f"the parse rate fell from {max(parsed):.3f} to {parsed[-1]:.3f}: completions no longer answer"
    if (accuracy := means("accuracy")) and max(accuracy) - accuracy[-1] > config.max_accuracy_drop:
        return f"accuracy fell from {max(accuracy):.3f} to {accuracy[-1]:.3f}"
    return None


def idle_steps(history: Sequence[dict[str, float]]) -> int:
    """How many of the last steps in a row had no advantage other than 0."""
    names = ("advantage/positive", "advantage/negative")
    steps, idle = _filled(history), 0
    while idle < len(steps) and all(steps[-1 - idle].get(name) == 0 for name in names):
        idle += 1
    return idle


def _filled(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Every step with what it did not log as the step before has it."""
    return list(accumulate(history, lambda before, step: before | step))
