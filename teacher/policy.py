"""The AGPO stage of the training: dataset, reward and trainer arguments from our config."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig

from data.contracts import ContractError, MetricsLog, log_progress
from teacher.advantages import ESTIMATORS, agpo
from teacher.collapse_detector import collapse
from teacher.config import AGPOConfig, TeacherConfig
from teacher.distributed import is_main, wait_for_all, world_size
from teacher.examples import Problem
from teacher.trainer import Advantages, AGPOTrainer
from teacher.verifier import Judge, reward

logger = logging.getLogger(__name__)

Evaluate = Callable[[Any, int], float]


def require_rollouts(settings: AGPOConfig) -> None:
    """Raise `ContractError` when this machine cannot sample as the settings ask."""
    if settings.rollouts == "vllm-server" and not torch.cuda.is_available():
        raise ContractError(
            "teacher.agpo.rollouts = 'vllm-server' needs a CUDA GPU here and at the server, since the weights travel over "
            "NCCL; use 'vllm' (in this process) or 'transformers'"
        )


def estimator(config: AGPOConfig) -> Advantages:
    """The advantage function that the config names, from the verifier's rewards (groups, group_size) in {−1, +1}."""
    if config.estimator == "agpo":
        return partial(agpo, delta=config.delta, negative=config.negative)
    function = ESTIMATORS[config.estimator]
    return lambda rewards: function((rewards + 1) / 2)  # the verifier's {−1, +1} as the {0, 1} that these take


def train_policy(
    config: TeacherConfig,
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    judge: Judge,
    out: Path,
    log: MetricsLog,
    evaluate: Evaluate,
    start_figure: float,
) -> str | None:
    """Train `model` in place with AGPO on problems whose answers `judge` can verify.

    `evaluate(model, step)` is called every `evaluation.every` steps and returns the figure to compare weights by, the
    higher the better; `start_figure` is that of the weights given. Checkpoints go to `out`; an interrupted run continues
    from the last one.

    Returns:
        None, or why the collapse guard stopped the training: `model` then holds the best evaluated weights.
    """
    settings = config.agpo
    accumulation = settings.prompts_per_step * settings.group_size // (settings.micro_batch * world_size())
    cuda = torch.cuda.is_available()
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
        warmup_steps=math.ceil(settings.warmup * settings.steps),
        max_grad_norm=settings.max_grad_norm,
        temperature=settings.temperature,
        beta=settings.kl,
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        loss_type="dr_grpo" if settings.estimator == "dr_grpo" else "dapo",
        mask_truncated_completions=settings.mask_truncated,
        logging_steps=1,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=1,
        seed=config.seed,
        use_cpu=not cuda,
        bf16=config.dtype == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        dataloader_pin_memory=cuda,
        ddp_timeout=7200,  # the others wait while the main process evaluates
        disable_dropout=True,
        report_to=[],
        disable_tqdm=True,
        **_rollout_options(settings),
    )
    watch = _Watch(config, log, evaluate, out / "best.safetensors", start_figure)
    trainer = AGPOTrainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": p.prompt, "gold": p.gold} for p in problems]),
        reward_funcs=_verifier(tokenizer, judge),
        advantages=estimator(settings),
        dynamic_sampling=settings.dynamic_sampling,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)  # our own progress lines say it
    checkpoint = get_last_checkpoint(str(out)) if out.exists() else None
    begin = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    log.rewind("agpo", begin)
    wait_for_all()  # every process must judge the same history
    watch.history = log.read("agpo")
    logger.info("AGPO: %d prompts, steps %d to %d", len(problems), begin, settings.steps)
    trainer.train(resume_from_checkpoint=checkpoint)
    wait_for_all()
    if watch.collapsed:
        watch.restore_best(model)
    return watch.collapsed


