"""What an annotation table amounts to: counts, quality against withheld human grades, and a fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as pads

from data.schema import ANNOTATIONS, PAIRS, GradeScale, check_schema, read_table

_HASHED = ("pair_id", "status", "error", "grade", "grade_probs", "reasoning", "votes")


def table_figures(out: Path, key: str, pairs: Path, split: str) -> tuple[str, dict[str, Any], Counter[str]]:
    """Fingerprint, key figures and counted failures of the rows of `out` under `key`.

    The fingerprint depends on the rows only, not on their files or their order, nor on when they were made. Quality is
    measured on the pairs of `split` that have a human grade and an annotation with status ok; without such pairs
    those figures are absent.
    """
    graded = read_table(
        pairs / "pairs",
        PAIRS,
        columns=["pair_id", "grade"],
        where=(pc.field("split") == split) & pc.field("grade").is_valid(),
    )
    human = dict(zip(graded["pair_id"].to_pylist(), graded["grade"].to_pylist(), strict=True))
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    sums = {"prompt_tokens": 0, "completion_tokens": 0, "agreement": 0.0, "n_samples": 0, "n_unparsed": 0}
    hashed = 0
    judged: list[tuple[int, int, list[float]]] = []
    for row in _rows(out, key):
        statuses[row["status"]] += 1
        for name in sums:
            sums[name] += row[name] or 0
        if row["status"] == "failed":
            # "too long: 812 tokens" and "too long: 790 tokens" are one reason.
            reasons[re.sub(r"\d+", "#", row["error"])[:160]] += 1
        elif row["status"] == "ok" and row["pair_id"] in human:
            judged.append((human[row["pair_id"]], row["grade"], row["grade_probs"]))
        line = json.dumps([row[name] for name in _HASHED], ensure_ascii=False)
        hashed += int.from_bytes(hashlib.blake2b(line.encode("utf-8", "replace"), digest_size=16).digest(), "big")
    total, ok = statuses.total(), statuses["ok"]
    figures: dict[str, Any] = {
        "annotation_key": key,
        "pairs": total,
        "ok": ok,
        "ok_share": ok / total if total else 0.0,
        "unparsed": statuses["unparsed"],
        "failed": statuses["failed"],
        "sample_parse_rate": 1 - sums["n_unparsed"] / sums["n_samples"] if sums["n_samples"] else 0.0,
        "agreement": sums["agreement"] / ok if ok else 0.0,
        "prompt_tokens": sums["prompt_tokens"],
        "completion_tokens": sums["completion_tokens"],
    }
    figures |= quality(judged, GradeScale.load(pairs))
    return f"{hashed % 2**128:032x}", figures, reasons


def _rows(out: Path, key: str) -> Iterator[dict[str, Any]]:
    """The rows under `key`, read batch by batch."""
    files = [str(file) for file in sorted(out.glob(f"{key}-*.parquet"))]
    if not files:
        return
    dataset = pads.dataset(files, format="parquet")
    check_schema(dataset.schema, ANNOTATIONS, str(out))
    columns = [name for name in ANNOTATIONS.names if name not in ("annotation_key", "created_at")]
    for batch in dataset.to_batches(columns=columns, batch_size=4096):
        yield from batch.to_pylist()


def quality(judged: list[tuple[int, int, list[float]]], scale: GradeScale) -> dict[str, float]:
    """Accuracy, macro-F1 and AUC of p(relevant) for (human grade, teacher's grade, probabilities of the K grades)."""
    if not judged:
        return {}
    from sklearn.metrics import f1_score, roc_auc_score

    human = [h for h, _, _ in judged]
    grades = [g for _, g, _ in judged]
    found = {
        "n_graded": float(len(judged)),
        "accuracy": sum(h == g for h, g, _ in judged) / len(judged),
        "macro_f1": float(f1_score(human, grades, average="macro", labels=sorted(set(human)), zero_division=0)),
    }
    relevant = [h >= scale.relevant_from for h in human]
    if len(set(relevant)) == 2:  # undefined otherwise
        found["auc"] = float(roc_auc_score(relevant, [sum(probs[scale.relevant_from :]) for _, _, probs in judged]))
    return found
