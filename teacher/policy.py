"""The AGPO stage of the training: dataset, reward and trainer arguments from our config."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig

from data.schema import ContractError
from teacher.advantages import agpo, grpo
from teacher.config import AGPOConfig, TeacherConfig
from teacher.examples import Example
from teacher.metrics_log import MetricsLog
from teacher.trainer import Advantages, AGPOTrainer
from teacher.verifier import parse_grade, reward

logger = logging.getLogger(__name__)

Evaluate = Callable[[Any, int], object]


def estimator(config: AGPOConfig) -> Advantages:
    """The advantage function that the config names, with its options bound."""
    if config.estimator == "agpo":
        return partial(agpo, delta=config.delta, negative=config.negative)
    return grpo


def train_policy(
    config: TeacherConfig,
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    num_grades: int,
    out: Path,
    log: MetricsLog,
    evaluate: Evaluate,
) -> None:
    """Train `model` in place with AGPO on the examples' grades, as verifiable labels.

    `evaluate(model, step)` is called every `evaluation.every` steps. Checkpoints go to `out`; an interrupted run continues
    from the last one.
    """
    settings = config.agpo
    completions = settings.prompts_per_step * settings.group_size
    if completions % settings.micro_batch:
        raise ContractError(
            f"teacher.agpo.micro_batch = {settings.micro_batch} does not divide the {completions} completions of a step "
            f"(prompts_per_step × group_size)"
        )
    cuda = torch.cuda.is_available()
    accumulation = completions // settings.micro_batch
    arguments = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * settings.generation_batches,
        num_generations=settings.group_size,
        max_completion_length=config.max_completion_tokens,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(5, settings.steps),
        max_grad_norm=settings.max_grad_norm,
        temperature=settings.temperature,
        beta=settings.kl,
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        loss_type="dapo",
        logging_steps=1,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=1,
        seed=config.seed,
        use_cpu=not cuda,
        bf16=config.dtype == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        dataloader_pin_memory=cuda,
        disable_dropout=True,
        report_to=[],
        disable_tqdm=True,
        **(_vllm_options() if settings.rollouts == "vllm" else {}),
    )
    trainer = AGPOTrainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": e.prompt, "gold": e.grade} for e in examples]),
        reward_funcs=_verifier(tokenizer, num_grades),
        advantages=estimator(settings),
        callbacks=[_Watch(log, settings.steps, config.evaluation.every, evaluate)],
    )
    trainer.remove_callback(PrinterCallback)  # our own progress lines say it
    checkpoint = get_last_checkpoint(str(out)) if out.exists() else None
    begin = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    log.rewind("agpo", begin)
    logger.info("AGPO: %d prompts, steps %d to %d", len(examples), begin, settings.steps)
    trainer.train(resume_from_checkpoint=checkpoint)


def _verifier(tokenizer: Any, num_grades: int) -> Callable[..., list[float]]:
    """The reward function that TRL calls: ±1 for each completion, and its parse and truncation shares."""
    stops = {tokenizer.eos_token_id}

    def verifier(
        completions: list[str],
        completion_ids: list[list[int]],
        gold: list[int],
        log_metric: Callable[[str, float], None],
        **unused: Any,
    ) -> list[float]:
        finished = [bool(ids) and ids[-1] in stops for ids in completion_ids]
        parsed = [
            done and parse_grade(text, num_grades) is not None for text, done in zip(completions, finished, strict=True)
        ]
        log_metric("parse_rate", sum(parsed) / len(parsed))
        log_metric("truncated", 1 - sum(finished) / len(finished))
        return [
            reward(text, done, label, num_grades) for text, done, label in zip(completions, finished, gold, strict=True)
        ]

    return verifier


def _vllm_options() -> dict[str, Any]:
    """GRPOConfig's settings for vLLM in this process, made to work on the CPU build too."""
    if not torch.cuda.is_available():
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import trl.generation.vllm_generation as generation
        import vllm._custom_ops as ops

        # oneDNN packs the weights when the engine starts, so later updates would silently not arrive.
        ops._supports_onednn = False
        if not isinstance(generation.LLM, partial):
            generation.LLM = partial(generation.LLM, dtype="float32", enforce_eager=True)
    return {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}


class _Watch(TrainerCallback):
    """Logs every step, evaluates at intervals."""

    def __init__(self, log: MetricsLog, total: int, every: int, evaluate: Evaluate) -> None:
        self.log, self.total, self.every, self.evaluate = log, total, every, evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        if not logs or "loss" not in logs:
            return
        values = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        self.log.write("agpo", state.global_step, values)
        logger.info(
            "agpo: step %d of %d, accuracy %.3f, parsed %.3f, entropy %.3f",
            state.global_step,
            self.total,
            values.get("accuracy", float("nan")),
            values.get("parse_rate", float("nan")),
            values.get("entropy", float("nan")),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if self.every and state.global_step % self.every == 0 and state.global_step < self.total:
            self.evaluate(model, state.global_step)
