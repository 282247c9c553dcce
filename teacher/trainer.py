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
    """`GRPOTrainer` with the advantage estimator given as a function, and optionally DAPO's dynamic sampling.

    Args:
        advantages: from rewards (num_groups, group_size) to advantages of the same shape; the rewards are those of the
            one reward function, gathered from all processes, NaN where a completion could not be scored.
        dynamic_sampling: rounds of generation with other prompts that replace groups whose rewards are all equal
            (arXiv 2503.14476); 0 keeps such groups. Needs a dataset of known length, and whole groups on each process.
        **options: everything else is GRPOTrainer's. Exactly one reward function is expected.
    """

    def __init__(self, *arguments: Any, advantages: Advantages, dynamic_sampling: int = 0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if len(self.reward_funcs) != 1:
            raise ValueError("AGPOTrainer takes one reward function: the verifier's")
        self.advantages = advantages
        self.dynamic_sampling = dynamic_sampling
        self._gathered_rewards: Tensor | None = None
        self._sampled_tokens = 0.0

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        # The prompts are rendered already, control tokens included: a tokenizer that adds its own would double them.
        return self.processing_class(text=prompts, add_special_tokens=False)["input_ids"], None, {}

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._gathered_rewards = rewards[:, 0]  # (all completions of all processes,)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        self._sampled_tokens = 0.0
        output, rewards = self._generate_and_reward(inputs, group_size)
        if mode == "train" and self.dynamic_sampling:
            output, rewards = self._resample_uniform_groups(inputs, output, rewards)
        flat = self.advantages(rewards).flatten()
        local = len(inputs)
        begin = self.accelerator.process_index * local
        output["advantages"] = flat[begin : begin + local].to(output["advantages"])
        # Replace what TRL logged for these completions with what the loss will use.
        logged = self._logs["advantages"]
        for _ in range(min(len(flat), len(logged))):
            logged.pop()
        logged.extend(flat.tolist())
        self._metrics[mode]["sampled_tokens"].append(self._sampled_tokens)
        for name, value in group_statistics(rewards, flat.view_as(rewards)).items():
            self._metrics[mode][name].append(value)
        return output

    def _generate_and_reward(self, inputs: Any, group_size: int) -> tuple[dict[str, Any], Tensor]:
        """TRL's output for `inputs` of this process, and the rewards (groups of all processes, group_size)."""
        self._gathered_rewards = None
        output = super()._generate_and_score_completions(inputs)
        if self._gathered_rewards is None:
            raise RuntimeError("TRL no longer calls _calculate_rewards: its private surface has moved")
        mode = "train" if self.model.training else "eval"
        self._sampled_tokens += self._metrics[mode]["completions/mean_length"][-1] * len(self._gathered_rewards)
        return output, self._gathered_rewards.view(-1, group_size)

    def _resample_uniform_groups(
        self, inputs: Any, output: dict[str, Any], rewards: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        """Replace groups whose rewards are all equal by mixed groups of other prompts, while rounds and groups last."""
        local_groups = len(inputs) // self.num_generations
        if local_groups * self.num_generations != len(inputs):
            raise ValueError("dynamic sampling needs whole groups on each process: make micro_batch a multiple of G")
        first = self.accelerator.process_index * local_groups
        for round_ in range(self.dynamic_sampling):
            if _mixed(rewards).all():
                break
            # The same draw on every process, and again after a resume: it depends on seed, step and round alone.
            generator = torch.Generator().manual_seed(hash((self.args.seed, self.state.global_step, round_)) % 2**63)
            drawn = torch.randint(len(self.train_dataset), (len(rewards),), generator=generator).tolist()
            mine = [self.train_dataset[index] for index in drawn[first : first + local_groups]]
            others, other_rewards = self._generate_and_reward(
                [dict(row) for row in mine for _ in range(self.num_generations)], self.num_generations
            )
            # A replacement comes from the same process, so that no tensor has to travel.
            by_process = rewards.view(-1, local_groups, self.num_generations).clone()
            fresh = other_rewards.view_as(by_process)
            takes: list[tuple[int, int]] = []
            for process in range(len(by_process)):
                spare = _mixed(fresh[process]).nonzero().flatten().tolist()
                places = (~_mixed(by_process[process])).nonzero().flatten().tolist()
                for place, source in zip(places, spare, strict=False):
                    by_process[process, place] = fresh[process, source]
                    if process == self.accelerator.process_index:
                        takes.append((place, source))
            rewards = by_process.view_as(rewards)
            output = self._with_groups_of(output, others, takes)
        self._metrics["train"]["dynamic_sampling/kept_uniform"].append((~_mixed(rewards)).float().mean().item())
        output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
        return output, rewards

    def _with_groups_of(
        self, output: dict[str, Any], others: dict[str, Any], takes: list[tuple[int, int]]
    ) -> dict[str, Any]:
        """`output` with the groups `place` replaced by the groups `source` of `others`, both padded to one width."""
        size = self.num_generations
        rows = {place * size + i: source * size + i for place, source in takes for i in range(size)}
        result = dict(output)
        for name, values in output.items():
            if not isinstance(values, Tensor) or values.dim() == 0:
                continue
            replacement = others[name]
            if values.dim() == 2 and values.size(1) != replacement.size(1):
                width = max(values.size(1), replacement.size(1))
                fill = self._tokenizer.pad_token_id if name.endswith("_ids") else 0
                left = name.startswith("prompt_")
                values, replacement = (_padded(tensor, width, fill, left) for tensor in (values, replacement))
            values = values.clone()
            values[list(rows)] = replacement[list(rows.values())]
            result[name] = values
        return result


def _mixed(rewards: Tensor) -> Tensor:
    """(num_groups,) bool: the group has both a right and a wrong completion among its scorable ones."""
    return ((rewards > 0).any(dim=1)) & ((rewards <= 0).any(dim=1))


def _padded(tensor: Tensor, width: int, fill: float, left: bool) -> Tensor:
    missing = width - tensor.size(1)
    return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=fill)


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
        "groups/mixed": _mixed(rewards).float().mean().item(),
        "advantage/positive": advantages.clamp(min=0).mean().item(),
        "advantage/negative": advantages.clamp(max=0).mean().item(),
    }
