"""One method with one seed of `benchmarks.estimators`: warm start (once for each seed), training, samples, a result file."""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.sampling import Sampled, sample
from data.contracts import ContractError, MetricsLog, write_json
from teacher.config import AGPOConfig, CollapseConfig, EvaluationConfig, TeacherConfig, WarmStartConfig
from teacher.examples import Example, Problem
from teacher.model import load_model, save_model
from teacher.policy import train_policy
from teacher.verifier import Judge
from teacher.warm_start import warm_start

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What differs between the tasks. `base(seed, out)` writes the base model, `warm` and the others need its tokenizer."""

    base: Callable[[int, Path], object]
    warm: Callable[[Any], list[Example]]
    train: Callable[[Any], list[Problem]]
    valid: Callable[[Any], list[Problem]]
    test: Callable[[Any], list[Problem]]
    judge: Judge
    config: TeacherConfig
    batch: int = 512
    samples: dict[str, int] = field(default_factory=lambda: {"valid": 64, "test": 256})


def run_method(options: argparse.Namespace, method: str, seed: int) -> None:
    """Train `method` from the seed's warm start and write its result; does nothing when the result is there."""
    folder = options.out / options.task
    target = result_file(folder, method, seed)
    if target.exists():
        return
    task = {"countdown": _countdown, "relevance": _relevance, "gsm8k": _gsm8k}[options.task](options)
    place = folder / f"seed-{seed}"
    base, warm = place / "base", place / "warm"
    config = task.config.model_copy(update={"seed": seed})
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if not warm.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        task.base(seed, base)
        model, tokenizer = load_model(base, config)
        if examples := task.warm(tokenizer):
            warm_start(config, model, tokenizer, examples, place / "warm-checkpoints", MetricsLog(place / "warm.jsonl"))
        save_model(model, tokenizer, warm)
        shutil.rmtree(place / "warm-checkpoints", ignore_errors=True)
    model, tokenizer = load_model(base if method == "base" else warm, config)
    result: dict[str, Any] = {"method": method, "seed": seed}
    if method not in ("base", "warm_start"):
        result |= _train(task, config, method, model, tokenizer, place)
    for split, problems in (("valid", task.valid(tokenizer)), ("test", task.test(tokenizer))):
        if split == "test" and ":" in method:
            continue  # δ and R are chosen on the validation problems, so that the test problems stay unread
        logger.info("%s, seed %d: sampling %d %s problems", method, seed, len(problems), split)
        drawn = sample(
            model,
            tokenizer,
            problems,
            task.judge,
            samples=task.samples[split],
            max_tokens=config.max_completion_tokens,
            batch=task.batch,
            seed=seed,
        )
        result[split] = _plain(drawn)
        logger.info(
            "%s, seed %d, %s: greedy %.3f, pass@1 %.3f", method, seed, split, drawn.greedy, drawn.pass_at(1).mean()
        )
    write_json(target, result)


def result_file(folder: Path, method: str, seed: int) -> Path:
    """Where the result of a method with a seed is kept."""
    return folder / f"seed-{seed}" / f"{method.replace(':', '_').replace(',', '_').replace('=', '')}.json"


def _train(task: Task, config: TeacherConfig, method: str, model: Any, tokenizer: Any, place: Path) -> dict[str, Any]:
    estimator, _, choices = method.partition(":")
    chosen = dict(choice.split("=") for choice in choices.split(",") if choice)
    # Without the collapse detector, and with the last weights: a collapse is a result here.
    changed = {
        "estimator": estimator,
        "keep": "last",
        "collapse": CollapseConfig(window=0),
        **{key: float(value) for key, value in chosen.items()},
    }
    settings = AGPOConfig(**{**config.agpo.model_dump(), **changed})
    name = result_file(Path(), method, 0).stem
    out, log = place / f"train-{name}", MetricsLog(place / f"{name}.jsonl")
    began = time.monotonic()
    _, stopped = train_policy(
        config.model_copy(update={"agpo": settings}),
        model,
        tokenizer,
        task.train(tokenizer),
        task.judge,
        out,
        log,
        lambda live, step: 0.0,
        1.0,
    )
    shutil.rmtree(out, ignore_errors=True)
    steps = log.read("agpo")
    return {
        "seconds": time.monotonic() - began,
        "steps": len(steps),
        "sampled_tokens": sum(step["sampled_tokens"] for step in steps),
        "stopped": stopped,
    }


def _plain(drawn: Sampled) -> dict[str, Any]:
    return {
        "samples": drawn.samples,
        "greedy": drawn.greedy,
        "right": drawn.right.tolist(),
        "distinct": drawn.distinct.tolist(),
        "parse_rate": drawn.parse_rate,
        "entropy": drawn.entropy,
        "tokens": drawn.tokens,
    }


