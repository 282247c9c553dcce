"""The training loop: AdamW, warm-up, level and decay, early stopping on valid, a checkpoint for each epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from data.contracts import ContractError, MetricsLog, digest, digest_files, enough_memory, log_progress
from student import checkpoint
from student.checkpoint import Progress
from student.config import StudentConfig
from student.dataset import Examples, Tokens, query_grouped, random_batches
from student.ensemble import MIN_ROWS
from student.metrics import roc_auc
from student.objective import Objective
from student.reader import Reader, predict_logits
from student.scorer import softmax
from student.setup import Setup
from student.vocabulary import occurring_tokens

logger = logging.getLogger(__name__)
Array = np.ndarray
_CHECKPOINT = 2  # raised by hand when a checkpoint holds something else


@dataclass(frozen=True)
class Fitted:
    """A trained model (that of the best epoch) and how it came about."""

    reader: Reader
    epochs: int
    best_epoch: int
    steps: int


@enough_memory(
    "the student",
    "halve student.batch_size, student.eval_batch_size or student.max_length, or set student.device = 'cpu'; finished "
    "epochs are kept",
)
def fit(setup: Setup, rows: Examples, valid: Examples, *, folder: Path, metrics: MetricsLog, phase: str) -> Fitted:
    """Train on `rows`, choose the epoch on `valid`, and return the model of that epoch.

    Where both have soft labels, what is trained is also what chooses: the mean cross-entropy against human grades and soft
    labels, mixed by `gold_mix`; two epochs differ by less than the noise of a ROC-AUC. Otherwise it is the ROC-AUC.
    Checkpoints live in `folder`; with the same config, data and starting weights a second call goes on from the latest,
    and ends with the same weights as an uninterrupted one. Raises `ContractError` when the loss is no longer a number or
    memory is not enough.
    """
    if not rows.n_annotated:
        valid = valid.gold_only()
    reader = setup.reader()
    objective = Objective(setup, reader, rows)
    valid_tokens = setup.tokens(reader.model, valid)
    with occurring_tokens(reader.model, np.union1d(objective.token_ids(), valid_tokens.occurring())):
        progress = _train(setup, objective, rows, valid, valid_tokens, folder=folder, metrics=metrics, phase=phase)
    reader.model.eval()
    return Fitted(reader, progress.epoch, progress.best_epoch, progress.step)


def _train(
    setup: Setup,
    objective: Objective,
    rows: Examples,
    valid: Examples,
    valid_tokens: Tokens,
    *,
    folder: Path,
    metrics: MetricsLog,
    phase: str,
) -> Progress:
    """Train the objective's model in place, to the weights of the best epoch, from the latest checkpoint in `folder` on."""
    config, reader = setup.config, objective.reader
    model = reader.model
    optimiser = _optimiser(model, config)
    progress = checkpoint.resume(folder, _key(setup, rows, valid), model, optimiser)
    metrics.rewind(phase, progress.step)
    model.train(config.dropout)
    while progress.epoch < config.epochs and not progress.finished:
        begin = time.monotonic()
        # Seeded by epoch, so that a resumed run sees the same order and dropout without any saved state.
        torch.manual_seed(config.seed * 1009 + progress.epoch + 1)
        rng = np.random.default_rng([config.seed, progress.epoch])
        if config.margin_weight + config.listnet_weight + config.lambda_weight > 0:
            batches = query_grouped(rows.query_id, config.batch_size, rng)
        else:
            batches = random_batches(len(rows), config.batch_size, rng)
        _epoch(objective, optimiser, batches, progress.step, partial(metrics.write, phase))
        score, measured = _validate(setup, predict_logits(reader, valid_tokens, config.eval_batch_size), valid)
        progress = _judge(progress, len(batches), score, config.patience)
        metrics.write(phase, progress.step, measured)
        log_progress(
            logger,
            progress.epoch,
            config.epochs,
            "%s: epoch %d of %d, %s, %.0f s",
            phase,
            progress.epoch,
            config.epochs,
            ", ".join(f"{name} {value:.4f}" for name, value in measured.items()),
            time.monotonic() - begin,
        )
        checkpoint.save(folder, progress, model, optimiser)
    checkpoint.load_best(folder, progress, model)
    return progress


