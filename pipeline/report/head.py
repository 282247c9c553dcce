"""The first screen of the report: the few figures that say how the run came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pipeline.artifacts import StageRecord
from pipeline.report.annotation import cost
from pipeline.report.parts import read_json
from pipeline.report.student import system_name
from pipeline.report.summary import number


class Tile(NamedTuple):
    """One key figure: what it is, its value, what to compare it with, and the section (by its id) with the details."""

    title: str
    value: str
    notes: list[str]
    section: str


def tiles(records: dict[str, StageRecord], student: Path) -> list[Tile]:
    """Key figures of the stages that have run and have them; `student` is the student's folder."""
    found = [
        _student(records["student"], student) if "student" in records else None,
        _teacher(records["teacher"]) if "teacher" in records else None,
        _annotated(records["annotate"]) if "annotate" in records else None,
        _export(records["export"]) if "export" in records else None,
    ]
    return [tile for tile in found if tile is not None]


def against(comparison: dict[str, Any]) -> str:
    """A paired comparison in words: it is called a difference only if its interval does not reach 0."""
    low, high, difference = comparison["low"], comparison["high"], comparison["difference"]
    if low is None or high is None:
        return f"difference {difference:+.3f}"
    interval = f"({difference:+.3f}, {low:.3f} to {high:.3f})"
    if low <= 0 <= high:
        return f"not told apart {interval}"
    return f"student {'above' if low > 0 else 'below'} {interval}"


def _student(record: StageRecord, folder: Path) -> Tile | None:
    figures = record.figures
    if "test_roc_auc" not in figures:
        return None
    notes = []
    if "test_roc_auc_low" in figures:
        notes.append(f"95 % interval {figures['test_roc_auc_low']:.3f} to {figures['test_roc_auc_high']:.3f}")
    compared = {row["b"]: against(row) for row in _comparisons(folder) if row["metric"] == "roc_auc"}
    for rival in ("gold_only", "bm25"):
        if f"{rival}_roc_auc" in figures:
            value = f"{system_name(rival)} {figures[f'{rival}_roc_auc']:.3f}"
            notes.append(f"{value}: {compared[rival]}" if rival in compared else value)
    return Tile("Student, ROC-AUC on test", f"{figures['test_roc_auc']:.3f}", notes, "student")


def _teacher(record: StageRecord) -> Tile | None:
    figures = record.figures
    before = next((phase for phase in ("warm_start", "base") if f"{phase}/accuracy" in figures), None)
    if before is None or "agpo/accuracy" not in figures:
        return None
    name = {"warm_start": "warm start", "base": "base model"}[before]
    notes = [f"{name} → after AGPO, on valid"]
    if f"{before}/pass@1" in figures and "agpo/pass@1" in figures:
        notes.append(f"pass@1 {figures[f'{before}/pass@1']:.3f} → {figures['agpo/pass@1']:.3f}")
    if "test/accuracy" in figures:
        notes.append(f"on test {figures['test/accuracy']:.3f}")
    value = f"{figures[f'{before}/accuracy']:.3f} → {figures['agpo/accuracy']:.3f}"
    return Tile("Teacher, accuracy", value, notes, "teacher")


def _comparisons(folder: Path) -> list[dict[str, Any]]:
    try:
        return read_json(folder / "evaluation.json").get("comparisons", [])
    except (FileNotFoundError, ValueError):  # the section on the student says what is wrong
        return []


def _annotated(record: StageRecord) -> Tile | None:
    if not {"pairs", "ok_share", "agreement"} <= record.figures.keys():
        return None
    figures, spent = record.figures, cost(record)
    notes = [f"{100 * figures['ok_share']:.1f} % usable, agreement of votes {figures['agreement']:.2f}"]
    if "accuracy" in figures:
        notes.append(f"{100 * figures['accuracy']:.1f} % with the human grade")
    if "engine_seconds_per_1000" in spent:
        notes.append(f"{spent['engine_seconds_per_1000']:,.1f} engine-seconds per 1,000 pairs")
    return Tile("Pairs annotated", number(figures["pairs"]), notes, "annotation")


def _export(record: StageRecord) -> Tile | None:
    figures = record.figures
    if "int8_megabytes" not in figures:
        return None
    notes = []
    if "int8_auc_loss" in figures:
        notes.append(f"ROC-AUC lost {figures['int8_auc_loss']:.5f}")
    if "int8_pairs_per_second" in figures:
        notes.append(f"{number(round(figures['int8_pairs_per_second']))} pairs/s")
    if "fp32_max_abs_dp" in figures:
        notes.append(f"fp32 differs by at most {figures['fp32_max_abs_dp']:.1e}")
    return Tile("Export, int8", f"{figures['int8_megabytes']:.2f} MB", notes, "export")
