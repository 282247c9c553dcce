"""The AGPO phase of the training: dataset, reward and trainer arguments from our config."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.contracts import ContractError, MetricsLog
from teacher.advantages import ESTIMATORS, agpo
from teacher.collapse_detector import collapse, idle_steps
from teacher.config import AGPOConfig, TeacherConfig
from teacher.distributed import from_main, is_main, wait_for_all, world_size
from teacher.engines.config import VLLMConfig
from teacher.examples import Problem
from teacher.loop import StepLog, shared_arguments, train
from teacher.model import without_dropout
from teacher.trainer import Advantages, AGPOTrainer
from teacher.trl_parts import GRPOConfig, load_vllm, vllm_generation
from teacher.verifier import Judge, reward

if TYPE_CHECKING:
    from teacher.engines.vllm_engine import VLLMEngine

logger = logging.getLogger(__name__)

Evaluate = Callable[[Any, int], float]
"""From the live model and its step to the metric by which weights are compared, the higher the better."""


class PolicyResult(NamedTuple):
    """The step whose weights the model holds after training, and why the collapse detector stopped it, if it did."""

    step: int
    stopped: str | None


def require_rollouts(settings: AGPOConfig) -> None:
    """Raise `ContractError` when this machine cannot sample as the settings ask."""
    if settings.rollouts == "vllm-server" and not torch.cuda.is_available():
        raise ContractError(
            "teacher.agpo.rollouts = 'vllm-server' needs a CUDA GPU here and at the server, since the weights travel over "
            "NCCL; use 'vllm' (in this process) or 'transformers'"
        )


def open_rollout_engine(config: TeacherConfig, folder: Path) -> VLLMEngine | None:
    """vLLM in this process for rollouts and evaluations, if the config asks for it; begins with the model in `folder`."""
    if config.agpo.rollouts != "vllm":
        return None
    from teacher.engines.vllm_engine import VLLMEngine

    state = PartialState(cpu=not torch.cuda.is_available())  # first, so that the trainers' process group is theirs
    options: dict[str, Any] = {
        "logprobs_mode": "processed_logprobs",  # TRL's correction of the importance ratio compares with them
        "seed": state.process_index,
    }
    if world_size() > 1:
        options["distributed_executor_backend"] = "external_launcher"  # each process has an engine of its own
    # The folder's own number format may be float32, for the sake of training.
    settings = VLLMConfig(dtype=config.dtype, gpu_memory_utilization=0.3)
    return VLLMEngine(settings, folder, updatable=True, **options)


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
    initial_metric: float,
    engine: VLLMEngine | None = None,
) -> PolicyResult:
    """Train `model` in place with AGPO on problems whose answers `judge` can verify.

    `evaluate` is called every `evaluation.every` steps and, where the best weights are kept, at the end; `initial_metric` is
    its value for the weights given. Checkpoints go to `out`; an interrupted run continues from the last one. After a
    collapse `model` holds the best evaluated weights, whatever `agpo.keep` says. `engine` is that of `open_rollout_engine`.
    """
    settings = config.agpo
    compared = settings.keep == "best" or settings.patience > 0 or settings.collapse.window > 0
    best = BestWeights(out / "best.safetensors", keep=compared)
    watch = _Watch(config, log, evaluate, best, initial_metric)
    without_dropout(model)  # more than TRL's own, and before rollouts are sampled
    trainer = AGPOTrainer(
        model=model,
        args=_arguments(config, out, engine),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([vars(problem) for problem in problems]),
        reward_funcs=_verifier(frozenset(model.generation_config.eos_token_id), judge),
        advantages=estimator(config.agpo),
        dynamic_sampling=config.agpo.dynamic_sampling,
        shared_prefix=config.agpo.shared_prefix,
        micro_batch_tokens=config.agpo.micro_batch_tokens,
        sft_weight=config.agpo.sft_weight,
        callbacks=[watch],
    )
    train(trainer, log, "agpo", memory="teacher.agpo.micro_batch_tokens (or prompts_per_step, if it was in sampling)")
    step = trainer.state.global_step
    if settings.keep == "best" and not (watch.collapsed or watch.gains_no_more):
        watch.evaluate_at(model, step)
    wait_for_all()
    if settings.keep == "best" or watch.collapsed:
        step = best.restore(model)
    return PolicyResult(step, watch.collapsed)


def _arguments(config: TeacherConfig, out: Path, engine: VLLMEngine | None) -> GRPOConfig:
    settings = config.agpo
    return GRPOConfig(
        **shared_arguments(config, out),
        **_rollout_arguments(config, engine),
        **_loss_arguments(settings),
        per_device_train_batch_size=settings.prompts_per_step * settings.group_size // world_size(),
        steps_per_generation=settings.generation_batches,
        num_generations=settings.group_size,
        max_completion_length=config.max_completion_tokens,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(settings.warmup * settings.steps),
        max_grad_norm=settings.max_grad_norm,
        temperature=settings.temperature,
        beta=settings.kl,
        mask_truncated_completions=settings.mask_truncated,
        logging_steps=1,
        save_steps=settings.checkpoint_every,
        ddp_timeout=7200,  # the others wait while the main process evaluates
        disable_dropout=True,
        router_aux_loss_coef=0.0,  # it takes every prompt's repeated form, and some mixtures of experts break TRL's count
    )


def _loss_arguments(settings: AGPOConfig) -> dict[str, Any]:
    loss = settings.loss or ("dr_grpo" if settings.estimator == "dr_grpo" else "dapo")
    return {
        # GSPO is the mean over sequences of GRPO's loss, with one ratio for a sequence.
        "loss_type": "grpo" if loss == "gspo" else loss,
        "importance_sampling_level": "sequence" if loss == "gspo" else "token",
        "epsilon": settings.clip_low,
        # CISPO's bound is of the ratio itself.
        "epsilon_high": settings.clip_high + (loss == "cispo"),
        "entropy_coef": settings.entropy_bonus,
    }


def _rollout_arguments(config: TeacherConfig, engine: VLLMEngine | None) -> dict[str, Any]:
    """GRPOConfig's settings for who samples."""
    settings = config.agpo
    if settings.rollouts == "transformers":
        return {}
    load_vllm()
    if settings.rollouts == "vllm-server":
        return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": settings.rollout_server}
    # TRL's own engine would be a second one.
    vllm_generation.LLM = lambda **unused: engine.llm if engine else None
    return {"use_vllm": True, "vllm_mode": "colocate"}


