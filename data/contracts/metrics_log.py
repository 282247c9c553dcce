"""Training metrics as JSON lines in the stage's folder: the record from which MLflow, report and plots are made."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.contracts.files import write_text


class MetricsLog:
    """Appends `{"step", "phase", "time", name: value, …}` lines to a file; `time` is in milliseconds since 1970.

    Of several processes that train together (`torchrun`) only the main one writes. When a training resumes, steps that it
    repeats replace the lines written before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writes = os.environ.get("RANK", "0") == "0"

    def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Record `values` of `step`; numbers that are not finite are left out."""
        if not self._writes:
            return
        line: dict[str, Any] = {"step": step, "phase": phase, "time": int(1000 * time.time())}
        line |= {name: float(value) for name, value in values.items() if math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self, phase: str) -> list[dict[str, Any]]:
        """What was recorded of `phase` so far, step by step."""
        return [line for line in metric_lines(self.path) if line.pop("phase") == phase]

    def rewind(self, phase: str, step: int) -> None:
        """Drop lines of `phase` after `step`: a resumed training writes them anew."""
        if not self._writes or not self.path.exists():
            return
        lines = [line for line in metric_lines(self.path) if line["phase"] != phase or line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))


def metric_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, oldest first; none where there is no file. What a kill cut short is not among them."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line]
