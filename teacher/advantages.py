"""Advantage estimators: pure functions from the rewards of groups of completions to advantages of the same shape.

Every function takes `rewards` (num_groups, group_size) in the values it names, {−1, +1} or {0, 1}; NaN marks a completion
that could not be scored: its advantage is 0 and it does not enter the statistics of its group. All raise ValueError for
rewards of another number of dimensions or options out of range. What an estimator needs besides the advantage (Dr.GRPO's
constant length normaliser, NGRPO's asymmetric clipping) is a setting of the loss, not of the advantage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def agpo(rewards: Tensor, delta: float = 1.0, negative: float = -1.0) -> Tensor:
    """Asymmetric Group Policy Optimization. Takes {−1, +1}.

        A_i = (r_i − μ) / sqrt(σ² + δ²) + 1[r_i < 0] · R

    with μ and σ the mean and population standard deviation of the group. The first term emphasises a rare success
    without GRPO's 1/σ blow-up; the second keeps a constant push on every wrong completion, so that an all-wrong group
    still teaches. Source: arXiv 2605.05826; the formula as quoted in a public survey. The paper's own δ and R were not to
    be had, so both are options.

    Args:
        rewards: (num_groups, group_size).
        delta: δ > 0.
        negative: R ≤ 0.
    """
    if delta <= 0 or negative > 0:
        raise ValueError(f"agpo needs delta > 0 and negative <= 0, got {delta} and {negative}")
    group = _Group(rewards)
    advantages = group.deviation / torch.sqrt(group.variance(0) + delta**2)
    return advantages + negative * group.wrong.to(advantages)


def grpo(rewards: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Group Relative Policy Optimization: (r − m) / (s + ε), s the sample standard deviation (arXiv 2402.03300).

    Takes {0, 1}; ε keeps a group of equal rewards finite, at 0.
    """
    group = _Group(rewards)
    return group.deviation / (group.variance(1).sqrt() + epsilon)


def dr_grpo(rewards: Tensor) -> Tensor:
    """Dr. GRPO: r − m, without the division that favours very easy and very hard prompts (arXiv 2503.20783).

    Takes {0, 1}. Its other half is a loss normalised by a constant length (`loss_type="dr_grpo"` in TRL).
    """
    return _Group(rewards).deviation


def rloo(rewards: Tensor) -> Tensor:
    """REINFORCE leave-one-out: r minus the mean of the others, G/(G−1) · (r − m) (arXiv 2402.14740). Takes {0, 1}."""
    group = _Group(rewards)
    return group.deviation * group.count / (group.count - 1).clamp(min=1)


def psr(rewards: Tensor) -> Tensor:
    """Positive sample reinforcement: r on right completions, nothing on wrong ones (arXiv 2506.01347). Takes {0, 1}."""
    group = _Group(rewards)
    return torch.where(group.right, group.values, 0.0)


def nsr(rewards: Tensor) -> Tensor:
    """Negative sample reinforcement: r − 1 on wrong completions, nothing on right ones (arXiv 2506.01347).

    Takes {0, 1}.
    """
    group = _Group(rewards)
    return torch.where(group.wrong, group.values - 1.0, 0.0)


def w_reinforce(rewards: Tensor, weight: float = 0.1) -> Tensor:
    """Weighted REINFORCE: λ · r on right completions, r − 1 on wrong ones (arXiv 2506.01347). Takes {0, 1}; λ ≥ 0."""
    if weight < 0:
        raise ValueError(f"w_reinforce needs weight >= 0, got {weight}")
    return weight * psr(rewards) + nsr(rewards)


