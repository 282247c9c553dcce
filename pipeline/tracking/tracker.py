"""Tracks a run with MLflow while it is under way: a thread replays the run's folder every few seconds.

The work never waits for the store and never fails by it. What a store that is away does not get, it gets from the next flow
of the run, or by `python -m pipeline.tracking RUN`. What was left out: autologging, which patches the libraries it watches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from data.contracts import first_line
from pipeline.executions import read_executions
from pipeline.redact import redact_text
from pipeline.tracking.replay import Replay, is_complete, read_notes

if TYPE_CHECKING:
    from pipeline.settings import PipelineConfig

logger = logging.getLogger(__name__)

SEND_SECONDS = 5.0  # between two sendings to a store that answers
FIRST_PAUSE, LAST_PAUSE = 2.0, 60.0  # before the next try when it does not
CLOSE_SECONDS = 60.0  # how long the end of a flow waits for a store that takes nothing


class Sender(threading.Thread):
    """Sends a run's folder to its store until it is closed."""

    def __init__(self, replay: Replay) -> None:
        super().__init__(name=f"mlflow {replay.folder.name}", daemon=True)
        self.replay = replay
        self.error: str | None = None
        """Why the last sending did not succeed, empty when it did; None before it has ended."""
        self._closing = threading.Event()

    def run(self) -> None:
        """Send, ever more rarely while the store is away, and once more when closed."""
        pause, is_last, run, uri = 0.0, False, self.replay.folder, redact_text(self.replay.uri)
        while not is_last:
            is_last, was_away = self._closing.wait(pause), bool(self.error)
            self.error = self.replay.send()
            pause = SEND_SECONDS if not self.error else min(2 * pause, LAST_PAUSE) if was_away else FIRST_PAUSE
            if was_away and not self.error:
                logger.info("MLflow (%s) answers again: run %s is tracked on", uri, run.name)
            if self.error and not was_away and not is_last:
                logger.warning("MLflow (%s) does not take all of run %s; the work goes on, everything is kept in %s and "
                               "sent later: %s", uri, run.name, run, self.error)  # fmt: skip

    def close(self) -> None:
        """Send what is left, as far as the store answers, and warn about what it does not have."""
        self._closing.set()
        begin = time.monotonic()
        while self.is_alive():
            answered_at = self.replay.answered_at
            # A store that answers may be busy with something large, such as a model.
            if (self.error or not answered_at) and time.monotonic() > max(begin, answered_at) + CLOSE_SECONDS:
                break
            self.join(0.1)
        if lacking := _missing(self.replay.folder):
            reason, sentence = self.error or "the store does not answer", next(iter(lacking.values()))
            logger.warning("%s of run %s: %s (%s)", ", ".join(lacking), self.replay.folder.name, sentence, reason)


_sender: ContextVar[Sender | None] = ContextVar("sender", default=None)


@contextmanager
def tracking(settings: PipelineConfig) -> Iterator[None]:
    """Keep MLflow's copy of the run's folder up to date while the body runs; inside another `tracking`, that one does it."""
    if not settings.tracking.enabled or _sender.get() is not None:
        yield
        return
    settings.folder.mkdir(parents=True, exist_ok=True)
    try:
        sender = Sender(Replay(settings.folder, settings.tracking_uri))
    except ImportError as error:
        logger.warning("run %s is not tracked, since MLflow cannot be loaded: %s", settings.run, first_line(error))
        yield
        return
    sender.start()
    token = _sender.set(sender)
    try:
        yield
    finally:
        _sender.reset(token)
        sender.close()


def untracked(folder: Path) -> dict[str, str]:
    """What MLflow is not known to have of a run's folder: by stage (or `flow`), a sentence with the remedy.

    Nothing while the store answers the flow that is under way.
    """
    sender = _sender.get()
    return {} if sender is not None and not sender.error else _missing(folder)


def _missing(folder: Path) -> dict[str, str]:
    notes = read_notes(folder)
    over = [each for each in read_executions(folder) if each.tracking["enabled"] and each.status != "RUNNING"]
    remedy = f"kept in {folder} and sent by the next flow of this run, or by: python -m pipeline.tracking {folder}"
    return {each.name: f"not known to be in MLflow; {remedy}" for each in over if not is_complete(each, notes)}


def noted_runs(folder: Path) -> dict[str, str]:
    """MLflow's ids of the runs behind a run's folder: of the last `flow`, and by stage, whatever run made it."""
    runs: dict[str, str] = {}
    for note in read_notes(folder).values():
        runs[note["name"]] = note["run_id"]
        runs |= {stage: run_id for stage, (_, _, run_id) in note.get("links", {}).items() if run_id}
    return runs
