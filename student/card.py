"""The model cards of a student and of its export, as Markdown."""

from __future__ import annotations

from typing import Any

from data.contracts import GradeScale
from student.evaluation import floor_fault
from student.scorer import MODEL_FILES

_TITLES = {
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "ndcg_at_10": "NDCG@10",
    "f1": "F1",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "quadratic_kappa": "quadratic κ",
    "ece": "ECE",
}


def student_card(student: dict[str, Any], scale: GradeScale, evaluation: dict[str, Any]) -> str:
    """The card of a trained student: what it is for, what it learned from, how good it is."""
    grades = "\n".join(f"- {i} · **{_line(g.name)}**: {_line(g.definition)}" for i, g in enumerate(scale.grades))
    return f"""# Query–ad relevance student

A cross-encoder that grades how well an ad answers a search query. It reads query and ad together and gives a
probability for each of {scale.size} grades; a pair counts as relevant from grade {scale.relevant_from}
({_line(scale.grades[scale.relevant_from].name)}) up.

{grades}

## Use

For ranking and filtering search ads in the language and market it was trained on. Not for judging whether an ad is
lawful, true or safe: it has learned relevance only. Ads are written by advertisers; text made to look relevant can
raise its score.

## Training

| | |
|---|---|
| rows with a human grade | {student["n_gold"]:,} |
| rows annotated by the teacher | {student["n_annotated"]:,} |
| annotation key | {student["annotation_key"] or "none"} |
| encoder | {_line(student["base"])} |
| epochs (best of) | {student["best_epoch"]} of {student["epochs"]} |
| longest input | {student["max_length"]} tokens |
| temperature, threshold (from split valid, as the head's bias) | {student["temperature"]:.4f}, {student["threshold"]:.4f} |
| data fingerprint | {student["data_fingerprint"]} |
| model fingerprint | {student["fingerprint"]} |

## Evaluation

{_floor(evaluation)}Human grades of split test ({evaluation["n"]:,} pairs of {evaluation["n_queries"]:,} queries),
with 95 % bootstrap intervals resampled by query.

{metrics_table(evaluation)}

{decisions_table(evaluation, scale) if student["threshold"] == evaluation["threshold"] else ""}
"""


def _floor(evaluation: dict[str, Any]) -> str:
    fault = floor_fault(evaluation)
    return f"**Do not deploy: {fault}.**\n\n" if fault else ""


def metrics_table(evaluation: dict[str, Any]) -> str:
    """Systems × metrics, as a Markdown table."""
    names = [name for name in _TITLES if any(name in system["metrics"] for system in evaluation["systems"])]
    lines = ["| system | " + " | ".join(_TITLES[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for system in evaluation["systems"]:
        cells = [_cell(system["metrics"].get(name)) for name in names]
        lines.append(f"| {system['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def decisions_table(evaluation: dict[str, Any], scale: GradeScale) -> str:
    """What decisions catch, as a Markdown table; empty without any."""
    if not evaluation["decisions"]:
        return ""
    lines = [
        "Decisions, at thresholds from split valid; `score.py --at DECISION` takes them, and any other.",
        "",
        "| decision | catches | precision | recall | share of all pairs | threshold |",
        "|---|---|---|---|---|---|",
    ]
    for row in evaluation["decisions"]:
        what = f"{_line(scale.grades[row['grade']].name)} or {'better' if row['or_better'] else 'worse'}"
        cells = [_cell(row.get(name)) for name in ("precision", "recall", "caught")]
        threshold = row["fault"] or f"{row['threshold']:.4f}"
        lines.append(f"| `{_line(row['decision'])}` | {what} | {' | '.join(cells)} | {threshold} |")
    return "\n".join(lines)


def export_card(trained_card: str, parity: dict[str, Any]) -> str:
    """The card of an exported student: the trained one's, how to score with the folder, and what the export changed."""
    rows = []
    for precision in (name for name in MODEL_FILES if name in parity):
        measured = parity[precision]
        rows.append(
            f"| {precision} | {measured['file']} | {measured['megabytes']:.1f} | {measured['pairs_per_second']:,.0f} | "
            f"{measured['max_abs_dp']:.1e} | {_number(measured['roc_auc'])} |"
        )
    table = "\n".join(rows)
    return f"""{trained_card}
## Scoring with this folder

`pip install numpy onnxruntime tokenizers`; nothing else is needed. In the folder that holds this one (here `export`):

```python
import sys

sys.path.insert(0, "export")
from score import Scorer

scorer = Scorer("export", precision="int8")
pairs = [{{"query": "red shoes", "ad_title": "Red running shoes", "ad_text": None, "attributes": {{"size": "42"}}}}]
probs = scorer.grade_probs(pairs)
print(scorer.p_relevant(probs), scorer.p_relevant(probs) >= scorer.threshold)
```

Or, JSON lines in and out: `python export/score.py int8 < pairs.jsonl > scores.jsonl`; with `--at precision=0.95`, or
`--at GRADE:precision=0.95`, each line also has a `decision`, at a threshold from the labels of split valid.

## Export

Compared with the trained model on {parity["n"]:,} pairs; throughput on this build's machine with
{parity["threads"]} threads, batches of {parity["batch_tokens"]} tokens. int8 decides otherwise than fp32 on
{_changed(parity)} of the pairs of each grade.

| precision | file | MB | pairs/s | max abs. Δp | ROC-AUC |
|---|---|---|---|---|---|
{table}
"""


def _cell(interval: dict[str, float | None] | None) -> str:
    if interval is None or interval["value"] is None:
        return "–"
    if interval["low"] is None:
        return f"{interval['value']:.3f}"
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _changed(parity: dict[str, Any]) -> str:
    return ", ".join(f"{share['value']:.1%}" for share in parity["int8_decisions_changed"].values())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _line(text: str) -> str:
    """Text of a user on one line that cannot break out of its table or list."""
    return " ".join(text.split()).replace("|", "\\|")
