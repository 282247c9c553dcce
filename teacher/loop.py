"""What warm start and AGPO share: settings of the Hugging Face trainers, resuming, and the log of every step."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from data.contracts import ContractError, MetricsLog, enough_memory, log_progress
from teacher.config import TeacherConfig
from teacher.distributed import is_main, wait_for_all

logger = logging.getLogger(__name__)


def shared_arguments(config: TeacherConfig, out: Path) -> dict[str, Any]:
    """Arguments that both trainers take; checkpoints go to `out`, of which the last one is kept."""
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(out),
        "save_strategy": "steps",
        "save_total_limit": 1,
        "seed": config.seed,
        "use_cpu": not cuda,
        "bf16": config.dtype == "bfloat16",
        "gradient_checkpointing": config.gradient_checkpointing,
        "dataloader_pin_memory": cuda,
        "report_to": [],
        "disable_tqdm": True,
    }


def train(trainer: Trainer, log: MetricsLog, phase: str, memory: str) -> None:
    """Train to the end, from the last checkpoint of an interrupted call where there is one.

    Raises `ContractError` when memory is not enough; `memory` is the setting that a step's need of it grows with.
    """
    trainer.remove_callback(PrinterCallback)  # our own progress lines say it
    trainer.add_callback(FiniteGradients(phase))
    out = trainer.args.output_dir
    if is_main():
        for folder in Path(out).glob("checkpoint-*"):
            if not (folder / "trainer_state.json").exists():  # written last: a kill has left half of a checkpoint
                shutil.rmtree(folder)
    wait_for_all()
    checkpoint = get_last_checkpoint(out) if Path(out).exists() else None
    begin = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    log.rewind(phase, begin)
    wait_for_all()  # every process must read the same history
    logger.info("%s: %d examples, steps %d to %d", phase, len(trainer.train_dataset), begin, trainer.args.max_steps)
    others = "teacher.lora_rank = 16 or teacher.gradient_checkpointing = true"
    with enough_memory(phase, f"halve {memory}, or set {others}; what a checkpoint holds is not lost"):
        trainer.train(resume_from_checkpoint=checkpoint)


class FiniteGradients(TrainerCallback):
    """Leaves out the steps whose gradient is not finite, and ends a training that has several of them in a row.

    One such step would make every weight NaN, and the trainer would go on and log a loss of 0 (seen on an H100 in bfloat16,
    by the fault of torch that `teacher.shared_prefix` now avoids).
    """

    patience = 5

    def __init__(self, phase: str) -> None:
        self.phase, self.in_a_row = phase, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Called when the gradients are complete and clipped; raises `ContractError` at the last of several bad steps."""
        model = more["model"]
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if not gradients or torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            self.in_a_row = 0
            return
        self.in_a_row += 1
        step = state.global_step + 1
        if self.in_a_row == self.patience:
            raise ContractError(
                f"{self.phase}: the gradient was not finite in {self.patience} steps in a row, the last of them step "
                f"{step}; lower the learning rate, or set teacher.dtype = 'float32' or teacher.agpo.shared_prefix = false"
            )
        logger.warning("%s: step %d is left out, as its gradient is not finite", self.phase, step)
        model.zero_grad(set_to_none=True)  # the optimiser passes by what has no gradient


class StepLog(TrainerCallback):
    """Writes what the trainer logs into the metrics log, and says how far the training is."""

    shown: tuple[str, ...] = ("loss",)

    def __init__(self, log: MetricsLog, phase: str) -> None:
        self.log, self.phase = log, phase

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Called by the trainer every `logging_steps`, and once at the end with a summary, which is left out."""
        if not logs or "loss" not in logs:
            return
        values = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        self.on_values(state, control, values)

    def on_values(self, state: Any, control: Any, values: dict[str, float]) -> None:
        """Record the metrics of the step that `state` is at."""
        self.log.write(self.phase, state.global_step, values)
        shown = ", ".join(f"{name} {values[name]:.3f}" for name in self.shown if name in values)
        step, total = state.global_step, state.max_steps
        log_progress(logger, step, total, "%s: step %d of %d, %s", self.phase, step, total, shown)
