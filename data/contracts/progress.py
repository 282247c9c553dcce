"""How far a stage's present work is: one log line for people, one callback for whoever shows a bar."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

OnProgress = Callable[[int, int], None]
"""Called with what is done and the total, in the work's own unit."""
_LISTENERS: ContextVar[tuple[OnProgress, ...]] = ContextVar("progress", default=())


def log_progress(logger: logging.Logger, done: int, total: int, message: str, *arguments: object) -> None:
    """Log `message` and tell every listener of this context that `done` of `total` is reached."""
    logger.info(message, *arguments)
    for listener in _LISTENERS.get():
        listener(done, total)


@contextmanager
def on_progress(listener: OnProgress) -> Iterator[None]:
    """Hand the progress that is logged inside the body to `listener` too."""
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(token)