def _verifier(ends: frozenset[int], judge: Judge) -> Callable[..., list[float]]:
    """The reward function that TRL calls: ±1 for each completion, and its parse and truncation shares.

    A completion is finished if its last token is one of `ends`.
    """

    def verifier(
        completions: list[str],
        completion_ids: list[list[int]],
        gold: list[Any],
        log_metric: Callable[[str, float], None],
        **unused: Any,
    ) -> list[float]:
        finished = [bool(ids) and ids[-1] in ends for ids in completion_ids]
        verdicts = [judge(text, answer) for text, answer in zip(completions, gold, strict=True)]
        parsed = [done and verdict is not None for done, verdict in zip(finished, verdicts, strict=True)]
        log_metric("parse_rate", sum(parsed) / len(parsed))
        log_metric("truncated", 1 - sum(finished) / len(finished))
        return [reward(verdict, done) for verdict, done in zip(verdicts, finished, strict=True)]

    return verifier


class BestWeights:
    """The trained weights that did best in an evaluation so far, the first of equals, in a file."""

    def __init__(self, path: Path, keep: bool) -> None:
        self.path, self.keep = path, keep

    def offer(self, model: Any, step: int, metric: float) -> None:
        """Save the model's weights if no better ones are in the file."""
        if not (is_main() and self.keep) or (self.path.exists() and float(self._note()["figure"]) >= metric):
            return
        temporary = self.path.with_suffix(".tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        save_file(_trained(model), temporary, metadata={"step": str(step), "figure": repr(metric)})
        temporary.replace(self.path)

    @property
    def step(self) -> int:
        """The step that the weights in the file are of."""
        return int(self._note()["step"])

    def restore(self, model: Any) -> int:
        """Load them (the first ones, if training never made better ones) into `model`; returns their step."""
        best = load_file(self.path)
        with torch.no_grad():
            for name, parameter in _trained(model).items():
                parameter.copy_(best[name])
        logger.info("the teacher gets the weights of step %d, the best that were evaluated", self.step)
        return self.step

    def _note(self) -> dict[str, str]:
        """`step` and `figure` (their metric) of the weights in the file."""
        with safe_open(self.path, framework="pt") as file:
            return file.metadata()


class _Watch(StepLog):
    """Evaluates at intervals, keeps the best weights, and stops a training that collapses, that no longer gains, or that
    reaches its token limit."""

    shown = ("accuracy", "parse_rate", "entropy")

    def __init__(
        self, config: TeacherConfig, log: MetricsLog, evaluate: Evaluate, best: BestWeights, initial_metric: float
    ) -> None:
        super().__init__(log, "agpo")
        self.every, self.settings = config.evaluation.every, config.agpo
        self.evaluate, self.best, self.initial_metric = evaluate, best, initial_metric
        self.history: list[dict[str, float]] = []
        self.collapsed: str | None = None
        self.gains_no_more = False
        self._evaluated = 0
        self._clock = (time.monotonic(), 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self.history = self.log.read("agpo")
        self.log.rewind("valid_agpo", min(state.global_step, state.max_steps - 1))  # the others are evaluated again
        self._clock = (time.monotonic(), float(state.num_input_tokens_seen))
        if not self.best.path.exists():
            self.best.offer(model, 0, self.initial_metric)
        self._check_patience(state.global_step, control)

    def on_values(self, state: Any, control: Any, values: dict[str, float]) -> None:
        now, tokens = time.monotonic(), values.get("num_tokens", 0.0)
        values["tokens_per_second"] = (tokens - self._clock[1]) / max(now - self._clock[0], 1e-9)
        self._clock = (now, tokens)
        super().on_values(state, control, values)
        self.history.append(values)
        if idle_steps(self.history) == 1:
            logger.warning("agpo: step %d taught nothing: each group's rewards are all the same", state.global_step)
        self.collapsed = collapse(self.history, self.settings.collapse)
        if self.collapsed:
            logger.error("AGPO is stopped at step %d: %s", state.global_step, self.collapsed)
            control.should_training_stop = True
        limit, sampled = self.settings.max_sampled_tokens, sum(step.get("sampled_tokens", 0.0) for step in self.history)
        if limit and sampled >= limit:
            logger.info("AGPO ends at step %d: %d tokens were sampled", state.global_step, sampled)
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        step = state.global_step
        if not self.every or step % self.every or step >= state.max_steps:
            return
        self.evaluate_at(model, step)
        self._check_patience(step, control)

    def _check_patience(self, step: int, control: Any) -> None:
        """Stop if the last evaluations were no better; also asked after a resume, which may begin right behind them."""
        if not self.settings.patience:
            return
        best = from_main(self.best.step if is_main() else 0)
        if step // self.every * self.every - best >= self.settings.patience * self.every:
            logger.info("AGPO ends at step %d: no better %s since step %d", step, self.settings.metric, best)
            self.gains_no_more = control.should_training_stop = True

    def evaluate_at(self, model: Any, step: int) -> None:
        """Compare the weights of `step` with the best so far, unless that is done."""
        if is_main() and self._evaluated != step:
            self.best.offer(model, step, self.evaluate(model, step))
        self._evaluated = step


def _trained(model: Any) -> dict[str, Any]:
    """The parameters that training changes, by name: all of them, or the adapters'."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
