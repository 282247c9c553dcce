"""The training loop: AdamW, warm-up, level and decay, early stopping on valid, a checkpoint for each epoch."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from data.contracts import ContractError, GradeScale, MetricsLog, log_progress
from student import checkpoint
from student.checkpoint import Progress
from student.config import StudentConfig
from student.dataset import Examples, Tokens, length_grouped, query_grouped, tokenize
from student.metrics import roc_auc
from student.model import load_classifier, pad_token_id, predict_logits, weights_digest
from student.objective import Objective
from student.scorer import softmax

logger = logging.getLogger(__name__)
Array = np.ndarray


@dataclass(frozen=True)
class Fitted:
    """A trained model (that of the best epoch) and how it came about."""

    model: PreTrainedModel
    epochs: int
    best_epoch: int
    steps: int


def fit(
    config: StudentConfig,
    base: Path,
    tokenizer: Tokenizer,
    rows: Examples,
    valid: Examples,
    scale: GradeScale,
    *,
    folder: Path,
    metrics: MetricsLog,
    phase: str,
    device: str,
) -> Fitted:
    """Train on `rows`, choose the epoch on `valid`, and return the model of that epoch.

    Checkpoints live in `folder`; with the same config, data and starting weights a second call goes on from the latest,
    and ends with the same weights as an uninterrupted one. Raises `ContractError` when the loss is no longer a number.
    """
    model = load_classifier(base, scale, max_length=config.max_length, seed=config.seed).to(device)
    pad_id = pad_token_id(model.config)
    tokens = tokenize(tokenizer, rows.queries, rows.ads, pad_id)
    valid_tokens = tokenize(tokenizer, valid.queries, valid.ads, pad_id)
    optimiser = _optimiser(model, config)
    progress = checkpoint.resume(folder, _key(config, model, rows, valid), model, optimiser)
    metrics.rewind(phase, progress.step)
    objective = Objective(config, model, rows, tokens, tokenizer, device)
    steps = config.epochs * math.ceil(len(rows) / config.batch_size)
    model.train(config.dropout)
    while progress.epoch < config.epochs and not progress.finished:
        begin = time.monotonic()
        progress = _epoch(config, model, optimiser, rows, tokens, objective, progress, steps, metrics, phase)
        score, measured = _validate(config, model, valid, valid_tokens, scale, device)
        progress = _judge(progress, score, config)
        metrics.write(phase, progress.step, measured)
        log_progress(
            logger,
            progress.epoch,
            config.epochs,
            "%s: epoch %d of %d, %s, %.0f s",
            *(phase, progress.epoch, config.epochs),
            ", ".join(f"{name} {value:.4f}" for name, value in measured.items()),
            time.monotonic() - begin,
        )
        checkpoint.save(folder, progress, model, optimiser)
    checkpoint.load_best(folder, progress, model)
    return Fitted(model.eval(), progress.epoch, progress.best_epoch, progress.step)


def _epoch(
    config: StudentConfig,
    model: PreTrainedModel,
    optimiser: torch.optim.Optimizer,
    rows: Examples,
    tokens: Tokens,
    objective: Objective,
    progress: Progress,
    steps: int,
    metrics: MetricsLog,
    phase: str,
) -> Progress:
    # Seeded by epoch, so that a resumed run sees the same order and dropout without any saved state.
    torch.manual_seed(config.seed * 1009 + progress.epoch + 1)
    rng = np.random.default_rng([config.seed, progress.epoch])
    if config.margin_weight > 0:
        batches = query_grouped(rows.query_id, config.batch_size, rng)
    else:
        batches = length_grouped(tokens.lengths, config.batch_size, rng)
    step, running = progress.step, []
    for batch in batches:
        rate = config.learning_rate * _schedule(step, steps, config.warmup_ratio, config.decay_ratio)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = objective(batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimiser.step()
        step += 1
        running.append(loss.detach())
        if step % config.log_every == 0 or step == steps:
            mean = float(torch.stack(running).mean())
            if not math.isfinite(mean):
                raise ContractError(f"the student's loss is {mean} at step {step}; lower student.learning_rate")
            metrics.write(phase, step, {"loss": mean, "learning_rate": rate})
            running = []
    return progress.model_copy(update={"epoch": progress.epoch + 1, "step": step})


def _validate(
    config: StudentConfig, model: PreTrainedModel, valid: Examples, tokens: Tokens, scale: GradeScale, device: str
) -> tuple[float, dict[str, float]]:
    """The score that early stopping watches (ROC-AUC, or minus the loss where valid has one class), and all figures."""
    logits = predict_logits(model, tokens, config.eval_batch_size, device)
    if not np.isfinite(logits).all():
        raise ContractError("the student gives values that are not numbers; lower student.learning_rate")
    probs = softmax(logits)
    loss = float(-np.log(np.maximum(probs[np.arange(len(valid)), valid.grade], 1e-12)).mean())
    auc = roc_auc(valid.grade >= scale.relevant_from, probs[:, scale.relevant_from :].sum(axis=1))
    if math.isnan(auc):
        return -loss, {"valid_loss": loss}
    return auc, {"valid_loss": loss, "valid_roc_auc": auc}


def _judge(progress: Progress, score: float, config: StudentConfig) -> Progress:
    if progress.best_score is None or score > progress.best_score:
        return progress.model_copy(
            update={"best_epoch": progress.epoch, "best_score": score, "stale_epochs": 0, "finished": False}
        )
    stale = progress.stale_epochs + 1
    return progress.model_copy(update={"stale_epochs": stale, "finished": stale >= config.patience})


def _schedule(step: int, steps: int, warmup_ratio: float, decay_ratio: float) -> float:
    """Share of the peak learning rate at `step`: up linearly, level, down linearly to 0 (Hu et al., arXiv 2404.06395)."""
    warmup, decay = int(steps * warmup_ratio), steps * decay_ratio
    rise = (step + 1) / (warmup + 1)
    fall = (steps - step) / decay if decay else 1.0
    return max(0.0, min(1.0, rise, fall))


def _optimiser(model: PreTrainedModel, config: StudentConfig) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    exempt = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def _key(config: StudentConfig, model: PreTrainedModel, rows: Examples, valid: Examples) -> str:
    order = hashlib.sha256("\n".join(rows.pair_ids).encode()).hexdigest()
    parts = [config.model_dump_json(), weights_digest(model), rows.digest(), valid.digest(), order]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
