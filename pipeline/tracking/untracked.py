"""What MLflow does not have yet of a run's folder, and the sending of it.

A flow does this at its start. By hand: `python -m pipeline.tracking.untracked RUN_FOLDER [STORE]`.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts import UNTRACKED
from pipeline.tracking.delivery import parse
from pipeline.tracking.outbox import describe, is_held, send_file

if TYPE_CHECKING:
    from pipeline.settings import PipelineConfig

logger = logging.getLogger(__name__)

SECONDS = 30.0  # after which a flow does not begin to send another file


def send_untracked(settings: PipelineConfig) -> dict[str, str]:
    """Send what earlier executions in this run's folder could not; returns what `untracked` then finds. Never raises."""
    if settings.tracking.enabled:
        deadline = time.monotonic() + SECONDS
        for path in _files(settings.folder):
            if time.monotonic() > deadline:  # a server that never answers; the stages will say so
                break
            found = send_file(path, settings.tracking_uri, f"{path.parent.name} of run {settings.run}")
            if found:
                logger.warning("%s: %s", path.parent.name, found)
            elif not path.exists():
                logger.info("MLflow now has what was kept in %s", path)
    return untracked(settings.folder)


def untracked(folder: Path) -> dict[str, str]:
    """What MLflow does not have yet of a run's folder: by stage (or `flow`), a sentence with the remedy.

    What is under way is not counted.
    """
    return {_label(path): found for path in _files(folder) if not is_held(path) and (found := describe(path))}


def main() -> None:
    """Send what is kept, to the store it was meant for or to another; exit code 1 when something could not be sent."""
    if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).is_dir():
        print(
            "error: use python -m pipeline.tracking.untracked RUN_FOLDER [STORE], with the folder of a run",
            file=sys.stderr,
        )
        raise SystemExit(2)
    folder, failed = Path(sys.argv[1]), False
    paths = _files(folder)
    for path in paths:
        if is_held(path):
            print(f"{_label(path)}: a flow that is under way sends it")
            continue
        name, uri = _label(path), sys.argv[2] if len(sys.argv) > 2 else str(_first(path).get("uri", ""))
        found = send_file(path, uri, f"{name} of {folder}")
        failed |= bool(found)
        print(f"{name}: {found or 'sent'}")
    if not paths:
        print(f"nothing is kept in {folder}: MLflow has everything")
    raise SystemExit(int(failed))


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.glob(f"*/{UNTRACKED}"), *folder.glob(UNTRACKED)])


def _label(path: Path) -> str:
    if path.parent.name.endswith(".previous"):
        return path.parent.name
    return str(_first(path).get("stage") or path.parent.name)


def _first(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            return parse(file.readline())
    except OSError:
        return {}


if __name__ == "__main__":
    main()
