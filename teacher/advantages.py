"""Advantage estimators: pure functions from the rewards of groups of completions to advantages of the same shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def agpo(rewards: Tensor, delta: float = 1.0, negative: float = -1.0) -> Tensor:
    """Asymmetric Group Policy Optimization.

        A_i = (r_i − μ) / sqrt(σ² + δ²) + 1[r_i < 0] · R

    with μ and σ the mean and population standard deviation of the group. The first term emphasises a rare success
    without GRPO's 1/σ blow-up; the second keeps a constant push on every wrong completion, so that an all-wrong group
    still teaches. Source: arXiv 2605.05826; the formula as quoted in a public survey. The paper's own δ and R were not to
    be had, so both are options.

    Args:
        rewards: (num_groups, group_size), +1 or −1; NaN marks an unscorable completion, which gets 0 and does not enter
            the statistics.
        delta: δ > 0.
        negative: R ≤ 0.

    Raises:
        ValueError: δ ≤ 0, R > 0 or rewards that are not two-dimensional.
    """
    if delta <= 0 or negative > 0:
        raise ValueError(f"agpo needs delta > 0 and negative <= 0, got {delta} and {negative}")
    valid, values, mean = _group_mean(rewards)
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)
    deviation = torch.where(valid, values - mean, 0.0)
    variance = deviation.square().sum(dim=1, keepdim=True) / count
    advantages = deviation / torch.sqrt(variance + delta**2)
    return advantages + negative * (valid & (values < 0)).to(advantages)


def grpo(rewards: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Group Relative Policy Optimization: (r − m) / (s + ε), s the sample standard deviation (arXiv 2402.03300).

    Args:
        rewards: (num_groups, group_size), 0 or 1 (any affine image gives the same but for ε); NaN as in `agpo`.
        epsilon: keeps a group of equal rewards finite, at 0.
    """
    valid, values, mean = _group_mean(rewards)
    deviation = torch.where(valid, values - mean, 0.0)
    degrees = (valid.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    spread = torch.sqrt(deviation.square().sum(dim=1, keepdim=True) / degrees)
    return deviation / (spread + epsilon)


def _group_mean(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask of scorable completions (n, g), rewards with 0 for the others (n, g), and the mean of the former (n, 1)."""
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be (num_groups, group_size), got shape {tuple(rewards.shape)}")
    valid = ~torch.isnan(rewards)
    values = torch.where(valid, rewards, 0.0)
    mean = values.sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    return valid, values, mean


ESTIMATORS: dict[str, Callable[..., Tensor]] = {"agpo": agpo, "grpo": grpo}
