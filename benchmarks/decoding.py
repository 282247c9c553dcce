"""How fast rollouts are sampled: `teacher.decoding.sample_completions` against transformers' `generate`, which TRL uses.

    python -m benchmarks.decoding --pairs PAIRS --model DIR_OF_A_CAUSAL_LM --prompts 8 --group 16 --tokens 48

Prompts are those of a teacher with reasons (benchmarks/gpu/reasons.toml) for the pairs that a training would see first. No
completion ends before its last token, so that both sides compute as many. They take turns, `--rounds` each. Prints one JSON
line: tokens a second, the median of the rounds, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from pipeline.settings import choose
from teacher.decoding import sample_completions
from teacher.examples import load_examples
from teacher.model import load_causal_lm
from teacher.prompt import Prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = choose("single-gpu", Path(__file__).parent / "gpu" / "reasons.toml").teacher
    model, tokenizer = load_causal_lm(options.model, options.dtype)
    model.eval()
    prompt = Prompt.of(config, options.pairs)
    examples = load_examples(options.pairs, "train", prompt, tokenizer, options.prompts, 0)
    prompts = [
        ids
        for ids in tokenizer([example.prompt for example in examples], add_special_tokens=False)["input_ids"]
        for _ in range(options.group)
    ]
    sides = {
        "ours": _ours(model, tokenizer, prompts, options.tokens),
        "generate": _generate(model, tokenizer, prompts, options.tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            _finished()
            began = time.perf_counter()
            side()
            _finished()
            seconds[name].append(time.perf_counter() - began)
    rates = {
        name: round(len(prompts) * options.tokens / statistics.median(taken), 1) for name, taken in seconds.items()
    }
    line: dict[str, Any] = {
        "benchmark": "decoding",
        "rows": len(prompts),
        "tokens": options.tokens,
        "dtype": options.dtype,
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    line |= {"device": device, "tokens_per_second": rates, "ratio": round(rates["ours"] / rates["generate"], 2)}
    print(json.dumps(line))


def _ours(model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int) -> Callable[[], Any]:
    return lambda: sample_completions(
        model, prompts, max_tokens=tokens, ends=(), temperature=1.0, pad=tokenizer.pad_token_id
    )


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int) -> Callable[[], Any]:
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.pad_token_id}
    return lambda: model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        **options,
    )


def _finished() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
