"""AGPO on TRL's GRPOTrainer: the advantages and the log probabilities are ours; loss, logging and checkpoints stay TRL's.

The methods that begin with an underscore are private in TRL, so TRL is pinned and a test fails if they move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from teacher.advantages import group_statistics, mixed
from teacher.decoding import sample_completions
from teacher.prefix_groups import Group, common_prefix, group_by_prefix, micro_batches, unpadded
from teacher.shared_prefix import can_share, check_head, masked_hidden_size, token_log_probs
from teacher.trl_parts import GRPOTrainer, untempered_head, unwrap_model_for_generation, with_forward

Advantages = Callable[[Tensor], Tensor]


class AGPOTrainer(GRPOTrainer):
    """`GRPOTrainer` with the advantage estimator given as a function, and each prompt computed once for its group.

    A batch of TRL's is an optimiser step here; it is computed in micro-batches of a limited number of tokens.

    Args:
        advantages: from rewards (num_groups, group_size) to advantages of the same shape; the rewards are those of the
            one reward function, gathered from all processes, NaN where a completion could not be scored.
        dynamic_sampling: rounds of generation with other prompts that replace groups whose rewards are all equal
            (arXiv 2503.14476); 0 keeps such groups. Needs a dataset of known length, and whole groups on each process.
        shared_prefix: compute a prompt once for all its completions in a micro-batch, if the model allows it.
        micro_batch_tokens: tokens, padding included, in one forward and backward pass.
        sft_weight: weight of the mean negative log probability of the `target` (a column of the dataset) of every prompt,
            which is added to the loss.
        **options: everything else is GRPOTrainer's. Exactly one reward function is expected.
    """

    entropy_coef: float  # TRL's

    def __init__(
        self,
        *arguments: Any,
        advantages: Advantages,
        dynamic_sampling: int = 0,
        shared_prefix: bool = True,
        micro_batch_tokens: int = 16_384,
        sft_weight: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        if len(self.reward_funcs) != 1:
            raise ValueError("AGPOTrainer takes one reward function: the verifier's")
        self.advantages = advantages
        self.dynamic_sampling = dynamic_sampling
        self.shared_prefix = shared_prefix
        self.micro_batch_tokens = micro_batch_tokens
        self.sft_weight = sft_weight
        self._gathered_rewards: Tensor | None = None
        self._sampled_tokens = 0.0
        self._untempered = untempered_head(self.model) if sft_weight and self.temperature != 1 else None
        if self.use_vllm and self.vllm_mode == "colocate":
            self.vllm_generation.llm.generate = self._with_hit_rate(self.vllm_generation.llm.generate)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """See `Trainer.train`. First sees whether the loss is this model's, and whether its prompts can be shared."""
        pad = self._tokenizer.pad_token_id
        with self.accelerator.autocast():
            check_head(self.model, pad, self.temperature)
            if self.shared_prefix:
                prompts = self._tokenize_prompts(sorted(self.train_dataset["prompt"], key=len)[-16:])[0]
                self.shared_prefix = can_share(self.model, prompts, self.max_completion_length, pad)
        return super().train(*arguments, **options)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss of a batch, whose gradient is already there but for the last micro-batch's.

        The micro-batches are weighted so that the sum is the loss of the whole batch.
        """
        if not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs)
        total = self._anchor_loss(model, inputs) if self.sft_weight else 0.0
        *others, last = self._micro_batches(inputs)
        for part in others:
            with self.accelerator.no_sync(model):
                loss = self._weighted_loss(model, *part)
                self.accelerator.backward(loss)
            total += loss.detach()
        return self._weighted_loss(model, *last) + total

    def _weighted_loss(self, model: Any, part: dict[str, Any], weight: float, tokens: float) -> Tensor:
        """The part of the batch's loss that a micro-batch has; of the entropy bonus, a mean over tokens, it has `tokens`."""
        coefficient = self.entropy_coef
        self.entropy_coef = coefficient * tokens / weight if weight else 0.0
        try:
            return weight * super().compute_loss(model, part)
        finally:
            self.entropy_coef = coefficient

    def _micro_batches(self, inputs: dict[str, Any]) -> list[tuple[dict[str, Any], float, float]]:
        """Rows of `inputs` for one forward and backward pass each, their weights, and their shares of the tokens; as many
        on every process."""
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        sequences, starts = _sequences(input_ids, mask, inputs["completion_ids"].size(1))
        plan = self._plan(sequences, starts)
        if self.accelerator.num_processes > 1:  # each forward pass gathers metrics from all
            most = self.accelerator.gather(torch.tensor([len(plan)], device=input_ids.device)).max().item()
            plan = self._plan(sequences, starts, int(most))
        tokens = inputs["completion_mask"].sum(dim=1)
        parts = []
        for groups in plan:
            rows = torch.tensor([row for group in groups for row in group.rows], device=input_ids.device)
            share = (tokens[rows].sum() / tokens.sum().clamp(min=1)).item()
            # Means over tokens; the other losses are means over completions.
            weight = share if self.loss_type in ("dapo", "cispo") else len(rows) / len(sequences)
            part = {
                name: value[rows] if isinstance(value, Tensor) and value.dim() else value
                for name, value in inputs.items()
            }
            part["num_items_in_batch"] = inputs["num_items_in_batch"] * weight
            parts.append((part, weight, share))
        return parts

    def _anchor_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The supervised loss of the batch's prompts, whose gradient is already there, times its weight."""
        prompts, targets = (unpadded(inputs[f"{name}_ids"], inputs[f"{name}_mask"]) for name in ("prompt", "target"))
        examples = {tuple(prompt): target for prompt, target in zip(prompts, targets, strict=True)}
        sequences = [[*prompt, *target] for prompt, target in examples.items()]
        starts, lengths = [len(prompt) for prompt in examples], [len(sequence) for sequence in sequences]
        group = Group(tuple(range(len(sequences))), common_prefix(sequences) if self.shared_prefix else 0)
        total = inputs["prompt_ids"].new_zeros((), dtype=torch.float32)
        for groups in micro_batches([group], lengths, self.micro_batch_tokens, masked_hidden_size(self.model)):
            head = with_forward(model, self._untempered)
            with head, self.accelerator.no_sync(model), self.accelerator.autocast():
                log_probs, _ = token_log_probs(model, sequences, starts, groups, self._tokenizer.pad_token_id)
                loss = -self.sft_weight * log_probs.sum() / (sum(lengths) - sum(starts))
                self.accelerator.backward(loss)
            total += loss.detach()
        self._metrics["train"]["sft_loss"].append((total / self.sft_weight).item())
        return total

    def _plan(self, sequences: list[list[int]], starts: list[int], at_least: int = 1) -> list[list[Group]]:
        if self.shared_prefix:
            groups = group_by_prefix([ids[:start] for ids, start in zip(sequences, starts, strict=True)])
        else:
            groups = [Group((row,), 0) for row in range(len(sequences))]
        hidden_size = masked_hidden_size(self.model)
        return micro_batches(groups, [len(ids) for ids in sequences], self.micro_batch_tokens, hidden_size, at_least)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log probabilities and entropies of the completions (B, logits_to_keep), 0 where the mask is 0."""
        if compute_aux_loss:  # of mixtures of experts: its balance is counted over the repeated form
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss
            )
        sequences, starts = _sequences(input_ids, attention_mask, logits_to_keep)
        places, log_probs, entropies = [], [], []
        for groups in self._plan(sequences, starts):
            with self.accelerator.autocast():
                values = token_log_probs(model, sequences, starts, groups, self._tokenizer.pad_token_id)
            log_probs.append(values[0])
            entropies.append(values[1])
            for row in (row for group in groups for row in group.rows):
                begin = row * logits_to_keep
                places.append(torch.arange(begin, begin + len(sequences[row]) - starts[row]))
        place = torch.cat(places).to(input_ids.device)

        def scatter(values: list[Tensor]) -> Tensor:
            flat = values[0].new_zeros(len(sequences) * logits_to_keep)
            return flat.index_copy(0, place, torch.cat(values)).view(len(sequences), logits_to_keep)

        return scatter(log_probs), scatter(entropies) if compute_entropy else None, None

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        # The prompts are rendered already, control tokens included: a tokenizer that adds its own would double them.
        return self.processing_class(text=prompts, add_special_tokens=False)["input_ids"], None, {}

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        *more: Any,
        **others: Any,
    ) -> tuple[list[list[int]], Any]:
        if self.use_vllm:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *more, **others
            )
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            completions = sample_completions(
                model,
                prompt_ids,
                max_tokens=self.max_completion_length,
                ends=self.eos_token_ids,
                temperature=self.temperature,
                pad=self._tokenizer.pad_token_id,
            )
        return completions, None

    def _with_hit_rate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` of vLLM's `LLM`, which logs the share of prompt tokens that its prefix cache had."""

        def logged(*arguments: Any, **options: Any) -> Any:
            outputs = generate(*arguments, **options)
            cached = sum(output.num_cached_tokens or 0 for output in outputs)
            tokens = sum(len(output.prompt_token_ids) for output in outputs)
            self._metrics["train"]["prefix_cache_hit_rate"].append(cached / tokens)
            return outputs

        return logged

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
        if self.sft_weight:
            targets = self._tokenizer([row["target"] for row in inputs], add_special_tokens=False)["input_ids"]
            ids = [torch.tensor([*target, self._tokenizer.eos_token_id]) for target in targets]
            for name, rows in (("ids", ids), ("mask", [torch.ones_like(row) for row in ids])):
                output[f"target_{name}"] = pad_sequence(rows, batch_first=True).to(output["prompt_ids"].device)
        mode = "train" if self.model.training else "eval"
        self._sampled_tokens += self._metrics[mode]["completions/mean_length"][-1] * len(self._gathered_rewards)
        return output, self._gathered_rewards.view(-1, group_size)

    def _resample_uniform_groups(
        self, inputs: Any, output: dict[str, Any], rewards: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        """Replace groups whose rewards are all equal by mixed groups of other prompts, while rounds and groups last."""
        local_groups = len(inputs) // self.num_generations
        if local_groups * self.num_generations != len(inputs):
            raise ValueError(
                "dynamic sampling needs whole groups on each process: make prompts_per_step a multiple of them"
            )
        first = self.accelerator.process_index * local_groups
        for round_ in range(self.dynamic_sampling):
            if mixed(rewards).all():
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
                spare = mixed(fresh[process]).nonzero().flatten().tolist()
                places = (~mixed(by_process[process])).nonzero().flatten().tolist()
                for place, source in zip(places, spare, strict=False):
                    by_process[process, place] = fresh[process, source]
                    if process == self.accelerator.process_index:
                        takes.append((place, source))
            rewards = by_process.view_as(rewards)
            output = self._with_groups_of(output, others, takes)
        self._metrics["train"]["dynamic_sampling/kept_uniform"].append((~mixed(rewards)).float().mean().item())
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


def _sequences(input_ids: Tensor, mask: Tensor, completion_length: int) -> tuple[list[list[int]], list[int]]:
    """The tokens of every row where the mask is 1, and at which of them its completion starts; from (B, P + C)."""
    starts = mask[:, : mask.size(1) - completion_length].sum(dim=1).tolist()
    return unpadded(input_ids, mask), starts


def _padded(tensor: Tensor, width: int, fill: float, left: bool) -> Tensor:
    missing = width - tensor.size(1)
    return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=fill)
