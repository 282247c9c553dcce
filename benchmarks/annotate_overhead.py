"""The annotation job over vLLM against a bare `LLM.generate`, and `transformers.generate`, on the same prompts.

    python -m benchmarks.annotate_overhead TEACHER PAIRS [--pairs-count 1000] [--samples 4] [--rounds 2]

Each side runs in a process of its own, alternating. Start-up is apart on every side: the clock begins when the model is
loaded and has completed eight other prompts. `job`: from there to the last committed file, with Spark, prompts, votes and
Parquet in it. `bare`: one call of `LLM.generate` with all prompts, already tokenised, the engine's options and the job's
sampling. `transformers`: `model.generate` over prompts sorted by length, the best of several batch sizes, on fewer pairs.
`prefix` is the share of prompt tokens that vLLM's prefix cache gave back under the full guideline. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.children import TORCH, answer, ask
from benchmarks.replay import pool_rows
from pipeline.annotation.worker import Job, start_annotator
from teacher.annotator import Annotator
from teacher.engines.base import Sampling
from teacher.engines.config import VLLMConfig

_ENGINE = VLLMConfig(max_model_len=512)
_READY = "ready"  # file beside the output: when the job's engine was ready
_BATCHES = (32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--pairs-count", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--transformers-pairs", type=int, default=128)
    parser.add_argument("--sides", nargs="+", default=["job", "bare", "transformers", "prefix"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sides = {"job": job, "bare": bare, "transformers": transformers, "prefix": prefix}
    if options.side:
        answer(sides[options.side](options))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for round_ in range(options.rounds):
        pair = [side for side in ("job", "bare") if side in options.sides]
        for side in pair if round_ % 2 else pair[::-1]:
            found.setdefault(side, []).append(_child(side))
    line: dict[str, Any] = {"benchmark": "annotate_overhead", "pairs": options.pairs_count, "samples": options.samples}
    rates = {side: [run["pairs_per_s"] for run in runs] for side, runs in found.items()}
    line["pairs_per_s"] = rates
    if {"job", "bare"} <= set(rates):
        line["ratio"] = round(statistics.median(rates["job"]) / statistics.median(rates["bare"]), 3)
        line["tokens"] = {side: runs[0]["tokens"] for side, runs in found.items()}
    if "transformers" in options.sides:
        line["transformers"] = _child("transformers")
        best = max(line["transformers"].values())
        line["ratio_to_transformers"] = round(statistics.median(rates["job"]) / best, 2) if "job" in rates else None
    if "prefix" in options.sides:
        line["prefix"] = _child("prefix")
    print(json.dumps(line))


def job(options: argparse.Namespace) -> dict[str, Any]:
    """The job, from the moment that its engine is ready."""
    from pipeline.annotation.config import AnnotateConfig
    from pipeline.annotation.job import annotate
    from pipeline.spark import SparkConfig, start_spark

    config = AnnotateConfig(
        n=options.samples,
        temperature=1.0,
        max_in_flight=512,
        limit=options.pairs_count,
        engine=_ENGINE,
        max_failed_share=1.0,
    )
    spark = start_spark(SparkConfig(master="local[2]"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "annotations"
        metrics = annotate(config, options.teacher, options.pairs, out, spark, load_and_note).figures
        ready = float((Path(folder) / _READY).read_text(encoding="utf-8"))
        seconds = max(file.stat().st_mtime for file in out.glob("[!_]*.parquet")) - ready
    return {"pairs_per_s": round(metrics["pairs"] / seconds, 2), "tokens": metrics["completion_tokens"]}


def load_and_note(job: Job) -> Annotator:
    """The product's own teacher, warmed up, and a note of when that was done."""
    annotator = start_annotator(job)
    annotator.engine.generate(_warm_up(), job.sampling)
    (Path(job.out).parent / _READY).write_text(str(time.time()), encoding="utf-8")
    return annotator


