"""Which engine grades fastest on this machine, in which number format: pairs of a pool, greedily, with one teacher.

    python -m benchmarks.engines --pairs runs/cpu-real/pairs --model DIR_OF_A_CAUSAL_LM

The prompts are those of a preset, cpu-real unless `--preset` names another. Each engine is a process of its own, and has
read a few prompts before the clock starts; loading is not timed. Prints one JSON line: pairs per second of each engine, and
the ratio of the fastest to vLLM in float32, where that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.children import TORCH, answer, ask

ENGINES = ("transformers-bfloat16", "transformers-float32", "vllm-bfloat16", "vllm-float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--preset", default="cpu-real")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--count", type=int, default=192)
    parser.add_argument("--whole", action="store_true", help="let it write the whole answer, where one token would do")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        answer(measure(options))
        return
    offline = TORCH | {"HF_HUB_OFFLINE": "1"}
    rates = {
        name: ask("benchmarks.engines", *sys.argv[1:], "--engine", name, environment=offline)
        for name in options.engines
    }
    line: dict[str, Any] = {"benchmark": "engines", "pairs": options.count, "threads": len(os.sched_getaffinity(0))}
    line["pairs_per_second"] = rates
    if "vllm-float32" in rates:
        line["ratio"] = round(max(rates.values()) / rates["vllm-float32"], 2)
    print(json.dumps(line))


def measure(options: argparse.Namespace) -> float:
    """Pairs per second of one engine."""
    import pyarrow.dataset as pads

    from pipeline.settings import choose
    from teacher.engines import open_engine
    from teacher.engines.base import Sampling
    from teacher.engines.config import TransformersConfig, VLLMConfig
    from teacher.model import load_tokenizer
    from teacher.prompt import Prompt, PromptWriter

    settings = choose(options.preset)
    pool = pads.dataset(options.pairs / "pairs").to_table(filter=pads.field("split") == "pool").sort_by("pair_id")
    write = PromptWriter(Prompt.of(settings.teacher, options.pairs), load_tokenizer(options.model))
    written = write(pool.slice(0, options.count).to_pylist())
    prompts = [prompt for prompt in written if not isinstance(prompt, str)]  # a string says why there is none
    kind, dtype = options.engine.split("-")
    config = {"vllm": VLLMConfig, "transformers": TransformersConfig}[kind](dtype=dtype, max_model_len=512)
    longest = 1 if write.opening and not options.whole else settings.teacher.max_completion_tokens
    if options.whole:
        prompts = [prompt[: len(prompt) - len(write.opening)] for prompt in prompts]
    sampling = Sampling(temperature=0.0, max_tokens=longest, logprobs=20)
    engine = open_engine(config, options.model)
    engine.generate(prompts[:4], sampling)
    began = time.perf_counter()
    engine.generate(prompts, sampling)
    rate = len(prompts) / (time.perf_counter() - began)
    engine.close()
    return round(rate, 2)


if __name__ == "__main__":
    main()
