"""An ONNX model on disk: one file or, where its weights are many, a second one beside it that holds them.

Protobuf writes no more than 2 GiB into one file, so larger weights lie in `NAME.onnx.data`, which the model names by its
file name: the two are moved, copied and counted together. What was left out: one matrix or table of embeddings that is still
larger than 2 GiB in int8 (or was not quantised), which the onnx package cannot add to a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

INLINE_BYTES = 1536 * 2**20
"""Weights up to this size are inside the model's file; torch.onnx takes no more either, whatever it is asked for."""


def data_file(model: Path) -> Path:
    """Where the weights of an ONNX file are when they are not in it."""
    return model.with_name(f"{model.name}.data")


def files_of(model: Path) -> list[Path]:
    """The ONNX file and, if there is one, the file of its weights."""
    return [path for path in (model, data_file(model)) if path.exists()]


def remove(models: Iterable[Path]) -> None:
    """Delete these ONNX files and those of their weights, as far as they are there."""
    for path in models:
        for file in files_of(path):
            file.unlink()