def bare(options: argparse.Namespace) -> dict[str, Any]:
    """One call of vLLM's `LLM.generate`."""
    from vllm import SamplingParams

    from teacher.engines.base import prompt_seed
    from teacher.engines.vllm_engine import VLLMEngine

    prompts = _prompts(options, options.pairs_count)
    sampling = _sampling(options)
    engine = VLLMEngine(_ENGINE, options.teacher)  # for the same options; what is measured is its `LLM`
    engine.generate(_warm_up(), sampling)
    parameters = [
        SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=prompt_seed(sampling.seed, prompt),
            logprobs=sampling.logprobs,
            flat_logprobs=True,
        )
        for prompt in prompts
    ]
    inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.monotonic()
    outputs = engine._llm.generate(inputs, parameters, use_tqdm=False)
    seconds = time.monotonic() - begin
    tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    return {"pairs_per_s": round(len(prompts) / seconds, 2), "tokens": tokens}


def transformers(options: argparse.Namespace) -> dict[str, float]:
    """Pairs per second of `model.generate` by batch size (sequences decoded at the same time)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    model = AutoModelForCausalLM.from_pretrained(options.teacher, dtype="float32").eval()
    prompts = sorted(_prompts(options, options.transformers_pairs), key=len)
    found = {}
    for size in _BATCHES:
        step = max(1, size // options.samples)
        begin = time.monotonic()
        for start in range(0, len(prompts), step):
            batch = tokenizer.pad({"input_ids": prompts[start : start + step]}, return_tensors="pt")
            with torch.inference_mode():
                model.generate(
                    **batch,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    num_return_sequences=options.samples,
                    max_new_tokens=_sampling(options).max_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                )
        found[str(size)] = round(len(prompts) / (time.monotonic() - begin), 2)
    return found


def prefix(options: argparse.Namespace) -> dict[str, Any]:
    """How much of the prompts comes out of the prefix cache when they begin with the full guideline and the grades."""
    from transformers import AutoTokenizer

    from teacher.config import PromptConfig
    from teacher.engines.vllm_engine import VLLMEngine
    from teacher.prompt import Prompt, PromptWriter, load_prompt

    given = load_prompt(options.teacher)
    full = Prompt(PromptConfig(), given.scale, given.max_completion_tokens)
    writer = PromptWriter(full, AutoTokenizer.from_pretrained(options.teacher))
    prompts = [made for made in writer(pool_rows(options.pairs, 200)) if not isinstance(made, str)]

    class CountingEngine(VLLMEngine):
        prompt_tokens = cached_tokens = 0

        def _take(self, output: Any) -> tuple[Any, Any]:
            self.prompt_tokens += len(output.prompt_token_ids)
            self.cached_tokens += output.num_cached_tokens or 0
            return super()._take(output)

    engine = CountingEngine(VLLMConfig(), options.teacher)
    block_size = engine._llm.llm_engine.vllm_config.cache_config.block_size
    engine.generate(prompts, Sampling(n=1, max_tokens=4))
    first, last = min(prompts), max(prompts)
    shared = next(place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return {
        "prompt_tokens": engine.prompt_tokens,
        "shared_tokens_of_a_prompt": shared,
        "block_size": block_size,
        "hit_rate": round(engine.cached_tokens / engine.prompt_tokens, 3),
        "hit_rate_possible": round(shared // block_size * block_size * len(prompts) / engine.prompt_tokens, 3),
    }


def _sampling(options: argparse.Namespace) -> Sampling:
    from teacher.prompt import load_prompt

    prompt = load_prompt(options.teacher)
    return Sampling(
        n=options.samples, temperature=1.0, max_tokens=prompt.max_completion_tokens, logprobs=prompt.scale.size + 4
    )


def _warm_up() -> list[list[int]]:
    return [[20 + i, 30, 40, 50] for i in range(8)]


def _prompts(options: argparse.Namespace, count: int) -> list[list[int]]:
    """The prompts of the pairs that the job annotates, longest first like there."""
    from transformers import AutoTokenizer

    from teacher.prompt import PromptWriter, load_prompt

    writer = PromptWriter(load_prompt(options.teacher), AutoTokenizer.from_pretrained(options.teacher))
    made = writer(pool_rows(options.pairs, count))
    return sorted((ids for ids in made if not isinstance(ids, str)), key=lambda ids: -len(ids))


def _child(side: str) -> dict[str, Any]:
    return ask("benchmarks.annotate_overhead", *sys.argv[1:], "--side", side, environment=TORCH)


if __name__ == "__main__":
    main()
