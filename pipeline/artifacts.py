"""A stage of a run: its folder, the recipe that says whether its output can be reused, and its manifest.

A stage's manifest, `_stage.json`, is written last, so its existence means that the stage completed. A run owns its folder:
what another run has made from the same recipe comes into it as links and copies, so that either can be deleted.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from data.contracts import Config, ContractError, digest, write_json

logger = logging.getLogger(__name__)

MANIFEST = "_stage.json"
STARTED = "_started.json"
UNTRACKED = "_untracked.jsonl"  # of older versions, for MLflow
# Big files, which no stage changes once it has finished: two runs can share one by a link.
LINKED = (".parquet", ".safetensors", ".onnx")


class Output(Protocol):
    """What a stage function returns: the fingerprint of what it made, and its key figures."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def figures(self) -> dict[str, Any]: ...


class StageOutput(BaseModel):
    """The result of the stages that live in this room; the other rooms return a like type of their own."""

    fingerprint: str
    figures: dict[str, Any]


class StageRecord(BaseModel):
    """A completed stage, as kept in its manifest. `seconds` is the wall time of the call that completed it."""

    stage: str
    key: str
    folder: Path
    config: dict[str, Any]
    inputs: dict[str, str]
    version: int = 1
    """The version of the stage that made it; records without one are from before there were versions."""
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

    @property
    def key(self) -> str:
        """A digest of the recipe."""
        values = {"config": self.config.model_dump(mode="json"), "inputs": self.inputs, "version": self.version}
        return digest({"stage": self.stage, **values})

    def made(self, record: StageRecord) -> bool:
        """Whether `record` is of an output that this recipe would make again.

        The recorded config is read as today's: a setting that was added since counts as its default.
        """
        if (record.version, record.inputs) != (self.version, self.inputs):
            return False
        try:
            return type(self.config).model_validate(record.config) == self.config
        except ValidationError:  # a setting that no longer exists, or no longer has such values
            return False


def completed(folder: Path, recipe: Recipe) -> StageRecord | None:
    """The record of the stage completed in `folder` from `recipe`, or None if there is none."""
    record = read_record(folder)
    if record is None or not recipe.made(record):
        return None
    return record.model_copy(update={"reused": True, "folder": folder})


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
    done = completed(folder, recipe)
    if done is not None or not share or (incremental and folder.exists()):
        return done
    found = []
    for other in folder.parent.parent.glob(f"*/{folder.name}"):
        if other.parent.name == folder.parent.name:
            continue
        try:
            record = completed(other, recipe)
        except ContractError:  # another run's damage is not this one's
            continue
        if record is not None:
            found.append(record.model_copy(update={"made_by": record.made_by or other.parent.name}))
    return max(found, key=lambda record: record.finished_at, default=None)


def run_stage(
    folder: Path,
    recipe: Recipe,
    work: Callable[[Path], Output],
    *,
    incremental: bool = False,
    share: bool = True,
) -> StageRecord:
    """Run `work(folder)` unless it, or a run beside this one, has the output of this recipe already; return its record.

    An interrupted stage of the same recipe finds its folder as it left it, so `work` can resume. When the recipe has
    changed, the old output is kept once, as `NAME.previous`, unless the stage is `incremental` (its output is keyed row by
    row, so it stays and grows).
    """
    key = recipe.key
    done = reusable(folder, recipe, incremental=incremental, share=share)
    if done is not None and (done.folder == folder or _take(done, folder)):
        return done.model_copy(update={"folder": folder})
    started = folder / STARTED
    if folder.exists() and not incremental and _started_key(started) != key:
        _put_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_json(started, {"stage": recipe.stage, "key": key, "pid": os.getpid()})
    begin = time.monotonic()
    output = work(folder)
    record = StageRecord(
        stage=recipe.stage,
        key=key,
        folder=folder,
        config=recipe.config.model_dump(mode="json"),
        inputs=recipe.inputs,
        version=recipe.version,
        fingerprint=output.fingerprint,
        figures=output.figures,
        seconds=round(time.monotonic() - begin, 1),
        finished_at=datetime.now(UTC),
    )
    write_json(folder / MANIFEST, record.model_dump(mode="json", exclude={"reused"}))
    # From here on nothing is resumed in this folder, so that files which another run has links to are not written again.
    started.unlink()
    return record


def _put_aside(folder: Path) -> None:
    """Keep a finished output as `NAME.previous`; what an interrupted attempt has left gives way."""
    if not (folder / MANIFEST).exists():
        shutil.rmtree(folder)
        return
    previous = folder.with_name(f"{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    folder.rename(previous)


def _started_key(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("key")
    except (FileNotFoundError, ValueError):
        return None


def _take(record: StageRecord, folder: Path) -> bool:
    """Bring another run's finished stage into `folder`; False when it could not be had whole."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(
            record.folder,
            temporary,
            copy_function=_link_or_copy,
            ignore=shutil.ignore_patterns(MANIFEST, STARTED, UNTRACKED, "*.tmp", "_tmp-*"),
        )
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


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith(LINKED):
        try:
            os.link(source, target)
            return
        except OSError:  # another file system
            pass
    shutil.copy2(source, target)