def _verifier(tokenizer: Any, judge: Judge) -> Callable[..., list[float]]:
    """The reward function that TRL calls: ±1 for each completion, and its parse and truncation shares."""
    stops = {tokenizer.eos_token_id}

    def verifier(
        completions: list[str],
        completion_ids: list[list[int]],
        gold: list[Any],
        log_metric: Callable[[str, float], None],
        **unused: Any,
    ) -> list[float]:
        finished = [bool(ids) and ids[-1] in stops for ids in completion_ids]
        verdicts = [judge(text, answer) for text, answer in zip(completions, gold, strict=True)]
        parsed = [done and verdict is not None for done, verdict in zip(finished, verdicts, strict=True)]
        log_metric("parse_rate", sum(parsed) / len(parsed))
        log_metric("truncated", 1 - sum(finished) / len(finished))
        return [reward(verdict, done) for verdict, done in zip(verdicts, finished, strict=True)]

    return verifier


def _rollout_options(settings: AGPOConfig) -> dict[str, Any]:
    """GRPOConfig's settings for who samples; vLLM in this process is made to work on the CPU build too."""
    if settings.rollouts == "transformers":
        return {}
    if settings.rollouts == "vllm-server":
        return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": settings.rollout_server}
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
    """Logs every step, evaluates at intervals, keeps the best evaluated weights and stops a training that collapses."""

    def __init__(
        self, config: TeacherConfig, log: MetricsLog, evaluate: Evaluate, best: Path, start_figure: float
    ) -> None:
        self.total, self.every, self.guard = config.agpo.steps, config.evaluation.every, config.agpo.guard
        self.max_tokens = config.agpo.max_sampled_tokens
        self.log, self.evaluate, self.best, self.start_figure = log, evaluate, best, start_figure
        self.history: list[dict[str, float]] = []
        self.collapsed: str | None = None
        self._clock = (time.monotonic(), 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self._clock = (time.monotonic(), float(state.num_input_tokens_seen))
        if not self.best.exists():
            self._keep_if_best(model, 0, self.start_figure)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        if not logs or "loss" not in logs:
            return
        values = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        now, tokens = time.monotonic(), float(values.get("num_tokens", 0.0))
        values["tokens_per_second"] = (tokens - self._clock[1]) / max(now - self._clock[0], 1e-9)
        self._clock = (now, tokens)
        self.log.write("agpo", state.global_step, values)
        self.history.append(values)
        log_progress(
            logger,
            state.global_step,
            self.total,
            "agpo: step %d of %d, accuracy %.3f, parsed %.3f, entropy %.3f",
            *(state.global_step, self.total),
            *(values.get(name, float("nan")) for name in ("accuracy", "parse_rate", "entropy")),
        )
        self.collapsed = collapse(self.history, self.guard)
        if self.collapsed:
            logger.error("AGPO is stopped at step %d: %s", state.global_step, self.collapsed)
            control.should_training_stop = True
        sampled = sum(step.get("sampled_tokens", 0.0) for step in self.history) if self.max_tokens else 0.0
        if self.max_tokens and sampled >= self.max_tokens:
            logger.info("AGPO ends at step %d: %d tokens were sampled", state.global_step, sampled)
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        due = self.every and state.global_step % self.every == 0 and state.global_step < self.total
        if due and is_main():
            self._keep_if_best(model, state.global_step, self.evaluate(model, state.global_step))

    def restore_best(self, model: Any) -> None:
        """Load the best evaluated weights (the first ones, if training never made better ones) into `model`."""
        kept = load_file(self.best)
        with torch.no_grad():
            for name, parameter in _trained(model).items():
                parameter.copy_(kept[name])
        logger.warning("the weights of step %s are kept, the best that were evaluated", self._note()["step"])

    def _keep_if_best(self, model: Any, step: int, figure: float) -> None:
        if not (is_main() and self.guard.window):
            return  # only the guard goes back to them
        if self.best.exists() and float(self._note()["figure"]) >= figure:
            return
        temporary = self.best.with_suffix(".tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        save_file(_trained(model), temporary, metadata={"step": str(step), "figure": repr(figure)})
        temporary.replace(self.best)

    def _note(self) -> dict[str, str]:
        """Step and figure of the best weights."""
        with safe_open(self.best, framework="pt") as file:
            return file.metadata()


def _trained(model: Any) -> dict[str, Any]:
    """The parameters that training changes, by name: all of them, or the adapters'."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
