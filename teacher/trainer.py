"""AGPO on TRL's GRPOTrainer: the advantages are ours; loss, generation, logging and checkpoints stay TRL's.

Only `_calculate_rewards`, `_tokenize_prompts` and `_generate_and_score_completions` are overridden, as TRL's maintainers
advise. They are private, so TRL is pinned and a test fails if they move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

Advantages = Callable[[Tensor], Tensor]


class AGPOTrainer(GRPOTrainer):
    """`GRPOTrainer` with the advantage estimator given as a function.

    Args:
        advantages: from rewards (num_groups, group_size) to advantages of the same shape; the rewards are those of the
            one reward function, gathered from all processes, NaN where a completion could not be scored.
        **options: everything else is GRPOTrainer's. Exactly one reward function is expected.
    """

    def __init__(self, *arguments: Any, advantages: Advantages, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if len(self.reward_funcs) != 1:
            raise ValueError("AGPOTrainer takes one reward function: the verifier's")
        self.advantages = advantages
        self._gathered_rewards: Tensor | None = None

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        # The prompts are rendered already, control tokens included: a tokenizer that adds its own would double them.
        return self.processing_class(text=prompts, add_special_tokens=False)["input_ids"], None, {}

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._gathered_rewards = rewards[:, 0]  # (all completions of all processes,)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        if self._gathered_rewards is None:
            raise RuntimeError("TRL no longer calls _calculate_rewards: its private surface has moved")
        rewards = self._gathered_rewards.view(-1, group_size)
        flat = self.advantages(rewards).flatten()
        local = len(inputs)
        begin = self.accelerator.process_index * local
        output["advantages"] = flat[begin : begin + local].to(output["advantages"])
        # Replace what TRL logged for these completions with what the loss will use.
        logged = self._logs["advantages"]
        for _ in range(min(len(flat), len(logged))):
            logged.pop()
        logged.extend(flat.tolist())
        for name, value in group_statistics(rewards, flat.view_as(rewards)).items():
            self._metrics[mode][name].append(value)
        return output


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
        "groups/mixed": (any_right & any_wrong).float().mean().item(),
        "advantage/positive": advantages.clamp(min=0).mean().item(),
        "advantage/negative": advantages.clamp(max=0).mean().item(),
    }
