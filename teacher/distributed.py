"""One training in several processes (`torchrun`): who writes, and how to wait for the others.

The environment says it before anything of torch.distributed is set up; alone, a process is the main one.
"""

from __future__ import annotations

import os

import torch.distributed


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
