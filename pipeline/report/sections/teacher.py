"""The teacher: its training curves, and its evaluation by phase."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from data.contracts import metric_lines, read_json
from pipeline.artifacts import StageRecord
from pipeline.report.plots import line_chart

# Title, y-axis, range, and the metrics of one chart of AGPO.
_CHARTS: tuple[tuple[str, str, tuple[float, float] | None, tuple[str, ...]], ...] = (
    ("Rollouts: accuracy and parse rate", "share", (0.0, 1.0), ("accuracy", "parse_rate", "truncated")),
    ("Groups: all right, mixed, all wrong", "share of groups", (0.0, 1.0),
     ("groups/all_right", "groups/mixed", "groups/all_wrong")),
    ("Reward", "reward", None, ("reward",)),
    ("Advantage mass", "mean advantage", None, ("advantage/positive", "advantage/negative")),
    ("Entropy", "nats per token", None, ("entropy",)),
    ("KL against the warm start", "nats per token", None, ("kl",)),
    ("Completion length", "tokens", None, ("completions/mean_length", "completions/max_length")),
    ("Speed", "tokens per second", None, ("tokens_per_second",)),
)  # fmt: skip
_VALID = ("valid_warm_start", "valid_agpo")  # the warm start is where AGPO's curve begins


def teacher_section(folder: Path, record: StageRecord) -> dict[str, Any]:
    """Training curves, the most telling first, the evaluation by phase, and the reasons that a model was asked for."""
    lines, phases = training_lines(folder), read_json(folder / "evaluation.json")
    rollouts, groups, *more = [
        (title, line_chart(drawn.items(), "AGPO step", label, y_range=limits, smooth=True))
        for title, label, limits, names in _CHARTS
        for drawn in [curves(lines, ["agpo"], names).rename(columns=_label)]
    ]
    valid = curves(lines, _VALID, ("accuracy", *_pass_at(lines), "parse_rate"))
    loss = curves(lines, ["warm_start"], ["loss"])
    by_phase = pd.DataFrame(phases)
    pass_at_k = by_phase.loc[_pass_at(by_phase.index)].rename(index=_k, columns=lambda name: name.replace("_", " "))
    charts = [
        rollouts,
        groups,
        ("Validation", line_chart(valid.items(), "AGPO step", "share", y_range=(0.0, 1.0), marks=True)),
    ]
    more.append(("Warm start", line_chart(loss.items(), "step", "loss", smooth=True)))
    return {
        "charts": [chart for chart in charts if chart[1]],
        "more": [chart for chart in more if chart[1]],
        "phases": phases,
        "reasons": read_json(funnel) if (funnel := folder / "reasons.json").exists() else {},
        "metrics": list(by_phase.index),
        "pass_at_k": line_chart(pass_at_k.items(), "k", "pass@k", marks=True) if len(pass_at_k) > 1 else "",
    }


def training_lines(folder: Path) -> pd.DataFrame:
    """The lines of a training's `metrics.jsonl`; raises `FileNotFoundError` where there is none."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    return pd.DataFrame(metric_lines(path))


def curves(lines: pd.DataFrame, phases: Iterable[str], metrics: Iterable[str]) -> pd.DataFrame:
    """The metrics that the training has of some phases, by step."""
    rows = lines[lines["phase"].isin(list(phases))].set_index("step")
    return rows[[name for name in metrics if name in rows]]


def _pass_at(names: Iterable[str]) -> list[str]:
    return sorted((name for name in names if name.startswith("pass@")), key=_k)


def _label(name: str) -> str:
    """A metric as a legend says it: `groups/all_right` as `all right`."""
    return name.rpartition("/")[2].replace("_", " ")


def _k(name: str) -> int:
    return int(name.removeprefix("pass@"))
