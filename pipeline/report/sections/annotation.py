"""The annotations: what they cost, how far the votes and the humans agree, examples, and what deserves a second look."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads

from data.contracts import GradeScale, read_json
from pipeline import drift
from pipeline.annotated import Row, of_the_split, usable_annotations, with_texts, worst
from pipeline.artifacts import StageRecord
from pipeline.stages import DATA

EXAMPLES = 30  # half of them disagreeing, half agreeing
SECOND_LOOK = 20
_LOSS = "valid_log_loss_"
SAMPLE = 20_000  # annotations that are read for agreement and examples; ids are hashes, so the first ones are a sample


def annotation_section(folder: Path, record: StageRecord) -> dict[str, Any]:
    """The three sections that show annotations, their audit by people, and the checks for drift."""
    pairs, audit = folder.with_name(DATA.folder), folder.with_name("audit") / "audit.json"
    metrics, config = record.figures, record.config
    scale, key, batches = GradeScale.load(pairs), metrics["annotation_key"], []
    for batch in usable_annotations(folder, pairs, key):
        batches.append(batch)
        if sum(map(len, batches)) >= SAMPLE:
            break
    sample = pa.concat_tables(batches)[:SAMPLE].sort_by("pair_id")
    groups = examples(sample.to_pylist())
    return {
        "metrics": metrics,
        "samples": metrics["n_samples"] / metrics["pairs"] if "n_samples" in metrics else config["n"],
        "engines": f"{config['engines']} × {config['engine']['kind']}",
        "calibration": {
            "method": metrics["calibration"],
            "rows": metrics["n_calibration"],
            "log_loss": {name.removeprefix(_LOSS): metrics[name] for name in metrics if name.startswith(_LOSS)},
        }
        if "calibration" in metrics  # not in records of earlier versions
        else {},
        "cost": cost(metrics, config["engines"]),
        "failures": failures(folder, pairs, key) if metrics["failed"] else [],
        "grades": [f"{place} {grade.name}" for place, grade in enumerate(scale.grades)],
        "agreement": agreement(sample.to_pandas(), scale.size),
        "examples": [(title, with_texts(rows, pairs)) for title, rows in groups],
        "second_look": with_texts(worst([sample], SECOND_LOOK), pairs),
        "audit": read_json(audit) if audit.exists() else None,
        "drift": drift.load(folder),
    }


def cost(metrics: dict[str, Any], engines: int) -> dict[str, float]:
    """What the stage's last run took, in engine-seconds, so that machines compare; empty when no pair was left.

    They are the time of the whole call, start and commits included, times the engines that it was given: an upper bound of
    their working time. Tokens per second assume that the pairs of the last run were as long as all of them.
    """
    if not metrics["pairs_per_s"]:
        return {}
    per_pair = engines / metrics["pairs_per_s"]
    tokens = (metrics["prompt_tokens"] + metrics["completion_tokens"]) / metrics["pairs"]
    return {
        "total": per_pair * metrics["n_new"],
        "per_1000": 1000 * per_pair,
        "tokens_per_s": tokens * metrics["pairs_per_s"],
    }


def failures(folder: Path, pairs: Path, key: str) -> list[tuple[str, int]]:
    """How often each reason of a failure occurs among the first `SAMPLE` failed rows; numbers in a reason count as one."""
    failed = (pads.field("annotation_key") == key) & (pads.field("status") == "failed")
    failed &= of_the_split(folder, pairs)
    errors = pads.dataset(folder, format="parquet").head(SAMPLE, columns=["error"], filter=failed)["error"].to_pylist()
    return Counter(re.sub(r"\d+", "#", error) for error in errors).most_common(20)


def agreement(rows: pd.DataFrame, grades: int) -> dict[str, Any]:
    """How far the votes of one pair agree, how the grades are spread, and the teacher's grades against human ones.

    levels: (agreement, pairs, share with the human grade), the highest first. by_teacher: (pairs, mean agreement, share with
    the human grade) of each grade. confusion: human grade by row, teacher's by column. A share is NaN without human grades.
    """
    judged = rows["human_grade"].notna()
    rows = rows.assign(same=(rows["human_grade"] == rows["teacher_grade"]).where(judged).astype(float))
    levels = rows.groupby(rows["agreement"].round(3))["same"].agg(["size", "mean"]).sort_index(ascending=False)
    by_teacher = rows.groupby("teacher_grade").agg(
        n=("same", "size"), votes=("agreement", "mean"), same=("same", "mean")
    )
    confusion = pd.crosstab(rows["human_grade"], rows["teacher_grade"]).reindex(range(grades), columns=range(grades))
    return {
        "n": len(rows),
        "judged": int(judged.sum()),
        "same": rows["same"].mean(),
        "levels": list(levels.itertuples(name=None)),
        "by_teacher": list(by_teacher.reindex(range(grades)).fillna({"n": 0}).itertuples(index=False, name=None)),
        "confusion": confusion.fillna(0).astype(int).to_numpy().tolist(),
    }


def examples(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """`EXAMPLES` rows in titled groups: about half of them with another grade than the human one.

    Pairs without a human grade are shown when there are no others.
    """
    same = [row for row in rows if row["human_grade"] == row["teacher_grade"]]
    differing = [row for row in rows if row["human_grade"] not in (None, row["teacher_grade"])]
    first = differing[: EXAMPLES - min(EXAMPLES // 2, len(same))]
    groups = [("Teacher and human differ", first), ("Teacher and human agree", same[: EXAMPLES - len(first)])]
    if not (same or differing):
        groups = [("Without a human grade", rows[:EXAMPLES])]
    return [(title, part) for title, part in groups if part]
