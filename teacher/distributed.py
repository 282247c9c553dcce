"""One training in several processes: `torchrun` starts them, accelerate joins them in the trainers.

The environment says who a process is before anything of torch.distributed is set up; alone, a process is the main one. On a
machine without a GPU the processes share the CPU (gloo): good for a test, not for speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed

from data.contracts import read_json, write_json


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's place among those of its machine, and its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files, evaluates and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Return once every process is here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def from_main(value: Any) -> Any:
    """The main process's `value`, on every process; all must call it."""
    if world_size() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def launch(module: str, processes: int, arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run `python -m module TASK RESULT` in `processes` processes; returns the JSON object that they leave in RESULT.

    TASK is a JSON file in `folder` with the arguments; the main process writes RESULT.

    Raises:
        RuntimeError: a process failed; its own message stands above in the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task, result = folder / "launch.json", folder / "launch-result.json"
    result.unlink(missing_ok=True)
    write_json(task, arguments)
    # Everything but the files' own paths is fixed text: nothing of the data becomes a word of this command.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*command, "-m", module, str(task.resolve()), str(result.resolve())], check=False)
    if done.returncode or not result.exists():
        raise RuntimeError(
            f"the training in {processes} processes failed with exit code {done.returncode}: see its messages above; "
            "running it again resumes from the last checkpoint"
        )
    answer = read_json(result)
    task.unlink()
    result.unlink()
    return answer
