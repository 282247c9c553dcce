"""The model card of a teacher."""

from __future__ import annotations

from pathlib import Path

from data.contracts import write_text
from teacher.config import TeacherConfig
from teacher.prompt import Prompt


def write_card(
    folder: Path,
    config: TeacherConfig,
    prompt: Prompt,
    metrics: dict[str, dict[str, float]],
    fingerprint: str,
    data_fingerprint: str,
) -> None:
    """Write `model_card.md`: what the model is for, where it comes from, how it was measured, what it cannot do."""
    grades = "\n".join(
        f"- {number}: {grade.name}: {grade.definition}" for number, grade in enumerate(prompt.scale.grades)
    )
    names = ("accuracy", "macro_f1", "auc", "pass@1", "parse_rate", "completion_tokens")
    rows = "\n".join(
        f"| {phase} | " + " | ".join(f"{values[name]:.3f}" if name in values else "–" for name in names) + " |"
        for phase, values in metrics.items()
    )
    text = f"""# Relevance teacher

Grades how well an ad answers a search query, with a reason, on this scale (relevant from {prompt.scale.relevant_from}):

{grades}

- base model: `{config.model}`
- weights fingerprint: `{fingerprint}` · data fingerprint: `{data_fingerprint}` · prompt version: `{prompt.version}`
- training: warm start on {config.warm_start.examples} rationales, then {config.agpo.steps} steps of
  {config.agpo.estimator} (δ = {config.agpo.delta}, R = {config.agpo.negative}, G = {config.agpo.group_size}),
  seed {config.seed}

## On the validation split

| phase | {" | ".join(names)} |
|---|{"---|" * len(names)}
{rows}

Accuracy and macro-F1 are of the greedy answer; pass@1 and the AUC are of samples at temperature 1.

## Limits

It was measured on queries and ads like those it was trained on. Its reasons are generated text: they may be wrong where
its grade is right. Use `prefect run annotate`, which counts what it fails to answer.
"""
    write_text(folder / "model_card.md", text)
