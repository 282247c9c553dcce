"""Labelled pairs as training and evaluation examples."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads

from data.contracts import PAIRS, RATIONALES, TEXTS, ContractError, read_table
from teacher.prompt import Prompt
from teacher.rationale import lexical_rationale
from teacher.verifier import ANSWER

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """What the trainer needs of any task: a rendered prompt and the answer that the task's judge compares with."""

    prompt: str
    gold: Any


@dataclass(frozen=True)
class Example(Problem):
    """A labelled pair; `gold` is the human grade."""

    target: str
    """A completion that is right: a reason (unless the prompt asks for none), then the answer tag."""
    pair_id: str = ""


def with_reasons(examples: Iterable[Example], reasons: Mapping[str, str]) -> list[Example]:
    """The examples whose pair has one of these reasons, by pair_id, with it in their target."""
    return [
        replace(example, target=f"{reasons[example.pair_id]} {ANSWER.format(grade=example.gold)}")
        for example in examples
        if example.pair_id in reasons
    ]


def load_examples(pairs: Path, split: str, prompt: Prompt, tokenizer: Any, limit: int, seed: int) -> list[Example]:
    """The rows of `labelled_rows` as examples, rendered by `prompt` for `tokenizer`."""
    rows = labelled_rows(pairs, split, limit, seed)
    folder = pairs / "rationales"
    reasons: dict[str, str] = {}
    if split == "train" and folder.exists():
        reasons = dict(zip(*read_table(folder, RATIONALES).to_pydict().values(), strict=True))
    examples = []
    for row in rows:
        query, title, text = row["query"], row["ad_title"], row["ad_text"]
        rendered = prompt.text(tokenizer, query, title, text, dict(row["attributes"] or ()))
        target = ANSWER.format(grade=row["grade"])
        if prompt.config.reason:
            reason = reasons.get(row["pair_id"]) or lexical_rationale(query, f"{title} {text or ''}")
            target = f"{reason} {target}"
        examples.append(Example(rendered, row["grade"], target, row["pair_id"]))
    return examples


def evenly(examples: Sequence[Example]) -> list[Example]:
    """The examples, those of rarer grades repeated, so that every grade is as frequent as the commonest one."""
    by_grade: dict[int, list[Example]] = {}
    for example in examples:
        by_grade.setdefault(example.gold, []).append(example)
    most = max(map(len, by_grade.values()), default=0)
    return [example for _, group in sorted(by_grade.items()) for example in islice(cycle(group), most)]


def load_texts(pairs: Path, prompt: Prompt, tokenizer: Any, limit: int) -> list[Example]:
    """The first `limit` texts beside the pairs, as examples that have no label; none where there are no texts."""
    if not limit or not (pairs / "texts").exists():
        return []
    rows = read_table(pairs / "texts", TEXTS).slice(0, limit).to_pylist()
    prompts = ("" if row["query"] is None else prompt.text(tokenizer, row["query"], row["ad_title"]) for row in rows)
    return [Example(text, None, row["text"]) for text, row in zip(prompts, rows, strict=True)]


def labelled_rows(pairs: Path, split: str, limit: int, seed: int) -> list[dict[str, Any]]:
    """The first `limit` labelled pairs of `split` in an order that a hash of their ids and the seed fixes.

    `pairs` is the folder that data-prepare wrote. Raises `ContractError` if the split has no labelled pair.
    """
    where = (pads.field("split") == split) & pads.field("grade").is_valid()
    rows = read_table(pairs / "pairs", PAIRS, where=where).to_pylist()
    if not rows:
        raise ContractError(f"{pairs}: split '{split}' has no labelled pair; give the source more labels or shares")
    rows.sort(key=lambda row: hashlib.sha256(f"{seed}:{row['pair_id']}".encode()).digest())
    return rows[:limit]


def drop_too_long(
    examples: list[Example], tokenizer: Any, positions: int | None, max_completion_tokens: int
) -> list[Example]:
    """The examples whose prompt leaves room for a completion, and for the target, in a model of so many positions.

    Those left out are counted in one warning. Raises `ContractError` if none is left.
    """
    if positions is None or not examples:
        return examples
    prompts = tokenizer([example.prompt for example in examples], add_special_tokens=False)["input_ids"]
    targets = tokenizer([example.target for example in examples], add_special_tokens=False)["input_ids"]
    needs = [
        len(prompt) + max(max_completion_tokens, len(target) + 1)
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    fitting = [example for example, need in zip(examples, needs, strict=True) if need <= positions]
    remedy = (
        f"the longest needs {max(needs):,} tokens with its completion, and the model has {positions:,} positions: lower "
        "teacher.prompt.max_text_chars or teacher.max_completion_tokens, or choose another model"
    )
    if not fitting:
        raise ContractError(f"every prompt is too long; {remedy}")
    if len(fitting) < len(examples):
        logger.warning(
            "%d of %d examples are left out as too long; %s", len(examples) - len(fitting), len(examples), remedy
        )
    return fitting
