"""What came back from the GPU machine, measured here: the teachers on the same test pairs, and their differences."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from sklearn.metrics import cohen_kappa_score

from data.contracts import ANNOTATIONS, PAIRS, ContractError, GradeScale, read_json, read_table
from student.metrics import Labels, compare, evaluate
from teacher.passk import pass_at_k

_DIFFERENCES = (("warm_start", "base"), ("agpo", "warm_start"), ("grpo", "warm_start"), ("agpo", "grpo"))
_METRICS = ("roc_auc", "pr_auc", "macro_f1", "accuracy", "ece")


def report(folder: Path, pairs: Path) -> None:
    """Print one JSON line: the metrics of every teacher in `folder` with 95 % intervals by query, and paired differences.

    A pair without a readable answer counts as a uniform distribution, and as wrong. Raises `ContractError` when `folder`
    has no annotations of test pairs.
    """
    scale = GradeScale.load(pairs)
    where = (pads.field("split") == "test") & pads.field("grade").is_valid()
    test = read_table(pairs / "pairs", PAIRS, columns=["pair_id", "query_id", "grade"], where=where)
    answers = {name: _answers(folder, name, test["pair_id"].to_pylist()) for name in _teachers(folder)}
    answers = {name: rows for name, rows in answers.items() if rows}
    if not answers:
        raise ContractError(f"{folder} has no annotations of test pairs: `run` had no time for them")
    common = sorted(set.intersection(*(set(rows) for rows in answers.values())))
    place = {pair_id: i for i, pair_id in enumerate(test["pair_id"].to_pylist())}
    test = test.take([place[pair_id] for pair_id in common])
    labels = Labels(test["grade"].to_numpy(), test["query_id"].to_numpy(zero_copy_only=False), scale.relevant_from)
    probs: dict[str, np.ndarray] = {}
    result: dict[str, dict[str, Any]] = {}
    for name, rows in answers.items():
        raw = [rows[pair_id]["grade_probs_raw"] or rows[pair_id]["grade_probs"] for pair_id in common]
        probs[name] = np.array([given or [1 / scale.size] * scale.size for given in raw])
        measured = evaluate(labels, probs[name]).metrics
        result[name] = {metric: _rounded(measured[metric].model_dump()) for metric in _METRICS}
        result[name] |= _from_votes(labels.grade, [rows[pair_id] for pair_id in common])
    differences = {}
    for a, b in _DIFFERENCES:
        if a in probs and b in probs:
            found = compare(labels, *(probs[name][:, scale.relevant_from :].sum(axis=1) for name in (a, b)))
            differences[f"{a} - {b}"] = _rounded(found.model_dump(include={"difference", "low", "high"}))
    summary = folder / "summary.json"
    machine = read_json(summary)["machine"] if summary.exists() else {}
    print(
        json.dumps(
            {"benchmark": "gpu", "test_pairs": len(common), "teachers": result, "roc_auc": differences} | machine
        )
    )


def _teachers(folder: Path) -> list[str]:
    names = {found[1] for file in folder.rglob("*.parquet") if (found := re.fullmatch(r"[^-]+-(.+)-\d+", file.stem))}
    return sorted(names)


def _answers(folder: Path, teacher: str, pair_ids: list[str]) -> dict[str, dict[str, Any]]:
    """The rows of these pairs that a teacher annotated, by pair."""
    files = [str(file) for file in folder.rglob(f"*-{teacher}-*.parquet")]
    table = pads.dataset(files, schema=ANNOTATIONS).to_table(filter=pads.field("pair_id").isin(pa.array(pair_ids)))
    return {row["pair_id"]: row for row in table.to_pylist()}


def _from_votes(grade: np.ndarray, rows: list[dict[str, Any]]) -> dict[str, float]:
    """pass@1 … pass@n, the share of completions with a grade, and the quadratic kappa of the pairs that have one."""
    samples = max(row["n_samples"] for row in rows)
    right = np.array([row["votes"].count(int(g)) for row, g in zip(rows, grade, strict=True)])
    metrics = {f"pass@{k}": pass_at_k(samples, right, k).mean() for k in (1, 4, 16) if k <= samples}
    metrics["parse_rate"] = 1 - sum(row["n_unparsed"] for row in rows) / sum(row["n_samples"] for row in rows)
    graded = [(int(g), row["grade"]) for g, row in zip(grade, rows, strict=True) if row["grade"] is not None]
    if len(set(graded)) > 1:
        metrics["kappa"] = cohen_kappa_score(*zip(*graded, strict=True), weights="quadratic")
    return _rounded(metrics)


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value if value is None else round(float(value), 4) for name, value in values.items()}
