"""The settings of a run, kept in its folder when it starts, so that it can be continued by its name alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.contracts import ContractError, write_json
from pipeline.redact import hidden_keys, redact
from pipeline.settings import PipelineConfig, nearest
from teacher.engines.config import with_kind

FILE = "settings.json"


def remember(settings: PipelineConfig, flow: str) -> None:
    """Keep the flow's name and its settings, without secrets, in the run's folder."""
    values = settings.model_dump(mode="json")
    settings.folder.mkdir(parents=True, exist_ok=True)
    content = {"flow": flow, "settings": redact(values), "hidden": hidden_keys(values)}
    write_json(settings.folder / FILE, content)


def started_runs(runs: Path) -> list[str]:
    """Names of the runs in a folder of runs that `recall` knows, sorted."""
    return sorted(file.parent.name for file in runs.glob(f"*/{FILE}"))


def recall(runs: Path, run: str, given: set[str]) -> tuple[str, dict[str, Any]]:
    """The flow that was last started in the run's folder, and its settings as a tree of values.

    `given` are the keys that the caller sets anew. Raises `ContractError` when there is no such run, and for a secret that
    was not kept and is not among them.
    """
    runs = runs.expanduser()
    path = runs / run / FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        flow, values, hidden = str(kept["flow"]), kept["settings"], kept["hidden"]
    except (FileNotFoundError, NotADirectoryError):
        names = started_runs(runs)
        told = nearest(run, names) if names else "; none has been started there"
        raise ContractError(f"no run '{run}' in {runs}{told}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ContractError(
            f"{path} is damaged ({error}); start the run with its preset and settings instead"
        ) from None
    missing = [key for key in hidden if key not in given]
    if missing:
        options = " ".join(f"--set {key}=…" for key in missing)
        raise ContractError(f"secrets are not kept with a run, so add {options}")
    engine = values.get("annotate", {}).get("engine", {})
    if "kind" in engine:  # runs of an earlier release recorded the settings of all kinds
        values["annotate"]["engine"] = with_kind(engine, engine["kind"])
    return flow, {**values, "run": run, "runs": str(runs)}
