"""A step of AGPOTrainer against a step of TRL's own GRPOTrainer on identical work.

    python -m benchmarks.trainer_overhead

Identical: model, prompts, order, seed, rewards, settings; the learning rate is 0, so that both sample the same
completions in every step although their advantages differ. Each side runs in a process of its own, alternating, so that
peak memory is its own and slow minutes of the machine meet both. Prints one JSON line: medians of seconds per step, peak
resident memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.children import TORCH, answer, ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25, help="measured in a process, after three for warming up")
    parser.add_argument("--rounds", type=int, default=4, help="processes of each side")
    parser.add_argument("--side", choices=("ours", "stock"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        answer(measure(options.side, options.steps))
        return
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "stock": []}
    for round_ in range(options.rounds):
        for side in ("ours", "stock") if round_ % 2 else ("stock", "ours"):
            found[side].append(_child(side, options.steps))
    if len({run["completions"] for runs in found.values() for run in runs}) != 1:
        raise SystemExit("the two sides did not sample the same completions: the work was not identical")
    seconds = {side: statistics.median(s for run in runs for s in run["seconds"]) for side, runs in found.items()}
    peak = {side: statistics.median(run["peak_mib"] for run in runs) for side, runs in found.items()}
    print(
        json.dumps(
            {
                "benchmark": "trainer_overhead",
                "seconds_per_step": {side: round(value, 4) for side, value in seconds.items()},
                "time_ratio": round(seconds["ours"] / seconds["stock"], 4),
                "peak_mib": {side: round(value, 1) for side, value in peak.items()},
                "memory_ratio": round(peak["ours"] / peak["stock"], 4),
                "steps": options.steps * options.rounds,
                "completions_per_step": 128,
            }
        )
    )


def measure(side: str, steps: int) -> dict[str, Any]:
    """Train for 3 + `steps` steps; seconds of each of the last `steps`, peak memory, a digest of what was sampled."""
    import hashlib

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks import countdown
    from teacher.advantages import agpo
    from teacher.config import TeacherConfig
    from teacher.model import load_model
    from teacher.trainer import AGPOTrainer

    torch.manual_seed(0)
    clock: list[float] = []
    digest = hashlib.sha256()

    class Clock(TrainerCallback):
        def on_step_begin(self, *unused: Any, **more: Any) -> None:
            clock.append(time.perf_counter())

    def reward(completions: list[str], **unused: Any) -> list[float]:
        digest.update("\n".join(completions).encode())
        return [1.0 if len(text) % 2 else -1.0 for text in completions]

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model(countdown.make_model(Path(folder) / "model", 0), TeacherConfig())
        options: dict[str, Any] = {
            "model": model,
            "args": GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=128,
                num_generations=8,
                max_completion_length=24,
                max_steps=steps + 4,
                learning_rate=0.0,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                seed=0,
            ),
            "processing_class": tokenizer,
            "train_dataset": Dataset.from_list([{"prompt": p.prompt} for p, _ in countdown.make_problems(500, 0)]),
            "reward_funcs": reward,
            "callbacks": [Clock()],
        }
        trainer = GRPOTrainer(**options) if side == "stock" else AGPOTrainer(**options, advantages=agpo)
        trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(clock[3:])]
    # ru_maxrss is in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak, "completions": digest.hexdigest()}


def _child(side: str, steps: int) -> dict[str, Any]:
    return ask("benchmarks.trainer_overhead", "--side", side, "--steps", str(steps), environment=TORCH)


if __name__ == "__main__":
    main()