def _epoch(
    objective: Objective,
    optimiser: torch.optim.Optimizer,
    batches: list[Array],
    step: int,
    log: Callable[[int, dict[str, float]], None],
) -> None:
    """One optimiser step for each batch of row numbers, from `step` on."""
    config, steps, losses = objective.config, objective.config.epochs * len(batches), []
    for place, batch in enumerate(batches, 1):
        rate = config.learning_rate * schedule(step, steps, config.warmup_ratio, config.decay_ratio)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = objective.backward(batch)
        torch.nn.utils.clip_grad_norm_(objective.reader.model.parameters(), config.max_grad_norm)
        optimiser.step()
        step += 1
        losses.append(loss)
        if step % config.log_every == 0 or place == len(batches):
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean):
                raise ContractError(f"the student's loss is {mean} at step {step}; lower student.learning_rate")
            log(step, {"loss": mean, "learning_rate": rate})
            losses = []


def schedule(step: int, steps: int, warmup_ratio: float, decay_ratio: float) -> float:
    """Share of the peak learning rate at `step`: up linearly, level, down linearly to 0 (Hu et al., arXiv 2404.06395)."""
    warmup, decay = int(steps * warmup_ratio), steps * decay_ratio
    rise = (step + 1) / (warmup + 1)
    fall = (steps - step) / decay if decay else 1.0
    return max(0.0, min(1.0, rise, fall))


def _validate(setup: Setup, logits: Array, valid: Examples) -> tuple[float, dict[str, float]]:
    """The score that early stopping watches (see `fit`; minus the loss where valid has one class), and all metrics.

    `logits` (N, K) are those of `valid`.
    """
    if not np.isfinite(logits).all():
        raise ContractError("the student gives values that are not numbers; lower student.learning_rate")
    probs = softmax(logits)
    loss = float(-np.log(np.maximum(probs[np.arange(len(valid)), valid.grade], 1e-12)).mean())
    auc, measured = roc_auc(setup.relevant(valid), setup.p_relevant(probs)), {"valid_loss": loss}
    if not math.isnan(auc):
        measured["valid_roc_auc"] = auc
    if (at := np.flatnonzero(valid.soft.sum(axis=1) > 0)).size >= MIN_ROWS:
        soft = -float((valid.soft[at] * np.log(np.maximum(probs[at], 1e-12))).sum(axis=1).mean())
        mix = setup.config.gold_mix
        return -(mix * loss + (1 - mix) * soft), measured | {"valid_soft_loss": soft}
    return measured.get("valid_roc_auc", -loss), measured


def _judge(progress: Progress, steps: int, score: float, patience: int) -> Progress:
    """Where the training stands after one more epoch of `steps` steps, whose model has `score` on valid."""
    after = progress.model_copy(update={"epoch": progress.epoch + 1, "step": progress.step + steps})
    if after.best_score is None or score > after.best_score:
        best = {"best_epoch": after.epoch, "best_score": score, "stale_epochs": 0, "finished": False}
        return after.model_copy(update=best)
    stale = after.stale_epochs + 1
    return after.model_copy(update={"stale_epochs": stale, "finished": stale >= patience})


def _optimiser(model: PreTrainedModel, config: StudentConfig) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    exempt = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def _key(setup: Setup, rows: Examples, valid: Examples) -> str:
    start = digest_files([setup.base / "config.json", *sorted(setup.base.glob("*.safetensors"))])
    return digest([_CHECKPOINT, setup.config.model_dump(), start, rows.digest(), valid.digest(), list(rows.pair_ids)])
