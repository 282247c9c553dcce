"""Task `math`, the other half of the paper: problems with one short answer, which `math-verify` compares.

Its prompt, its problems and its judge are here together. It shares trainer, estimators and pass@k with task `relevance`, of
which the product is made; `benchmarks/estimators.py` runs it. What was left out: proofs and multiple choice.
"""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.contracts import ContractError
from teacher.examples import Problem
from teacher.verifier import Judge

INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
# A longer completion is read from its end: that is where the answer is, and the parser's time stays bounded.
_MOST_CHARS = 20_000


def load_problems(path: Path, tokenizer: Any, limit: int | None = None) -> list[Problem]:
    """Problems of a JSON-lines file (gzip if named `.gz`) with string fields `question` and `answer`, in its order.

    Raises:
        ContractError: no such file, a line that is no JSON object with these fields, or no problem at all.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    problems: list[Problem] = []
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(problems) >= limit:
                    break
                problems.append(_problem(line, f"{path}, line {number}", tokenizer))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ContractError(f"{path} cannot be read: {error}") from None
    if not problems:
        raise ContractError(f"{path} holds no problem")
    return problems


def math_judge() -> Judge:
    """The judge of task `math`: is what the completion puts in \\boxed{} equal to the gold answer?

    None when nothing in a box can be parsed. Several boxes with different contents are wrong. Needs `math-verify`, whose
    time limits work in the main thread only.

    Raises:
        ContractError: `math-verify` is not installed.
    """
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError:
        raise ContractError("task math needs the package math-verify: pip install 'ads-relevance[math]'") from None
    boxes = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    anywhere = [LatexExtractionConfig(), ExprExtractionConfig()]

    @lru_cache(maxsize=4096)
    def parsed_gold(answer: str) -> tuple[Any, ...]:
        return tuple(parse(f"${answer}$", extraction_config=anywhere))

    def judge(text: str, gold: str) -> bool | None:
        if "\\boxed" not in text:
            return None
        found = parse(text[-_MOST_CHARS:], extraction_config=boxes, fallback_mode="no_fallback")
        return bool(verify(list(parsed_gold(gold)), found)) if found else None

    return judge


def _problem(line: str, where: str, tokenizer: Any) -> Problem:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ContractError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("question", "answer")):
        raise ContractError(f"{where} lacks the text fields 'question' and 'answer'")
    messages = [{"role": "user", "content": f"{row['question']}\n\n{INSTRUCTION}"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return Problem(prompt, row["answer"])