def _countdown(options: argparse.Namespace) -> Task:
    """Base: knows sums and the form of a chain, not what a target is. Warm start: has seen solved problems."""
    from benchmarks import countdown

    def problems(begin: int, end: int) -> tuple[tuple[Problem, str], ...]:
        return countdown.make_problems(end, seed=0)[begin:end]

    config = TeacherConfig(
        warm_start=WarmStartConfig(examples=12_000, epochs=3, batch_size=128, learning_rate=2e-3),
        agpo=AGPOConfig(
            steps=110,
            max_sampled_tokens=900_000,
            prompts_per_step=64,
            group_size=8,
            learning_rate=2e-4,
            checkpoint_every=50,
        ),
        evaluation=EvaluationConfig(every=0),
        max_completion_tokens=countdown.MAX_TOKENS,
    )

    def base(seed: int, out: Path) -> None:
        countdown.make_model(out, seed)
        rng = random.Random(seed)
        examples = []
        for _ in range(30_000):
            numbers = [rng.randint(countdown.SMALLEST, countdown.LARGEST) for _ in range(countdown.NUMBERS)]
            chain, _ = countdown.random_chain(numbers, rng)
            prompt = f"{' '.join(map(str, numbers))} -> {rng.randint(10, countdown.MOST)} :"
            examples.append(Example(prompt, "", chain))
        pretraining = config.model_copy(
            update={"seed": seed, "warm_start": WarmStartConfig(epochs=3, batch_size=128, learning_rate=3e-3)}
        )
        model, tokenizer = load_model(out, config)
        log = MetricsLog(out.parent / "base.jsonl")
        warm_start(pretraining, model, tokenizer, examples, out.parent / "base-checkpoints", log)
        shutil.rmtree(out.parent / "base-checkpoints", ignore_errors=True)
        save_model(model, tokenizer, out)

    return Task(
        base=base,
        warm=lambda tokenizer: [Example(p.prompt, p.gold, chain) for p, chain in problems(8_300, 20_300)],
        train=lambda tokenizer: [p for p, _ in problems(300, 8_300)],
        valid=lambda tokenizer: [p for p, _ in problems(200, 300)],
        test=lambda tokenizer: [p for p, _ in problems(0, 200)],
        judge=countdown.judge,
        config=config,
        batch=1024,
    )


def _relevance(options: argparse.Namespace) -> Task:
    """The demo's teacher: a decoder made from scratch, which is also the base."""
    from data.contracts import GradeScale
    from pipeline.settings import load_preset
    from teacher.examples import load_examples
    from teacher.prompt import Prompt
    from teacher.scratch import make_decoder
    from teacher.verifier import grade_judge

    if options.pairs is None:
        raise ContractError("task relevance needs --pairs, the pairs folder of a run of preset sample")
    changed = ("agpo.checkpoint_every=40", "agpo.delta=1", "agpo.negative=-1", "evaluation.every=0")
    teacher = load_preset("sample", [f"teacher.{setting}" for setting in changed]).teacher
    scale = GradeScale.load(options.pairs)
    prompt = Prompt(teacher.prompt, scale, teacher.max_completion_tokens)

    def examples(split: str, limit: int) -> Callable[[Any], list[Any]]:
        return lambda tokenizer: load_examples(options.pairs, split, prompt, tokenizer, limit, 0)

    return Task(
        base=lambda seed, out: make_decoder(options.pairs, out, "small", seed),
        warm=examples("train", teacher.warm_start.examples),
        train=examples("train", 10**9),
        valid=examples("valid", 100),
        test=examples("test", 200),
        judge=grade_judge(scale.size),
        config=teacher,
        batch=256,
        samples={"valid": 16, "test": 64},  # of four answers: larger k finds nothing more
    )


def _gsm8k(options: argparse.Namespace) -> Task:
    """A real model on grade-school problems, from the model as it is: for a GPU."""
    from benchmarks.math_task import load_problems, math_judge
    from pipeline.weights import resolve_model

    if options.math is None or options.model is None:
        raise ContractError("task gsm8k needs --math, the folder with the math sets, and --model")
    config = TeacherConfig(
        agpo=AGPOConfig(
            steps=200,
            max_sampled_tokens=40_000_000,
            prompts_per_step=64,
            group_size=8,
            learning_rate=2e-6,
            checkpoint_every=50,
            rollouts="vllm" if torch.cuda.is_available() else "transformers",
        ),
        evaluation=EvaluationConfig(every=0),
        max_completion_tokens=400,
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
    )

    def base(seed: int, out: Path) -> None:
        found = resolve_model(options.model, role="decoder", pairs=Path(), cache=options.out / "weights", seed=seed)
        shutil.copytree(found, out)

    def problems(name: str, begin: int, end: int | None) -> Callable[[Any], list[Problem]]:
        return lambda tokenizer: load_problems(options.math / name, tokenizer)[begin:end]

    return Task(
        base=base,
        warm=lambda tokenizer: [],
        train=problems("gsm8k_train.jsonl.gz", 100, None),
        valid=problems("gsm8k_train.jsonl.gz", 0, 100),
        test=problems("gsm8k_test.jsonl", 0, 200),
        judge=math_judge(),
        config=config,
        batch=512,
    )
