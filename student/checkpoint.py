"""Checkpoints of a training, one for each epoch, so that a killed run goes on as if it had not been killed.

Safetensors and JSON only. A checkpoint is written beside its place and renamed into it; only the latest and the best are
kept. Randomness needs no state: every epoch seeds its own.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import nn

logger = logging.getLogger(__name__)


class Progress(BaseModel):
    """Where a training stands. `key` names what is trained (config, data, starting weights)."""

    key: str
    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_score: float | None = None
    stale_epochs: int = 0
    finished: bool = False


def save(folder: Path, progress: Progress, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Write the state after `progress.epoch` epochs and drop checkpoints that are neither the latest nor the best."""
    folder.mkdir(parents=True, exist_ok=True)
    target, building = _place(folder, progress.epoch), folder / ".building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, building / "model.safetensors")
    state = optimiser.state_dict()["state"]
    tensors = {f"{i}.{name}": value for i, values in state.items() for name, value in values.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, building / "optimiser.safetensors")
    (building / "progress.json").write_text(progress.model_dump_json(indent=2), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)
    keep = {_place(folder, progress.epoch), _place(folder, progress.best_epoch)}
    for old in folder.glob("epoch-*"):
        if old not in keep:
            shutil.rmtree(old)


def resume(folder: Path, key: str, model: nn.Module, optimiser: torch.optim.Optimizer) -> Progress:
    """Load the latest checkpoint of `key` into model and optimiser; without one, empty the folder."""
    paths = folder.glob("epoch-*/progress.json")
    saved = [Progress.model_validate_json(path.read_text(encoding="utf-8")) for path in paths]
    latest = max((one for one in saved if one.key == key), key=lambda one: one.epoch, default=None)
    if latest is None:
        shutil.rmtree(folder, ignore_errors=True)
        return Progress(key=key)
    place = _place(folder, latest.epoch)
    device = str(next(model.parameters()).device)
    model.load_state_dict(load_file(place / "model.safetensors", device=device))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(place / "optimiser.safetensors").items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    logger.info("resumed after epoch %d", latest.epoch)
    return latest


def load_best(folder: Path, progress: Progress, model: nn.Module) -> None:
    """Put the weights of the best epoch into `model`."""
    device = str(next(model.parameters()).device)
    model.load_state_dict(load_file(_place(folder, progress.best_epoch) / "model.safetensors", device=device))


def _place(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:03d}"
