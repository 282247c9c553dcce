"""Locks of the operating system: one process for each run folder, one training for each GPU.

A process that was killed holds nothing.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data.contracts import ContractError

logger = logging.getLogger(__name__)

_LOOK_EVERY = 5.0  # seconds between two looks at a lock that another process holds


@contextmanager
def exclusive(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a run's folder for this process, waiting `wait` seconds for another that holds it.

    Raises `ContractError` when it is not to be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / ".lock", wait, f"{folder} is", "or choose another run name"):
        yield


@contextmanager
def own_gpus(wait: float = 0.0) -> Iterator[None]:
    """Hold the GPUs that this process sees, so that two trainings do not share one; without GPUs, nothing happens.

    Waits and raises as `exclusive` does.
    """
    with ExitStack() as held:
        for gpu in visible_gpus():
            place = Path("~/.cache/ads-relevance").expanduser()
            place.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() else "-" for c in gpu)
            held.enter_context(
                _held(place / f"gpu-{name}.lock", wait, f"GPU {gpu} is", "or set CUDA_VISIBLE_DEVICES to another")
            )
        yield


def visible_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, found without loading torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted({name.strip() for name in chosen.split(",")} - {"", "-1", "NoDevFiles"})


@contextmanager
def _held(lock: Path, wait: float, what: str, otherwise: str) -> Iterator[None]:
    deadline, told = time.monotonic() + wait, False
    with lock.open("a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = f"{what} in use by process {file.read().strip() or 'unknown'}"
            except OSError as error:
                raise ContractError(f"{lock} cannot be locked ({error}); put it on a file system with locks") from None
            if time.monotonic() >= deadline:
                raise ContractError(f"{holder}; wait for it (wait_minutes does), {otherwise}")
            if not told:
                logger.info("%s; waiting up to %.0f minutes for it", holder, wait / 60)
                told = True
            time.sleep(min(_LOOK_EVERY, max(deadline - time.monotonic(), 0.01)))
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
