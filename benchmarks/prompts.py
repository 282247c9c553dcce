"""Token ids of prompts: ours against a chat template applied to every pair, which is what a script would do.

    python -m benchmarks.prompts TEACHER PAIRS [--count 4000] [--rounds 5]

TEACHER is a teacher's model folder; its tokenizer writes prompts with the teacher's own guideline and with the default one.
Ours cleans and checks hostile text as well (see `teacher.prompt`); the script's line puts texts into the message as they
are. Microseconds of a core for a pair, the best of the rounds, which take turns. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.replay import pool_rows
from pipeline.rows import Row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a worker of the job

    from transformers import AutoTokenizer

    from teacher.config import PromptConfig
    from teacher.prompt import Prompt, PromptWriter, load_prompt

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    own = load_prompt(options.teacher)
    full = Prompt(PromptConfig(), own.scale, own.max_completion_tokens)
    rows = pool_rows(options.pairs, options.count)
    found = {
        name: compare(rows, tokenizer, prompt.system(), PromptWriter(prompt, tokenizer), options.rounds)
        for name, prompt in (("own_guideline", own), ("default_guideline", full))
    }
    print(json.dumps({"benchmark": "prompts", "pairs": len(rows), **found}))


def compare(
    rows: Sequence[Row],
    tokenizer: Any,
    system: str,
    writer: Callable[[Sequence[Row]], list[list[int] | str]],
    rounds: int,
) -> dict[str, float]:
    """Both sides over the same pairs: tokens of a prompt, microseconds of a core for a pair, and their ratio."""

    def script() -> list[list[int]]:
        return [
            tokenizer.apply_chat_template(
                [
                    {"role": "system", "content": system},
                    {
                        "role": "user",
                        "content": f"Query: {row['query']}\nAd: {row['ad_title']}\nText: {row['ad_text']}",
                    },
                ],
                add_generation_prompt=True,
            )["input_ids"]
            for row in rows
        ]

    def ours() -> list[list[int]]:
        return [made for made in writer(rows) if not isinstance(made, str)]

    best = {"ours": float("inf"), "script": float("inf")}
    tokens = 0.0
    for _ in range(rounds):
        for name, side in (("script", script), ("ours", ours)):
            begin = time.process_time()
            made = side()
            best[name] = min(best[name], (time.process_time() - begin) / len(rows) * 1e6)
        tokens = sum(map(len, made)) / len(made)
    return {
        "tokens": round(tokens, 1),
        "ours_us": round(best["ours"], 1),
        "script_us": round(best["script"], 1),
        "ratio": round(best["script"] / best["ours"], 2),
    }


if __name__ == "__main__":
    main()
