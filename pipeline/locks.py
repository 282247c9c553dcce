"""One process for each run folder, one training for each GPU. A process that was killed holds nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data.contracts import ContractError

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


class Busy(ContractError):
    """Another process holds what this one needs."""


@contextmanager
def exclusive(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a run's folder for this process, waiting `wait` seconds for another that holds it.

    Raises `Busy` when it is still held then, and `ContractError` when the folder cannot be made or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ContractError(
            f"the run's folder {folder} cannot be made ({error.strerror}); choose another `runs`"
        ) from None
    with _held(folder / ".lock", wait, str(folder), "choose another run name"):
        yield


@contextmanager
def own_gpus(wait: float = 0.0) -> Iterator[None]:
    """Hold the GPUs that this process sees, so that two trainings do not share one; without GPUs, nothing happens.

    Waits and raises as `exclusive` does.
    """
    place = Path("~/.cache/ads-relevance").expanduser()
    with ExitStack() as held:
        for gpu in visible_gpus():
            place.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() else "-" for c in gpu)
            otherwise = "set CUDA_VISIBLE_DEVICES to another"
            held.enter_context(_held(place / f"gpu-{name}.lock", wait, f"GPU {gpu}", otherwise))
        yield


def visible_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, found without loading torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted({name.strip() for name in chosen.split(",")} - {"", "-1", "NoDevFiles"})


@contextmanager
def _held(file: Path, wait: float, what: str, otherwise: str) -> Iterator[None]:
    lock = FileLock(file, poll_interval=POLL_SECONDS, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if wait:
                logger.info("%s; waiting up to %.0f minutes for it", _holder(file, what), wait / 60)
            lock.acquire(timeout=wait)
    except Timeout:
        raise Busy(f"{_holder(file, what)}; wait for it (wait_minutes does), or {otherwise}") from None
    except OSError as error:
        raise ContractError(f"{file} cannot be locked ({error}); put it on a file system with locks") from None
    try:
        file.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        lock.release()


def _holder(file: Path, what: str) -> str:
    return f"{what} is in use by process {file.read_text(encoding='utf-8').strip() or 'unknown'}"
