"""The settings of a run, recorded in its folder when it starts, so that it can be continued by its name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.contracts import ContractError, read_json, write_json
from pipeline.drift import DriftConfig
from pipeline.keys import nearest
from pipeline.redact import flatten, hidden_keys, redact
from pipeline.settings import PipelineConfig, build_settings, choose
from teacher.engines.config import with_kind

FILE = "settings.json"


def remember(settings: PipelineConfig, flow: str) -> None:
    """Record the flow's name and its settings, without secrets, in the run's folder."""
    values = settings.model_dump(mode="json")
    settings.folder.mkdir(parents=True, exist_ok=True)
    content = {"flow": flow, "settings": redact(values), "hidden": hidden_keys(values)}
    write_json(settings.folder / FILE, content)


def _of_one_kind(values: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings without those of other kinds of engines, which runs of an earlier release recorded too."""
    engine = values.get("annotate", {}).get("engine", {})
    if "kind" not in engine:
        return values
    return values | {"annotate": values["annotate"] | {"engine": with_kind(engine, engine["kind"])}}


def started_runs(runs: Path) -> list[str]:
    """Names of the runs in a folder of runs that can be continued, sorted."""
    return sorted(file.parent.name for file in runs.glob(f"*/{FILE}"))


def recorded_settings(folder: Path) -> PipelineConfig:
    """The settings that a run was last started with, with its folder as it is now; secrets are not among them.

    Raises `ContractError` when the folder holds none.
    """
    if not (folder / FILE).exists():
        raise ContractError(f"{folder} has no {FILE}; run a flow there first")
    values = _of_one_kind(read_json(folder / FILE)["settings"])
    return build_settings(values | {"run": folder.name, "runs": str(folder.parent)})


def recorded_limits(folder: Path) -> DriftConfig:
    """The limits of drift that a run was last started with; the usual ones where that is not recorded."""
    recorded = read_json(folder / FILE)["settings"].get("drift", {}) if (folder / FILE).exists() else {}
    return DriftConfig.model_validate(recorded, context="recorded")


def resume(
    runs: Path, run: str, preset: str = "", config: Path | None = None, overrides: Iterable[str] = ()
) -> tuple[str, PipelineConfig]:
    """The flow that was last started in the run's folder, and its settings with what `choose` is given over them.

    Raises `ContractError` when there is no such run, and for a secret that was not recorded and is not given anew.
    """
    path = runs.expanduser() / run / FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        flow, values, hidden = str(record["flow"]), {**record["settings"]}, list(record["hidden"])
    except (FileNotFoundError, NotADirectoryError):
        names = started_runs(runs.expanduser())
        others = nearest(run, names) if names else "; none has been started there"
        raise ContractError(f"no run '{run}' in {runs}{others}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ContractError(
            f"{path} is damaged ({error}); start the run with its preset and settings instead"
        ) from None
    settings = choose(preset, config, run, runs, overrides, base=build_settings(_of_one_kind(values)))
    before, now = flatten(values), flatten(settings.model_dump(mode="json"))
    if missing := [key for key in hidden if now.get(key) == before.get(key)]:
        options = " ".join(f"--set {key}=…" for key in missing)
        raise ContractError(f"secrets are not recorded with a run, so add {options}")
    return flow, settings
