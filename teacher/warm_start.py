"""Warm start: supervised fine-tuning on rationales.

From a near-zero pass@1 AGPO cannot start (arXiv 2605.05826): the model first learns the form of an answer, and what a
reason looks like.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from data.contracts import MetricsLog, log_progress
from teacher.config import TeacherConfig
from teacher.distributed import world_size
from teacher.examples import Example

logger = logging.getLogger(__name__)


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
        output_dir=str(out),
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
        save_strategy="steps",
        save_steps=max(10, steps // 4),
        save_total_limit=1,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=config.dtype == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=[_Progress(log, "warm_start", steps)],
    )
    trainer.remove_callback(PrinterCallback)  # our own progress lines say it
    checkpoint = get_last_checkpoint(str(out)) if out.exists() else None
    log.rewind("warm_start", int(checkpoint.rsplit("-", 1)[1]) if checkpoint else -1)
    logger.info(
        "warm start: %d examples, %d steps%s", len(examples), steps, f" from {checkpoint}" if checkpoint else ""
    )
    trainer.train(resume_from_checkpoint=checkpoint)


def _tokenised(example: Example, tokenizer: Any, loss_on_prompt: bool) -> dict[str, list[int]]:
    prompt = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
    target = tokenizer(example.target, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + target, "labels": (prompt if loss_on_prompt else [-100] * len(prompt)) + target}


class _Progress(TrainerCallback):
    """Hands the trainer's logs to our metrics file, and says how far it is."""

    def __init__(self, log: MetricsLog, phase: str, total: int) -> None:
        self.log, self.phase, self.total = log, phase, total

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        if not logs or "loss" not in logs:
            return
        values = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        self.log.write(self.phase, state.global_step, values)
        step = state.global_step
        shown = (self.phase, step, self.total, logs["loss"])
        log_progress(logger, step, self.total, "%s: step %d of %d, loss %.3f", *shown)
