"""A stage's output: its folder, the recipe that says whether it can be reused, and its manifest.

A stage's manifest, `_stage.json`, is written last, so its existence means that the stage completed. A run owns its folder:
what another run has made from the same recipe comes into it as links and copies, so that either can be deleted.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ValidationError

from data.contracts import Config, ContractError, StageOutput, digest, write_json
from pipeline.redact import flatten

logger = logging.getLogger(__name__)

MANIFEST = "_stage.json"
STARTED = "_started.json"
# Big files, which no stage changes once it has finished: two runs can share one by a link.
LINKED = (".parquet", ".safetensors", ".onnx", ".onnx.data")


class StartedStage(BaseModel):
    """What an output is made from, as kept in `_started.json` while it is made."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    version: int = 1
    """The version of the stage; records without one are from before there were versions."""


class StageRecord(StartedStage):
    """A completed stage, as kept in its manifest. `seconds` is the wall time of the call that completed it."""

    key: str
    folder: Path
    fingerprint: str
    figures: dict[str, Any]
    seconds: float
    finished_at: datetime
    made_by: str = ""
    """The run whose output this is, where it is another's."""
    reused: bool = False


@dataclass(frozen=True)
class Recipe:
    """What a stage's output depends on: its config, the fingerprints of its inputs, its version; never its source text."""

    stage: str
    config: Config
    inputs: dict[str, str]
    version: int = 1

    def values(self) -> dict[str, Any]:
        """The fields of a `StartedStage`."""
        config = self.config.model_dump(mode="json")
        return {"stage": self.stage, "config": config, "inputs": self.inputs, "version": self.version}

    def difference(self, made: StartedStage) -> str:
        """Why this recipe would not make the same again: another version, setting or input. Empty when it would.

        The recorded config is read as today's: a setting that was added since counts as its default.
        """
        if made.version != self.version:
            return f"version {self.version} of the stage, made by version {made.version}"
        try:
            recorded = type(self.config).model_validate(made.config, context="recorded").model_dump(mode="json")
        except ValidationError:  # a setting that no longer exists, or no longer has such values
            recorded = made.config
        changed = _unequal(flatten(recorded), flatten(self.config.model_dump(mode="json")))
        if changed:
            shown = ", ".join(f"{self.stage}.{key}" for key in changed[:3])
            return f"changed settings: {shown}{' and more' if len(changed) > 3 else ''}"
        moved = _unequal(made.inputs, self.inputs)
        return f"changed inputs: {', '.join(moved)}" if moved else ""


def read_record(folder: Path) -> StageRecord | None:
    """The manifest of `folder`, whatever its recipe; None when the stage has not completed there."""
    try:
        return StageRecord.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ContractError(f"{folder / MANIFEST} is damaged ({error}); delete it to run the stage again") from None


def reusable(folder: Path, recipe: Recipe, *, incremental: bool = False, share: bool = True) -> StageRecord | None:
    """The finished output of `recipe`: that of `folder`, else (with `share`) the newest of another run beside this one.

    `folder` is RUNS/RUN/STAGE. The output of an `incremental` stage that has begun here is not replaced by another's.
    """
    done = _completed(folder, recipe)
    if done is not None or not share or (incremental and folder.exists()):
        return done
    found = []
    for other in folder.parent.parent.glob(f"*/{folder.name}"):
        if other.parent.name == folder.parent.name:
            continue
        try:
            record = _completed(other, recipe)
        except ContractError:  # another run's damage is not this one's
            continue
        if record is not None:
            found.append(record.model_copy(update={"made_by": record.made_by or other.parent.name}))
    return max(found, key=lambda record: record.finished_at, default=None)


def reason_to_run(folder: Path, recipe: Recipe) -> str:
    """Why the stage has to run in `folder`, where nothing can be reused."""
    record = read_record(folder)
    if record is not None:
        return recipe.difference(record)
    started = _started(folder)
    if started is None and not (folder / STARTED).exists():
        return "it has not completed in this run"
    difference = recipe.difference(started) if started else "an older release began it"
    return (
        f"the interrupted attempt cannot go on: {difference}" if difference else "it goes on where it was interrupted"
    )


