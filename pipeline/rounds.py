"""Rounds of choosing, annotating, distilling and measuring: the settings of each, and the curve of quality over cost.

A round is a run of its own beside the loop's folder, NAME-round-N, so that it resumes, is reused, tracked and reported like
any other, and shares pairs and teacher with the rounds before. Round 0 has a student of human labels alone; round N begins
with the annotations of round N − 1, chooses by its student, and its budget is N shares of the whole one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.contracts import ContractError, write_json, write_text
from pipeline.annotation.config import SelectConfig
from pipeline.artifacts import begin_with
from pipeline.stages import ANNOTATE, EXPORT

if TYPE_CHECKING:
    from pipeline.settings import PipelineConfig

CHOSEN, RANDOM = "round", "random"
"""The rounds by the strategies, and those by chance, which they are compared with."""


def settings_of_round(settings: PipelineConfig, number: int, kind: str = CHOSEN) -> PipelineConfig:
    """The settings of a round; raises `ContractError` without a budget."""
    loop = settings.loop
    if not loop.select.pairs:
        raise ContractError("relevance-loop needs a budget: set loop.select.pairs")
    here = settings.model_copy(update={"run": f"{settings.run}-{kind if number else CHOSEN}-{number}"})
    if not number:
        return here
    select = loop.select if kind == CHOSEN else SelectConfig()
    pairs = math.ceil(loop.select.pairs * number / loop.rounds)
    update: dict[str, Any] = {"select": select.model_copy(update={"pairs": pairs})}
    if "uncertain" in select.shares:
        update["student"] = EXPORT.path(settings_of_round(settings, number - 1, kind))
    return here.model_copy(update={"annotate": settings.annotate.model_copy(update=update)})


def begin_round(settings: PipelineConfig, number: int, kind: str = CHOSEN) -> PipelineConfig:
    """The settings of a round, whose folder has the annotations of the round before."""
    here = settings_of_round(settings, number, kind)
    if number > 1:
        begin_with(ANNOTATE.path(settings_of_round(settings, number - 1, kind)), ANNOTATE.path(here))
    return here


def point(number: int, kind: str, summary: dict[str, Any]) -> dict[str, Any]:
    """What a round's summary says of cost and quality; raises `ContractError` where split valid has one class."""
    annotated = summary["stages"].get("annotate", {}).get("figures", {}) if number else {}
    names = ("pairs", "prompt_tokens", "completion_tokens")
    cost = {name: annotated.get(name, 0) for name in names}
    student = summary["stages"]["student"]["figures"]
    if "valid_roc_auc" not in student:
        raise ContractError("split valid has one class only, so no gain can be seen; label pairs of other grades there")
    quality = {name: student.get(name) for name in ("valid_roc_auc", "test_roc_auc")}
    return {"round": number, "kind": kind, "run": summary["run"]} | cost | quality


def gains_stopped(points: list[dict[str, Any]], min_gain: float) -> bool:
    """Whether the last round's student is no longer better on valid than the best before, by `min_gain`."""
    *before, last = (each["valid_roc_auc"] for each in points)
    return bool(before) and last - max(before) < min_gain


def write_curve(folder: Path, run: str, points: list[dict[str, Any]]) -> Path:
    """Write `loop.json` and the curve of quality over cost, `loop.html`, into the loop's folder; the latter's path."""
    import pandas as pd

    from pipeline.report.page import page_environment
    from pipeline.report.plots import line_chart

    write_json(folder / "loop.json", {"rounds": points})
    table = pd.DataFrame(points)
    lines = []
    for kind, title in ((CHOSEN, "by the strategies"), (RANDOM, "by chance")):
        rounds = table[(table["kind"] == kind) | (table["round"] == 0)]
        if (rounds["round"] > 0).any() or kind == CHOSEN:
            lines.append((title, rounds.set_index("pairs")["valid_roc_auc"]))
    chart = line_chart(lines, "pairs annotated", "ROC-AUC on valid", marks=True)
    page = page_environment().get_template("loop.html").render(run=run, points=points, chart=chart)
    write_text(folder / "loop.html", page)  # a run of this name may have a report of its own
    return folder / "loop.html"