def ngrpo(rewards: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Negative-enabled GRPO: one virtual completion with reward 1 joins each group's mean and deviation (arXiv 2509.18851).

    Takes {0, 1}. An all-wrong group thus gets a negative advantage; an all-right one keeps 0. The paper pairs it with
    asymmetric clipping, a setting of the loss.
    """
    group = _Group(rewards)
    virtual = _Group(torch.cat([rewards, torch.ones_like(rewards[:, :1])], dim=1))
    deviation = torch.where(group.valid, group.values - virtual.mean, 0.0)
    return deviation / (virtual.variance(1).sqrt() + epsilon)


def mc_grpo(rewards: Tensor, floor: float = 1e-3) -> Tensor:
    """Median-centred GRPO: (r − median) / max(MAD, floor); the median completion itself is dropped.

    Takes {0, 1}, best in groups of odd size. With two reward values and an odd group the median absolute deviation is 0
    (more than half of the group sits on the median), so the floor sets the scale: the advantages of the minority are
    ±1/floor, and the caller should clip gradients or raise the floor. The completion that is the median has advantage 0,
    which is how it is dropped; in a group of even size the median is the mean of the middle two. Source:
    lotusroot-kim/MC-GRPO, which adds 1e-3 to the MAD where this takes the larger of both.
    """
    if floor <= 0:
        raise ValueError(f"mc_grpo needs floor > 0, got {floor}")
    group = _Group(rewards)
    median = _median(rewards)
    spread = _median((rewards - median).abs())
    # A group without a scorable completion has no median; its deviations are masked like any unscorable one's.
    return torch.where(group.valid, (rewards - median) / spread.clamp(min=floor), 0.0)


def a_grae(rewards: Tensor, epsilon: float = 1e-6, alpha: float = 1.0, clip: float = 10.0) -> Tensor:
    """Asymmetric group relative advantage estimation: from easy to hard prompts as the batch succeeds more.

        A = (1 − B) · (a/2) / (1 − √p + ε) + B · (a/2) / (√p + ε),   times min(1, B/α) where positive, clipped to ±clip

    with a GRPO's advantage, p the group's mean and B the mean of p over the batch. Takes {0, 1}. Source: arXiv 2602.05548
    (its released script does not reach this branch, so the formula is implemented). The clip is ours to choose: without
    it one wrong completion among 16 would weigh some 60 times a typical one.
    """
    if alpha <= 0 or clip <= 0:
        raise ValueError(f"a_grae needs alpha > 0 and clip > 0, got {alpha} and {clip}")
    group = _Group(rewards)
    scorable = group.valid.any(dim=1, keepdim=True)
    batch_mean = (group.mean * scorable).sum() / scorable.sum().clamp(min=1)
    half = grpo(rewards, epsilon) / 2
    root = group.mean.sqrt()
    advantages = (1 - batch_mean) * half / (1 - root + epsilon) + batch_mean * half / (root + epsilon)
    advantages = torch.where(advantages > 0, advantages * (batch_mean / alpha).clamp(max=1.0), advantages)
    return advantages.clamp(-clip, clip)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (agpo, grpo, dr_grpo, rloo, psr, nsr, w_reinforce, ngrpo, mc_grpo, a_grae)
}


class _Group:
    """Per-group statistics over scorable completions: tensors (n, g) or (n, 1)."""

    def __init__(self, rewards: Tensor) -> None:
        if rewards.dim() != 2:
            raise ValueError(f"rewards must be (num_groups, group_size), got shape {tuple(rewards.shape)}")
        self.valid = ~torch.isnan(rewards)
        self.values = torch.where(self.valid, rewards, 0.0)
        self.count = self.valid.sum(dim=1, keepdim=True)
        self.mean = self.values.sum(dim=1, keepdim=True) / self.count.clamp(min=1)
        self.deviation = torch.where(self.valid, self.values - self.mean, 0.0)
        self.right = self.valid & (self.values > 0)
        self.wrong = self.valid & (self.values <= 0)

    def variance(self, ddof: int) -> Tensor:
        """(n, 1); 0 where there are too few completions to say."""
        return self.deviation.square().sum(dim=1, keepdim=True) / (self.count - ddof).clamp(min=1)


def _median(values: Tensor) -> Tensor:
    """(n, 1): the median without the NaNs of each row, the mean of the middle two in an even number; NaN where all are."""
    return torch.nanquantile(values, 0.5, dim=1, keepdim=True)


def group_statistics(rewards: Tensor, advantages: Tensor) -> dict[str, float]:
    """What a batch of groups looked like.

    Args:
        rewards: (num_groups, group_size), right where positive, NaN where unscorable.
        advantages: of the same shape.

    Returns:
        accuracy; the shares of groups all right, all wrong and mixed (of scorable completions); the mass of positive and of
        negative advantage per completion.
    """
    valid = ~torch.isnan(rewards)
    right = valid & (rewards > 0)
    any_right = right.any(dim=1)
    any_wrong = (valid & ~right).any(dim=1)
    return {
        "accuracy": (right.sum() / valid.sum().clamp(min=1)).item(),
        "groups/all_right": (any_right & ~any_wrong).float().mean().item(),
        "groups/all_wrong": (any_wrong & ~any_right).float().mean().item(),
        "groups/mixed": mixed(rewards).float().mean().item(),
        "advantage/positive": advantages.clamp(min=0).mean().item(),
        "advantage/negative": advantages.clamp(max=0).mean().item(),
    }


def mixed(rewards: Tensor) -> Tensor:
    """(num_groups,) bool: the group has both a right and a wrong completion among its scorable ones."""
    return ((rewards > 0).any(dim=1)) & ((rewards <= 0).any(dim=1))
