"""How far a Spark job is, while the driver waits for it: its tasks have no channel to the driver while they run."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from data.contracts import first_line

logger = logging.getLogger(__name__)

EVERY = 10.0  # seconds


@contextmanager
def watched(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` every `EVERY` seconds, in a thread, while the body runs, and once more when it ends."""
    finished = threading.Event()

    def loop() -> None:
        over = False
        while not over:
            over = finished.wait(EVERY)
            try:
                look()
            except Exception as error:  # the job itself says what is wrong with its files
                logger.warning("the job's progress is not known: %s", first_line(error))

    # In a copy of this context, so that what it logs belongs to the same flow run.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(loop,), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def duration(seconds: float) -> str:
    """`3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
