"""The teacher-train stage: base model → warm start → AGPO → a complete teacher folder."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from data.contracts import ContractError, GradeScale, MetricsLog, digest_files
from teacher.card import write_card
from teacher.chat_template import plain_chat_template
from teacher.config import TeacherConfig
from teacher.distributed import is_main, local_rank, wait_for_all, world_size
from teacher.engines.transformers_engine import TransformersEngine
from teacher.evaluate import Evaluation, evaluate
from teacher.examples import Example, load_examples
from teacher.launch import launch
from teacher.policy import require_rollouts, train_policy
from teacher.prompt import Prompt, save_prompt
from teacher.verifier import grade_judge
from teacher.warm_start import warm_start

logger = logging.getLogger(__name__)

_FEW_READABLE = 0.5  # parse rate below which AGPO hardly starts


@dataclass(frozen=True)
class TeacherResult:
    """`figures`: by phase (`base/…`, `warm_start/…`, `agpo/…`, `test/…`); `fingerprint`: of the weights."""

    fingerprint: str
    figures: dict[str, Any]


def train_teacher(config: TeacherConfig, base: Path, pairs: Path, out: Path) -> TeacherResult:
    """Train a teacher from the model folder `base` on the labelled pairs, into `out/model`.

    `out` also gets `metrics.jsonl` (every logged step), `evaluation.json` and, while training, `checkpoints/`, from which an
    interrupted call resumes: the warm start is kept once complete, AGPO continues with step, optimiser, RNG and data order.

    Raises:
        ContractError: the split `train` or `valid` has no labelled pair, `base` is no causal language model, or this machine
            cannot sample rollouts as the config asks.
    """
    require_rollouts(config.agpo)
    if config.processes > 1 and world_size() == 1:
        return TeacherResult(**launch(config, base, pairs, out))
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    disable_progress_bar()  # of saving and loading weights; our own lines say how far it is
    metrics = MetricsLog(out / "metrics.jsonl")
    scale = GradeScale.load(pairs)
    prompt = Prompt(config.prompt, scale, config.max_completion_tokens)
    warm = out / "checkpoints" / "warm_start_done"
    model, tokenizer = load_model(warm if warm.exists() else base, config)
    train = load_examples(pairs, "train", prompt, tokenizer, 10**9, config.seed)
    valid = load_examples(pairs, "valid", prompt, tokenizer, config.evaluation.examples, config.seed)

    def measure(live: Any, phase: str, step: int) -> Evaluation:
        result = _measure(config, live, tokenizer, valid, scale)
        metrics.write(f"valid_{phase}", step, result.figures)
        logger.info("valid, %s, step %d: %s", phase, step, _short(result.figures))
        return result

    phases = _Phases(out / "evaluation.json")
    if not warm.exists():
        if config.evaluation.base:
            phases.add("base", lambda: measure(model, "base", 0))
        if config.warm_start.examples:
            model = _trainable(model, config)
            warm_start(
                config,
                model,
                tokenizer,
                train[: config.warm_start.examples],
                out / "checkpoints" / "warm_start",
                metrics,
            )
            model = _merged(model)
        save_model(model, tokenizer, warm)
        if is_main():
            shutil.rmtree(out / "checkpoints" / "warm_start", ignore_errors=True)
    phases.add("warm_start", lambda: measure(model, "warm_start", 0))
    read = phases.figures.get("warm_start", {}).get("parse_rate", 1.0)
    if config.agpo.steps and read < _FEW_READABLE:
        logger.warning(
            "only %.0f %% of the answers after the warm start can be read, and AGPO needs right ones to learn from: give "
            "the warm start more examples, epochs or min_steps, or begin with a stronger model",
            100 * read,
        )
    model = _trainable(model, config)
    collapsed = None
    if config.agpo.steps:
        collapsed = train_policy(
            config,
            model,
            tokenizer,
            train,
            grade_judge(scale.size),
            out / "checkpoints" / "agpo",
            metrics,
            lambda live, step: measure(live, "agpo", step).figures["pass@1"],
            phases.figures.get("warm_start", {}).get("pass@1", 0.0),
        )
    model = _merged(model)
    phases.add("agpo", lambda: measure(model, "agpo", config.agpo.steps))
    folder = out / "model"
    wait_for_all()
    if not is_main():
        return TeacherResult("", {})
    fingerprint = _save_teacher(config, prompt, model, tokenizer, base, pairs, phases.figures, folder)
    if config.evaluation.test:
        test = load_examples(pairs, "test", prompt, tokenizer, config.evaluation.examples, config.seed)
        phases.add("test", lambda: _measure(config, model, tokenizer, test, scale))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    figures: dict[str, Any] = {"train_pairs": len(train), "valid_pairs": len(valid), **phases.flat()}
    if collapsed:
        figures["stopped"] = collapsed
    return TeacherResult(fingerprint, figures)


def load_model(folder: Path, config: TeacherConfig) -> tuple[Any, Any]:
    """The causal language model and tokenizer in `folder`; no remote code, safetensors only."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype=getattr(torch, config.dtype)
        )
    except (OSError, ValueError) as error:
        raise ContractError(f"{folder} cannot be loaded as a causal language model: {error}") from None
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise ContractError(f"the tokenizer in {folder} has no end-of-sequence token; choose another model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = plain_chat_template(tokenizer)
    if torch.cuda.is_available():
        model = model.to(f"cuda:{local_rank()}")
    return model, tokenizer


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 (16 hex digits) over names and bytes of a model folder's weights and tokenizer files."""
    named = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return digest_files(f for f in sorted(folder.iterdir()) if f.suffix == ".safetensors" or f.name in named)


def _trainable(model: Any, config: TeacherConfig) -> Any:
    if not config.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def _merged(model: Any) -> Any:
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _measure(
    config: TeacherConfig, model: Any, tokenizer: Any, examples: list[Example], scale: GradeScale
) -> Evaluation:
    """Evaluate a live model in place."""
    settings = config.evaluation
    was_training = model.training
    engine = TransformersEngine(model, tokenizer, batch_size=settings.batch)
    try:
        return evaluate(
            engine,
            tokenizer,
            examples,
            num_grades=scale.size,
            relevant_from=scale.relevant_from,
            samples=settings.samples,
            max_tokens=config.max_completion_tokens,
            seed=config.seed,
        )
    finally:
        model.train(was_training)


class _Phases:
    """Evaluations by phase, kept in a file so that an interrupted run does not repeat them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures: dict[str, dict[str, float]] = {}
        if path.exists():
            self.figures = json.loads(path.read_text(encoding="utf-8"))

    def add(self, phase: str, measure: Any) -> None:
        if phase in self.figures or not is_main():
            return
        self.figures[phase] = measure().figures
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def flat(self) -> dict[str, float]:
        return {f"{phase}/{name}": value for phase, figures in self.figures.items() for name, value in figures.items()}


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model folder under a temporary name, then rename: its existence means that it is whole.

    In a training of several processes only the main one writes.
    """
    if not is_main():
        return
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _save_teacher(
    config: TeacherConfig,
    prompt: Prompt,
    model: Any,
    tokenizer: Any,
    base: Path,
    pairs: Path,
    figures: dict[str, dict[str, float]],
    folder: Path,
) -> str:
    save_model(model, tokenizer, folder)
    fingerprint = weights_fingerprint(folder)
    data_fingerprint = _data_fingerprint(pairs)
    save_prompt(
        prompt,
        folder,
        fingerprint=fingerprint,
        data_fingerprint=data_fingerprint,
        base=config.model,
        config=config.model_dump(mode="json"),
    )
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    write_card(folder, config, prompt, figures, fingerprint, data_fingerprint)
    return fingerprint


def _data_fingerprint(pairs: Path) -> str:
    """The fingerprint that data-prepare left in its card."""
    card = pairs / "card.json"
    return str(json.loads(card.read_text(encoding="utf-8")).get("fingerprint", "")) if card.exists() else ""


def _short(figures: dict[str, float]) -> str:
    names = ("accuracy", "pass@1", "parse_rate", "auc", "completion_tokens")
    return ", ".join(f"{name} {figures[name]:.3f}" for name in names if name in figures)
