"""What came back from the GPU machine, measured here: the teachers on the same test pairs, and their differences."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from data.contracts import ANNOTATIONS, PAIRS, ContractError, GradeScale, read_json, read_table
from student.metrics import Labels, evaluate, grade_measures, score_measures
from student.resampling import Measures, bootstrap, limits, summed, sums_by_query
from teacher.passk import pass_at_k

_DIFFERENCES = (("warm_start", "base"), ("agpo", "warm_start"), ("grpo", "warm_start"), ("agpo", "grpo"))
_METRICS = ("roc_auc", "pr_auc", "macro_f1", "quadratic_kappa", "accuracy", "ece")
_COMPARED = ("roc_auc", "macro_f1", "quadratic_kappa", "accuracy", "pass@1", "pass@4", "pass@8", "pass@16")
_PASS = (1, 4, 8, 16)  # k of pass@k


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
    measures: dict[str, list[Measures]] = {}
    result: dict[str, dict[str, Any]] = {}
    for name, rows in answers.items():
        raw = [rows[pair_id]["grade_probs_raw"] or rows[pair_id]["grade_probs"] for pair_id in common]
        probs = np.array([given or [1 / scale.size] * scale.size for given in raw])
        measured = evaluate(labels, probs).metrics
        result[name] = {metric: _rounded(measured[metric].model_dump()) for metric in _METRICS}
        annotated = [rows[pair_id] for pair_id in common]
        passed, score = _pass_measures(labels, annotated), probs[:, scale.relevant_from :].sum(axis=1)
        unparsed = sum(row["n_unparsed"] for row in annotated) / sum(row["n_samples"] for row in annotated)
        result[name] |= _rounded(passed.values | {"parse_rate": 1 - unparsed})
        measures[name] = [*score_measures(labels, score), grade_measures(labels, probs, score), passed]
    differences = {
        f"{a} - {b}": _difference(labels, measures[a], measures[b])
        for a, b in _DIFFERENCES
        if a in measures and b in measures
    }
    summary = folder / "summary.json"
    machine = read_json(summary)["machine"] if summary.exists() else {}
    print(
        json.dumps(
            {"benchmark": "gpu", "test_pairs": len(common), "teachers": result, "differences": differences} | machine
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


def _pass_measures(labels: Labels, rows: list[dict[str, Any]]) -> Measures:
    """pass@k of the completions of each pair, as a mean over pairs; every row of a teacher has equally many."""
    samples = max(row["n_samples"] for row in rows)
    right = np.array([row["votes"].count(int(grade)) for row, grade in zip(rows, labels.grade, strict=True)])
    counted = [k for k in _PASS if k <= samples]
    columns = [pass_at_k(samples, right, k) for k in counted]
    by_query = sums_by_query([*columns, np.ones(len(rows))], labels.query)
    return summed(by_query, lambda sums: {f"pass@{k}": sums[:, i] / sums[:, -1] for i, k in enumerate(counted)})


def _difference(labels: Labels, a: list[Measures], b: list[Measures]) -> dict[str, dict[str, Any]]:
    """For each measure that both have, a − b with its 95 % interval from the same resamples of queries."""
    draws = bootstrap([*a, *b], labels.n_queries, labels.n_boot, labels.seed)

    def by_name(measures: list[Measures], drawn: list[dict[str, np.ndarray]]) -> dict[str, tuple[float, np.ndarray]]:
        pairs = zip(measures, drawn, strict=True)
        return {name: (measure.values[name], values[name]) for measure, values in pairs for name in measure.values}

    of_a, of_b = by_name(a, draws[: len(a)]), by_name(b, draws[len(a) :])
    found = {}
    for name in _COMPARED:
        if name in of_a and name in of_b:
            low, high = limits(of_a[name][1] - of_b[name][1], labels.n_queries)
            found[name] = _rounded({"difference": of_a[name][0] - of_b[name][0], "low": low, "high": high})
    return found


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value if value is None else round(float(value), 4) for name, value in values.items()}
