"""Warm start: supervised fine-tuning on rationales.

From a near-zero pass@1 AGPO cannot start (arXiv 2605.05826): the model first learns the form of an answer, and what a
reason looks like.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from data.contracts import MetricsLog
from teacher.config import TeacherConfig
from teacher.distributed import world_size
from teacher.examples import Example
from teacher.loop import StepLog, shared_arguments, train
from teacher.prefix_groups import Group, common_prefix, micro_batches, unpadded
from teacher.shared_prefix import can_share, causal_lm, check_head, masked_hidden_size, token_log_probs


def warm_start(
    config: TeacherConfig, model: Any, tokenizer: Any, examples: list[Example], out: Path, log: MetricsLog
) -> None:
    """Train `model` in place on the examples' targets.

    Checkpoints go to `out`; a run that was interrupted continues from the last one.
    """
    settings = config.warm_start
    dataset = Dataset.from_list([_tokenised(example, tokenizer, settings.loss_on_prompt) for example in examples])
    steps = max(1, settings.min_steps, round(len(examples) * settings.epochs / settings.batch_size))
    arguments = TrainingArguments(
        **shared_arguments(config, out),
        per_device_train_batch_size=settings.batch_size // world_size(),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        # A short run: the second moment must forget faster than 1,000 steps, or the high rate of a small model wastes it.
        adam_beta2=0.95,
        weight_decay=0.01,
        warmup_steps=max(1, steps // 20),
        # Not grouped by length: a rationale's length goes with its grade, and batches sorted by it are far from random
        # (on the synthetic shop, validation accuracy after the same steps fell from 0.67 to 0.42, seed 0).
        train_sampling_strategy="random",
        logging_steps=max(1, steps // 20),
        save_steps=max(10, steps // 4),
    )
    add_fused_lm_head(causal_lm(model))
    trainer = _SharedPrefixTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=[StepLog(log, "warm_start")],
    )
    with trainer.accelerator.autocast():
        check_head(model, tokenizer.pad_token_id)
        if config.agpo.shared_prefix and len(examples) > 1:
            longest = sorted(dataset["input_ids"], key=len)[-1:]
            trainer.shared_prefix = can_share(model, longest, config.max_completion_tokens, tokenizer.pad_token_id)
    train(trainer, log, "warm_start", memory="teacher.warm_start.batch_size")


class _SharedPrefixTrainer(Trainer):
    """A trainer that computes what all examples of a batch begin with, the guideline, once."""

    shared_prefix = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The mean negative log probability of the batch's targets, over all processes."""
        sequences = unpadded(inputs["input_ids"], inputs["attention_mask"])
        lengths = [len(sequence) for sequence in sequences]
        # Targets are the end of an example, and nothing predicts a first token.
        counts = (inputs["labels"] != -100).sum(dim=1).tolist()
        starts = [max(1, length - count) for length, count in zip(lengths, counts, strict=True)]
        shared = common_prefix(sequences) if self.shared_prefix else 0
        hidden_size = masked_hidden_size(self.model)
        (groups,) = micro_batches([Group(tuple(range(len(sequences))), shared)], lengths, 10**9, hidden_size)
        log_probs, _ = token_log_probs(model, sequences, starts, groups, self.processing_class.pad_token_id)
        if num_items_in_batch is None:
            return -log_probs.sum() / sum(counts)
        # The count is of all processes, over which the gradients are averaged.
        return -log_probs.sum() / num_items_in_batch * self.accelerator.num_processes


def _tokenised(example: Example, tokenizer: Any, loss_on_prompt: bool) -> dict[str, list[int]]:
    prompt = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
    target = tokenizer(example.target, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + target, "labels": (prompt if loss_on_prompt else [-100] * len(prompt)) + target}
