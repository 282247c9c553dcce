"""A ladder of sizes: students of fewer layers, cut from the trained one and taught by it, each with an export of its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from data.contracts import ContractError, StageOutput, read_json, write_json
from student.config import ExportConfig
from student.dataset import Examples
from student.export import export_student
from student.model import quiet_transformers

logger = logging.getLogger(__name__)
Array = np.ndarray
FOLDER = "layers-{}"
"""Of a smaller student, in the folders of the student's and of the export's stage."""
LADDER = "ladder.json"


def layers_of(model: PreTrainedModel) -> int:
    """The model's number of layers; 0 where its config names none."""
    return int(getattr(model.config, "num_hidden_layers", 0))


def check_layers(layers: Sequence[int], model: PreTrainedModel) -> None:
    """Raise `ContractError` when smaller students of so many layers cannot be made of `model`."""
    depth = layers_of(model)
    if max(layers, default=0) > depth:
        raise ContractError(
            f"student.layers has {max(layers)}, but the encoder has {depth} layers; name smaller numbers"
        )
    if layers and _stack(model) is None:
        kind = model.config.model_type
        raise ContractError(f"a {kind} cannot be cut, since its layers are one; leave student.layers empty")


def cut(model: PreTrainedModel, layers: int, folder: Path) -> Path:
    """Write to `folder` a classifier with `layers` of the layers of `model`, first and last among them; returns it."""
    depth, stack = layers_of(model), _stack(model)
    chosen = np.linspace(0, depth - 1, layers).round().astype(int)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in chosen]
    weights = model.state_dict()
    state = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{stack}.")}
    for new, old in enumerate(chosen):
        start = f"{stack}.{old}."
        state |= {f"{stack}.{new}.{n.removeprefix(start)}": t for n, t in weights.items() if n.startswith(start)}
    with quiet_transformers():
        smaller = AutoModelForSequenceClassification.from_config(config)
        smaller.load_state_dict(state)
        smaller.save_pretrained(folder)
    return folder


def taught_by(rows: Examples, probs: Array, gold_mix: float) -> Examples:
    """The rows, taught by the larger student too: its probabilities (N, K) stand beside the teacher's with equal share."""
    annotated = rows.soft.sum(axis=1, keepdims=True) > 0
    mix = np.where(rows.grade >= 0, gold_mix, 0.0)
    return replace(rows, soft=np.where(annotated, (rows.soft + probs) / 2, probs), mix=mix)


def export_sizes(config: ExportConfig, trained: Path, pairs: Path, out: Path) -> StageOutput:
    """Export the size that `config.layers` names into `out`, and each other one into `out/layers-N`.

    `trained` is the output of the student's stage. With more than one size `out/ladder.json` says how good and how fast
    each one is. Raises `ContractError` as `export_student` does, and for a size that is not there; the failure of a size
    that is not the chosen one is a warning and is in the ladder.
    """
    folders = [trained / "model", *trained.glob(FOLDER.format("*"))]
    sizes = {int(read_json(folder / "student.json").get("layers", 0)): folder for folder in folders}
    chosen = config.layers or max(sizes)
    if chosen not in sizes:
        names = ", ".join(map(str, sorted(sizes)))
        raise ContractError(
            f"there is no student of export.layers = {chosen} layers, only of {names}; see student.layers"
        )
    result = export_student(config, sizes[chosen], pairs, out)
    if len(sizes) == 1:
        return result
    systems = {system["name"]: system["metrics"] for system in read_json(trained / "evaluation.json")["systems"]}
    ladder: list[dict[str, Any]] = []
    for layers, folder in sorted(sizes.items()):
        place, fault = out if layers == chosen else out / FOLDER.format(layers), ""
        if layers != chosen:
            try:
                export_student(config, folder, pairs, place)
            except ContractError as error:
                fault = str(error)
                logger.warning("export: the student of %d layers is left out: %s", layers, error)
        quality = systems["student" if layers == max(sizes) else f"student_{layers}_layers"]["roc_auc"]
        size = {"layers": layers, "chosen": layers == chosen, "fault": fault, "roc_auc": quality}
        ladder.append(size | {"export": read_json(place / "export.json")})
    write_json(out / LADDER, {"sizes": ladder})
    return result


def evaluated(trained: Path, export: Path) -> Path:
    """Where the predictions and the floor of the exported size lie, within the output of the student's stage."""
    folder = trained / FOLDER.format(read_json(export / "student.json").get("layers"))
    return folder if folder.is_dir() else trained


def _stack(model: PreTrainedModel) -> str | None:
    """Name of the list of layers; None where they are shared, as ALBERT's are."""
    depth = layers_of(model)
    lists = ((name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList))
    return next((name for name, part in lists if len(part) == depth), None)
