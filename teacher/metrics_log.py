"""Training metrics as JSON lines beside the checkpoints, and to whoever listens."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from teacher.ranks import is_main

logger = logging.getLogger(__name__)

Log = Callable[[int, dict[str, float]], None]


class MetricsLog:
    """Appends `{"step", "phase", name: value, …}` lines to a file and hands them to `listener` as `phase/name`.

    A listener that fails (a tracking server that is down) must not stop the training: it is dropped with a warning, and
    the file stays complete. When a training resumes, steps that it repeats replace the lines written before.
    """

    def __init__(self, path: Path, listener: Log | None) -> None:
        self.path = path
        self.listener = listener

    def write(self, phase: str, step: int, values: dict[str, float]) -> None:
        """Record `values` of `step` (in the main process only); numbers that are not finite are left out."""
        if not is_main():
            return
        kept = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "phase": phase, **kept}) + "\n")
        self._tell(phase, step, kept)

    def replay(self) -> None:
        """Hand everything in the file to the listener, when another process wrote it."""
        for values in self._lines():
            self._tell(values.pop("phase"), values.pop("step"), values)

    def _tell(self, phase: str, step: int, values: dict[str, float]) -> None:
        if self.listener is None:
            return
        try:
            self.listener(step, {f"{phase}/{name}": value for name, value in values.items()})
        except Exception as error:  # any failure of the listener: it is not the training's
            logger.warning("metrics are only kept in %s from here on: %s", self.path, error)
            self.listener = None

    def read(self, phase: str) -> list[dict[str, float]]:
        """What was recorded of `phase` so far, step by step."""
        return [line for line in self._lines() if line.pop("phase") == phase]

    def rewind(self, phase: str, step: int) -> None:
        """Drop lines of `phase` after `step`, and of what follows it: a resumed training writes them anew."""
        if not is_main() or not self.path.exists():
            return
        kept = [line for line in self._lines() if line["phase"] != phase or line["step"] <= step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        # A kill can cut the last line short: what has no line end is not there.
        whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines() if line]
