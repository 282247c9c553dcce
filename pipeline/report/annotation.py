"""What the report shows of the annotations: what they cost, how far the votes and the humans agree, and examples."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from data.contracts import ANNOTATIONS, PAIRS, GradeScale, read_table
from pipeline.artifacts import StageRecord
from pipeline.report.audit import audit_rows
from pipeline.report.parts import cut, grade_names

EXAMPLES = 30  # half of them disagreeing, half agreeing
SECOND_LOOK = 20
SCANNED = 20_000  # annotations looked at for examples and agreement; ids are hashes, so the first ones are a sample
_TEXTS = ("query", "ad_title", "ad_text", "reasoning")

Rows = list[dict[str, Any]]


def looked_at(annotations: Path, pairs: Path, key: str) -> Rows:
    """A sample of the usable annotations under `key`, by id, each with its pair's texts and human grade (None without one).

    Human grades of the pool are for this comparison only.
    """
    columns = ["pair_id", "grade", "reasoning", "agreement", "votes"]
    usable = (pads.field("annotation_key") == key) & (pads.field("status") == "ok") & pads.field("grade").is_valid()
    found = _head(annotations, columns, usable)
    if not found.num_rows:
        return []
    wanted = ["pair_id", "query", "ad_title", "ad_text", "grade"]
    ids = pads.field("pair_id").isin(found["pair_id"].to_pylist())
    table = read_table(pairs / "pairs", PAIRS, columns=wanted, where=ids)
    by_id = {row["pair_id"]: row for row in table.rename_columns([*wanted[:-1], "human_grade"]).to_pylist()}
    rows = found.rename_columns(["pair_id", "teacher_grade", *columns[2:]]).sort_by("pair_id").to_pylist()
    return [row | by_id[row["pair_id"]] for row in rows if row["pair_id"] in by_id]


def cost(record: StageRecord) -> dict[str, Any]:
    """What the stage's last run took, by its own figures; per 1,000 pairs in engine-seconds, so that machines compare.

    `engine_seconds` is the time of the whole call, start and commits included, times the engines that it was given: an
    upper bound of their working time. It is absent when nothing was left to annotate. Tokens per second assume that the
    pairs of the last run were as long as all of them.
    """
    figures, names = record.figures, ("pairs", "ok", "unparsed", "failed", "n_new", "n_reused")
    tokens = {name: figures.get(name, 0) for name in ("prompt_tokens", "completion_tokens")}
    found: dict[str, Any] = tokens | {name: figures.get(name, 0) for name in names}
    found |= {"samples": record.config.get("n"), "engines": record.config.get("engines", 1)}
    found |= {"kind": record.config.get("engine", {}).get("kind", "")}
    pairs, new, rate = found["pairs"], found["n_new"], figures.get("pairs_per_s", 0.0)
    found |= {f"{name}_per_pair": value / pairs for name, value in tokens.items() if pairs}
    if pairs and new and rate:
        seconds = new / rate * found["engines"]
        found |= {"pairs_per_s": rate, "tokens_per_s": rate * sum(tokens.values()) / pairs,
                  "engine_seconds": seconds, "engine_seconds_per_1000": 1000 * seconds / new}  # fmt: skip
    return found


def failures(annotations: Path, key: str) -> list[tuple[str, int]]:
    """How often each reason of a failure occurs among the first `SCANNED` failed rows; numbers in a reason count as one."""
    failed = (pads.field("annotation_key") == key) & (pads.field("status") == "failed")
    errors = _head(annotations, ["error"], failed)["error"].to_pylist()
    return Counter(cut(re.sub(r"\d+", "#", error)) for error in errors).most_common(20)


def agreement(rows: Rows, scale: GradeScale) -> dict[str, Any]:
    """How far the votes of one pair agree, how the grades are spread, and the teacher's grades against human ones.

    levels: (share of the votes, pairs, share of the pairs, share with the human grade among those that have one).
    grades: (name, pairs by the teacher, share, pairs by humans, share, mean agreement, share with the human grade).
    confusion: human grade by row, teacher's by column; empty when no pair has a human grade.
    """
    judged = [row for row in rows if row["human_grade"] is not None]
    levels = []
    for level in sorted({round(row["agreement"], 3) for row in rows}, reverse=True):
        at = [row for row in rows if round(row["agreement"], 3) == level]
        levels.append((level, len(at), len(at) / len(rows), _same(at)))
    grades = []
    for grade, name in enumerate(grade_names(scale)):
        given = [row for row in rows if row["teacher_grade"] == grade]
        human = sum(row["human_grade"] == grade for row in judged)
        mean = sum(row["agreement"] for row in given) / len(given) if given else None
        share = human / len(judged) if judged else None
        grades.append((name, len(given), len(given) / len(rows), human, share, mean, _same(given)))
    counted = Counter((row["human_grade"], row["teacher_grade"]) for row in judged)
    return {
        "n": len(rows),
        "judged": len(judged),
        "same": _same(judged),
        "levels": levels,
        "grades": grades,
        "names": grade_names(scale),
        "confusion": [[counted[h, t] for t in range(scale.size)] for h in range(scale.size)] if judged else [],
    }


def annotation(folder: Path, pairs: Path, record: StageRecord, rows: Rows) -> dict[str, Any]:
    """The part on annotations: cost, failures by reason, agreement, and all figures of the stage."""
    key = str(record.figures["annotation_key"])
    return {
        "cost": cost(record),
        "failures": failures(folder, key) if record.figures.get("failed") else [],
        "agreement": agreement(rows, GradeScale.load(pairs)) if rows else {},
        "quality": {name: record.figures[name] for name in ("n_graded", "accuracy", "macro_f1", "auc")
                    if name in record.figures},
        "figures": record.figures,
    }  # fmt: skip


def examples(rows: Rows, pairs: Path) -> dict[str, Any]:
    """`EXAMPLES` pairs with the teacher's reasons, about half of them with another grade than the human one.

    Pairs without a human grade are shown when there are no others.
    """
    same = [row for row in rows if row["human_grade"] == row["teacher_grade"]]
    differing = [row for row in rows if row["human_grade"] not in (None, row["teacher_grade"])]
    shown = differing[: EXAMPLES - min(EXAMPLES // 2, len(same))]
    groups = [("Teacher and human differ", shown), ("Teacher and human agree", same[: EXAMPLES - len(shown)])]
    if not (same or differing):
        groups = [("Without a human grade", rows[:EXAMPLES])]
    groups = [(title, [_cut(row) for row in part]) for title, part in groups if part]
    return {"groups": groups, "grades": grade_names(GradeScale.load(pairs))} if groups else {}


def second_look(annotations: Path, pairs: Path, key: str) -> dict[str, Any]:
    """The pairs that most deserve a second look: teacher against human, and samples against each other."""
    rows = audit_rows(annotations, pairs, key, limit=SECOND_LOOK, scanned=SCANNED)
    return {"rows": [_cut(row) for row in rows], "grades": grade_names(GradeScale.load(pairs))} if rows else {}


def _same(rows: Rows) -> float | None:
    judged = [row for row in rows if row["human_grade"] is not None]
    return sum(row["human_grade"] == row["teacher_grade"] for row in judged) / len(judged) if judged else None


def _cut(row: dict[str, Any]) -> dict[str, Any]:
    votes = row["votes"] if isinstance(row["votes"], str) else " ".join(map(str, row["votes"]))
    return row | {"votes": votes, "why": row.get("why", "")} | {name: cut(row[name]) for name in _TEXTS}


def _head(folder: Path, columns: list[str], where: pads.Expression) -> pa.Table:
    """The first rows of the annotations; the whole table need not fit in memory."""
    if not folder.exists():
        raise FileNotFoundError(2, "no such folder", str(folder))
    dataset = pads.dataset(folder, format="parquet")
    if not dataset.files:
        return pa.table({name: pa.array([], ANNOTATIONS.field(name).type) for name in columns})
    return dataset.head(SCANNED, columns=columns, filter=where)