def run_stage(
    folder: Path,
    recipe: Recipe,
    work: Callable[[Path], StageOutput],
    *,
    incremental: bool = False,
    share: bool = True,
) -> StageRecord:
    """Run `work(folder)` unless it, or a run beside this one, has the output of this recipe already; return its record.

    An interrupted stage of the same recipe finds its folder as it left it, so `work` can resume. When the recipe has
    changed, the old output is kept once, as `NAME.previous`, unless the stage is `incremental` (its output is keyed row by
    row, so it stays and grows).
    """
    _remove_leftovers(folder)
    done = reusable(folder, recipe, incremental=incremental, share=share)
    if done is not None and (done.folder == folder or _take(done, folder)):
        return done.model_copy(update={"folder": folder})
    logger.info("%s: starting in %s (%s)", recipe.stage, folder, reason_to_run(folder, recipe))
    started = _started(folder)
    if folder.exists() and not incremental and (started is None or recipe.difference(started)):
        _put_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_json(folder / STARTED, recipe.values() | {"pid": os.getpid()})
    begin = time.monotonic()
    output = work(folder)
    record = StageRecord(
        **recipe.values(),
        key=digest(recipe.values()),
        folder=folder,
        fingerprint=output.fingerprint,
        figures=output.figures,
        seconds=round(time.monotonic() - begin, 1),
        finished_at=datetime.now(UTC),
    )
    write_json(folder / MANIFEST, record.model_dump(mode="json", exclude={"reused"}))
    # From here on nothing is resumed in this folder, so that files which another run has links to are not written again.
    (folder / STARTED).unlink()
    return record


def begin_with(source: Path, folder: Path) -> None:
    """Let an incremental stage that has not begun in `folder` go on from the rows of `source`, the same stage's in another
    run; both can be deleted."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        _copy(source, temporary := _temporary(folder))
        temporary.rename(folder)


def _completed(folder: Path, recipe: Recipe) -> StageRecord | None:
    record = read_record(folder)
    if record is None or recipe.difference(record):
        return None
    return record.model_copy(update={"reused": True, "folder": folder})


def _started(folder: Path) -> StartedStage | None:
    """What the attempt in `folder` was started from; None without one, or where that is not noted (by older releases)."""
    try:
        return StartedStage.model_validate_json((folder / STARTED).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _unequal(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | now.keys() if before.get(key, ...) != now.get(key, ...))


def _put_aside(folder: Path) -> None:
    """Keep a finished output as `NAME.previous`; what an interrupted attempt has left gives way."""
    if not (folder / MANIFEST).exists():
        shutil.rmtree(folder)
        return
    previous = folder.with_name(f"{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    folder.rename(previous)


def _take(record: StageRecord, folder: Path) -> bool:
    """Bring another run's finished stage into `folder`; False when it could not be had whole."""
    temporary = _temporary(folder)
    try:
        _copy(record.folder, temporary)
        now = read_record(record.folder)
        if now is None or (now.key, now.finished_at) != (record.key, record.finished_at):
            raise OSError("that run was making it anew")
        taken = record.model_copy(update={"folder": folder})
        write_json(temporary / MANIFEST, taken.model_dump(mode="json", exclude={"reused"}))
        if folder.exists():
            _put_aside(folder)
        temporary.rename(folder)
    except (OSError, ContractError) as error:  # that run changes its folder, or the disk is full: it can be made here
        shutil.rmtree(temporary, ignore_errors=True)
        logger.warning("%s could not be taken from run '%s': %s", record.stage, record.made_by, error)
        return False
    return True


def _temporary(folder: Path) -> Path:
    """Where this process puts another run's output before it gets its name."""
    return folder.with_name(f".{folder.name}.{os.getpid()}.tmp")


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while they filled `_temporary(folder)` have left there."""
    for temporary in folder.parent.glob(f".{folder.name}.*.tmp"):
        pid = temporary.name.split(".")[-2]
        if temporary.is_dir() and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(temporary, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """What a stage has made in `source`, without what says how it was made, in a new folder."""
    shutil.rmtree(target, ignore_errors=True)
    own = shutil.ignore_patterns(MANIFEST, STARTED, "*.tmp", "_tmp-*")
    shutil.copytree(source, target, copy_function=_link_or_copy, ignore=own)


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith(LINKED):
        try:
            os.link(source, target)
            return
        except OSError:  # another file system
            pass
    shutil.copy2(source, target)
