"""A step of AGPOTrainer against a step of TRL's own GRPOTrainer on identical work.

    python -m benchmarks.trainer_overhead                                 # the demo's decoder and prompts
    python -m benchmarks.trainer_overhead --model FOLDER --full-length    # a real model, the default guideline

Identical: model, prompts, order, seed, rewards, settings; the learning rate is 0, so that both sample the same
completions in every step although their advantages differ. For that TRL's side takes our way to draw a token, which is
faster than its own (`benchmarks.decoding` compares them); `same_completions` says whether rounding has changed none of them.
Each side runs in a process of its own, alternating, so that peak memory is its own and slow minutes of the machine meet
both. Prints one JSON line: medians of seconds per step, of its training part (loss, gradient, update; the rest is sampling
and rewards), and peak memory. On a CPU the seconds are those of the processor, so that other work on the machine does not
count.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.children import TORCH, answer, ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; the demo's untrained decoder if left out")
    parser.add_argument("--prompts", type=int, default=24, help="in a step")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=40, help="of a completion at most")
    parser.add_argument("--full-length", action="store_true", help="completions go on behind an end, to all --tokens")
    parser.add_argument("--micro-batch", type=int, default=96, help="completions at most in a pass of TRL's")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="tokens at most in a pass of ours")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights")
    parser.add_argument("--steps", type=int, default=10, help="measured in a process, after one for warming up")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--side", choices=("ours", "stock"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        answer(measure(options.side, options))
        return
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "stock": []}
    for round_ in range(options.rounds):
        for side in ("ours", "stock") if round_ % 2 else ("stock", "ours"):
            runs[side].append(ask("benchmarks.trainer_overhead", *sys.argv[1:], "--side", side, environment=TORCH))
    same = len({run["completions"] for side in runs.values() for run in side}) == 1
    if not same and not options.full_length:
        raise SystemExit("the two sides did not sample the same completions: the work was not identical")
    report: dict[str, Any] = {"benchmark": "trainer_overhead", "model": str(options.model or "demo")}
    # With a vocabulary of 150,000, rounding may draw another token once in a thousand; of full length the work is the same.
    report["same_completions"] = same
    for name in ("step_seconds", "training_seconds", "peak_mib"):
        medians = {side: statistics.median(value for run in runs[side] for value in run[name]) for side in runs}
        report[name] = {side: round(value, 4) for side, value in medians.items()}
        report[f"{name}_ratio"] = round(medians["ours"] / medians["stock"], 4)
    report |= {
        "lora": options.lora,
        "steps": options.steps * options.rounds,
        "completions_per_step": options.prompts * options.group,
    }
    print(json.dumps(report | {name: runs["ours"][0][name] for name in ("completion_tokens", "device")}))


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train for 1 + `steps` steps: seconds of the last `steps`, peak memory, a digest of what was sampled."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from teacher.advantages import agpo
    from teacher.config import TeacherConfig
    from teacher.decoding import draw
    from teacher.model import add_adapters, load_model
    from teacher.trainer import AGPOTrainer
    from teacher.trl_parts import GRPOConfig, GRPOTrainer  # without vLLM on either side

    cuda, multinomial = torch.cuda.is_available(), torch.multinomial
    clock = time.perf_counter if cuda else time.process_time
    ended: list[float] = []
    sampling: list[float] = [0.0]
    lengths: list[int] = []
    digest = hashlib.sha256()

    class Clock(TrainerCallback):
        def on_step_end(self, *unused: Any, **more: Any) -> None:
            ended.append(clock())
            sampling.append(0.0)

    def reward(completions: list[str], completion_ids: list[list[int]], **unused: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        digest.update("\n".join(completions).encode())
        return [1.0 if len(text) % 2 else -1.0 for text in completions]

    class Timed(GRPOTrainer if side == "stock" else AGPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start = clock()
            output = super()._generate_and_score_completions(inputs)
            if cuda:
                torch.cuda.synchronize()
            sampling[-1] += clock() - start
            return output

    with tempfile.TemporaryDirectory() as folder:
        base, prompts = _work(options, Path(folder))
        config = TeacherConfig(lora_rank=options.lora)
        model, tokenizer = load_model(base, config)
        model = add_adapters(model, config)
        completions = options.prompts * options.group
        micro = completions if side == "ours" else min(options.micro_batch, completions)
        own = {"advantages": agpo, "micro_batch_tokens": options.micro_batch_tokens} if side == "ours" else {}
        trainer = Timed(
            model=model,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=completions // micro,
                num_generations=options.group,
                max_completion_length=options.tokens,
                max_steps=options.steps + 1,
                learning_rate=0.0,
                use_cpu=not cuda,
                bf16=cuda,
                gradient_checkpointing=False,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                seed=0,
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            reward_funcs=reward,
            callbacks=[Clock()],
            **own,
        )
        if side == "stock":
            torch.multinomial = _drawing(draw)  # what `generate` calls
        if options.full_length:  # ours samples until one of the trainer's end tokens, TRL by the generation settings
            no_token = model.config.vocab_size
            trainer.eos_token_ids = [no_token]
            trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = no_token
        try:
            trainer.train()
        finally:
            torch.multinomial = multinomial
    steps = [after - before for before, after in itertools.pairwise(ended)]
    training = [whole - sampled for whole, sampled in zip(steps, sampling[1:], strict=False)]
    # ru_maxrss is in KiB on Linux
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    return {
        "step_seconds": steps,
        "training_seconds": training,
        "peak_mib": [peak],
        "completions": digest.hexdigest(),
        "completion_tokens": statistics.mean(lengths),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def _drawing(draw: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """`torch.multinomial` for one outcome of each distribution (rows, outcomes), by `teacher.decoding.draw`."""
    import torch

    def multinomial(probabilities: Any, num_samples: int) -> Any:
        numbers = torch.rand(len(probabilities), dtype=torch.float64, device=probabilities.device)
        return draw(probabilities, numbers)[:, None]

    return multinomial


def _work(options: argparse.Namespace, folder: Path) -> tuple[Path, list[str]]:
    """The model folder and 200 prompts of made-up pairs: as in the demo, or with the default guideline for a real model."""
    from transformers import AutoTokenizer

    from data.sources.synthetic import SCALE, generate
    from pipeline.settings import load_preset
    from teacher.chat_template import plain_chat_template
    from teacher.config import PromptConfig
    from teacher.prompt import Prompt
    from teacher.scratch import train_tokenizer, write_decoder

    pairs: list[dict[str, Any]] = list(generate(2000, seed=0))
    if options.model:
        base, config = options.model, PromptConfig()
    else:
        texts = [f"Query: {pair['query']}\nAd: {pair['ad_title']}\nText: {pair['ad_text']}" for pair in pairs]
        tokenizer = train_tokenizer(iter(texts), 1500)
        base = write_decoder(
            tokenizer, folder / "model", 0, hidden=128, layers=3, heads=4, feed_forward=384, positions=1024
        )
        config = load_preset("sample").teacher.prompt
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template or plain_chat_template(tokenizer)
    prompt = Prompt(config, SCALE, options.tokens)
    rows = pairs[:200]
    return base, [prompt.text(tokenizer, p["query"], p["ad_title"], p["ad_text"], dict(p["attributes"])) for p in rows]


if __name__ == "__main__":
    main()
