"""Benchmarks that give each side, or each run, a process of its own: starting it, and bringing home what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

TORCH = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
"""Environment of a process that computes with torch: idle threads do not spin, tokenizers do not fork threads."""

_FOUND = "FOUND "


def answer(found: Any) -> None:
    """In the child: hand `found`, which is JSON-able, to whoever asked."""
    print(_FOUND + json.dumps(found))


def ask(module: str, *arguments: str, environment: Mapping[str, str]) -> Any:
    """Run `module` with the arguments in a process of its own; what it gave to `answer`. A failure ends the benchmark."""
    output = _run(module, arguments, environment, stdout=subprocess.PIPE)
    line = next(line for line in output.splitlines() if line.startswith(_FOUND))
    return json.loads(line.removeprefix(_FOUND))


def run(module: str, *arguments: str, one_thread: bool) -> None:
    """Run `module` with the arguments in a process of its own, computing with torch. A failure ends the benchmark."""
    _run(module, arguments, TORCH | ({"OMP_NUM_THREADS": "1"} if one_thread else {}), stdout=None)


def _run(module: str, arguments: tuple[str, ...], environment: Mapping[str, str], stdout: int | None) -> str:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=False, env=os.environ | environment, stdout=stdout, text=True)
    if done.returncode:
        raise SystemExit(f"the process '{' '.join(arguments[-2:])}' of {module} failed: see above")
    return done.stdout or ""
