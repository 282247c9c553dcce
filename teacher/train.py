"""The teacher-train stage: base model → warm start → AGPO → a complete teacher folder."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from data.contracts import ContractError, MetricsLog, StageOutput, read_json, write_json
from teacher.card import write_card
from teacher.checks import check_decoder, check_tokenizer
from teacher.config import TeacherConfig
from teacher.distributed import is_main, launch, wait_for_all, world_size
from teacher.engines.base import Engine, position_limit
from teacher.engines.transformers_engine import TransformersEngine
from teacher.evaluate import evaluate
from teacher.examples import Example, drop_too_long, evenly, labelled_rows, load_examples, load_texts, with_reasons
from teacher.model import (
    add_adapters,
    load_model,
    merge_adapters,
    number_format,
    plain_weights,
    save_model,
    stored_dtype,
    weights_fingerprint,
)
from teacher.policy import PolicyResult, open_rollout_engine, require_rollouts, train_policy
from teacher.prompt import Prompt, save_prompt
from teacher.reasons import REASONS_FILE, collect_reasons, funnel_metrics, read_reasons
from teacher.verifier import grade_judge
from teacher.warm_start import warm_start

logger = logging.getLogger(__name__)

_CHECKED = 100  # examples whose targets the tokenizer must be able to write
_RESULT = "agpo.json"  # what `train_policy` returned, beside the weights
_LOW_PARSE_RATE = 0.5  # below it AGPO hardly starts


def train_teacher(
    config: TeacherConfig,
    base: Path,
    pairs: Path,
    out: Path,
    *,
    reason_model: Path | None = None,
    cache: Path | None = None,
) -> StageOutput:
    """Train a teacher from the model folder `base` on the labelled pairs, into `out/model`.

    `reason_model` is the folder of the model that gives the reasons of the warm start, `base` itself unless it is given;
    `cache` keeps what models were asked (in `out` without one). `out` also gets `metrics.jsonl` (every logged step),
    `evaluation.json` and, while training, `checkpoints/`, from which an interrupted call resumes: a complete warm start is
    not repeated, AGPO continues with step, optimiser, RNG and data order. The output's metrics are named by phase (`base/…`,
    `warm_start/…`, `agpo/…`, `test/…`), its fingerprint is that of the weights.

    Raises:
        ContractError: the split `train` or `valid` has no labelled pair, nor `test` where it is evaluated, `base` is no
            causal language model, or this machine cannot sample rollouts as the config asks.
    """
    require_rollouts(config.agpo)
    _require_labels(config, pairs)
    config = config.model_copy(update={"dtype": number_format(config.dtype, base)})
    if config.warm_start.asks_a_model and not (out / REASONS_FILE).exists():
        # By one process, before there are several, and before a model that is trained takes the memory.
        collect_reasons(config, reason_model or base, base, pairs, out, cache or out / "reasons")
    if config.processes > 1 and world_size() == 1:
        paths = {"base": str(base.resolve()), "pairs": str(pairs.resolve()), "out": str(out.resolve())}
        task = {"config": config.model_dump(mode="json"), **paths}
        return StageOutput(**launch("teacher.train", config.processes, task, out))
    set_seed(config.seed)
    disable_progress_bar()  # of saving and loading weights; our own lines say how far it is
    training = _Training(config, base, pairs, out)
    training.warm_start()
    stopped = training.agpo()
    wait_for_all()
    fingerprint = training.save() if is_main() else ""
    if training.engine:
        training.engine.close()
    if not is_main():
        return StageOutput(fingerprint="", figures={})
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    metrics = training.metrics()
    return StageOutput(fingerprint=fingerprint, figures=metrics | ({"stopped": stopped} if stopped else {}))


def _require_labels(config: TeacherConfig, pairs: Path) -> None:
    """Raise `ContractError` where a split has no labelled pair that the training needs, be it at its very end."""
    for split in ("train", "valid"):
        labelled_rows(pairs, split, 1, config.seed)
    if config.evaluation.test:
        try:
            labelled_rows(pairs, "test", 1, config.seed)
        except ContractError as error:
            raise ContractError(f"{error}, or set teacher.evaluation.test = false") from None


class _Training:
    """The state of one call: the model as trained so far, its examples, and the evaluation of every phase."""

    def __init__(self, config: TeacherConfig, base: Path, pairs: Path, out: Path) -> None:
        self.config, self.base, self.pairs, self.out = config, base, pairs, out
        self.prompt = Prompt.of(config, pairs)
        self.scale = self.prompt.scale
        self.log = MetricsLog(out / "metrics.jsonl")
        self.warm, self.done = (out / "checkpoints" / f"{phase}_done" for phase in ("warm_start", "agpo"))
        start = next((folder for folder in (self.done, self.warm) if folder.exists()), base)
        self.model, self.tokenizer = load_model(start, config)
        self.train = self._examples("train", 10**9)
        self.valid = self._examples("valid", config.evaluation.examples)
        self.test = self._examples("test", config.evaluation.examples) if config.evaluation.test else []
        # Examples longer than the model's positions are left out by now; the longest completion must still have its place.
        check_decoder(self.model, self.tokenizer, longest=1 + config.max_completion_tokens)
        check_tokenizer(self.tokenizer, [example.target for example in self.train[:_CHECKED]])
        self.engine = open_rollout_engine(config, start)
        self.evaluations = out / "evaluation.json"
        self.by_phase: dict[str, dict[str, float]] = read_json(self.evaluations) if self.evaluations.exists() else {}

    def warm_start(self) -> None:
        """Supervised fine-tuning, unless an earlier call completed it."""
        settings, out = self.config.warm_start, self.out / "checkpoints" / "warm_start"
        if not self.warm.exists():
            if self.config.evaluation.base:
                self._evaluate_phase("base", 0)
            if settings.examples:
                self.model = add_adapters(self.model, self.config)
                examples = self.train[: settings.examples]
                if settings.asks_a_model:
                    examples = with_reasons(examples, read_reasons(self.out))
                examples = examples * settings.repeats + self._texts()
                warm_start(self.config, self.model, self.tokenizer, examples, out, self.log)
                self.model = merge_adapters(self.model)
            save_model(self.model, self.tokenizer, self.warm)
            if is_main():
                shutil.rmtree(out, ignore_errors=True)
        self._evaluate_phase("warm_start", 0)

    def agpo(self) -> str | None:
        """Train the policy; returns why the training was stopped before its end, if it was."""
        warm, settings = self.by_phase.get("warm_start", {}), self.config.agpo
        if settings.steps and warm.get("parse_rate", 1.0) < _LOW_PARSE_RATE:
            logger.warning(
                "only %.0f %% of the answers after the warm start can be read, and AGPO needs right ones to learn from: "
                "give the warm start more examples, epochs or min_steps, or begin with a stronger model",
                100 * warm["parse_rate"],
            )
        if settings.steps and warm and settings.metric not in warm:
            raise ContractError(
                f"teacher.agpo.metric = '{settings.metric}' is not defined on the {len(self.valid)} pairs of split 'valid': "
                "they are of one kind, or no answer can be read; raise teacher.evaluation.examples, or choose 'pass@1'"
            )
        result = PolicyResult(0, None)
        if settings.steps:
            result = PolicyResult(**read_json(self.done / _RESULT)) if self.done.exists() else self._policy()
        if is_main():
            self._record("agpo", self._metrics_at(result.step) | {"step": result.step})
        return result.stopped

    def _policy(self) -> PolicyResult:
        """Train the policy, and keep it: a kill after its end must not train on."""
        settings = self.config.agpo
        if settings.kl and not self.config.lora_rank:
            wait_for_all()  # until it is written
            self.model.config._name_or_path = str(self.warm)  # where TRL takes the reference model from
        self.model = add_adapters(self.model, self.config)
        result = train_policy(
            self.config,
            self.model,
            self.tokenizer,
            self._problems(),
            grade_judge(self.scale.size),
            self.out / "checkpoints" / "agpo",
            self.log,
            lambda live, step: self._validate(live, "agpo", step).get(settings.metric, -math.inf),
            self.by_phase.get("warm_start", {}).get(settings.metric, -math.inf),
            self.engine,
        )
        self.model = merge_adapters(self.model)
        save_model(self.model, self.tokenizer, self.done, note={_RESULT: result._asdict()})
        return result

    def _problems(self) -> list[Example]:
        """What AGPO draws its prompts from; an anchor (`sft_weight`) learns the reasons that the warm start taught."""
        examples = self.train
        if self.config.warm_start.asks_a_model:
            taught = {example.pair_id: example for example in with_reasons(examples, read_reasons(self.out))}
            examples = [taught.get(example.pair_id, example) for example in examples]
        return evenly(examples) if self.config.agpo.even_grades else examples

    def _metrics_at(self, step: int) -> dict[str, float]:
        """On split valid, of the weights that AGPO had at a step and the model has now."""
        if not step:
            return self.by_phase["warm_start"]
        for line in self.log.read("valid_agpo"):
            if line["step"] == step:
                return {name: value for name, value in line.items() if name not in ("step", "time")}
        return self._validate(self.model, "agpo", step)

    def save(self) -> str:
        """Write `out/model` and evaluate it on split test; returns the fingerprint of the weights."""
        config, folder, card = self.config, self.out / "model", self.pairs / "card.json"
        save_model(self.model, self.tokenizer, folder, stored_dtype(self.base))
        fingerprint = weights_fingerprint(folder)
        data = str(read_json(card).get("fingerprint", "")) if card.exists() else ""
        save_prompt(
            self.prompt,
            folder,
            fingerprint=fingerprint,
            data_fingerprint=data,
            base=config.model,
            config=config.model_dump(mode="json"),
        )
        write_json(folder / "metrics.json", self.by_phase)
        write_card(folder, config, self.prompt, self.by_phase, fingerprint, data)
        if config.evaluation.test and "test" not in self.by_phase:
            self._record("test", self._measure(self.model, self.test))
        return fingerprint

    def metrics(self) -> dict[str, Any]:
        """The stage's metrics: counts of the pairs, and `phase/name` of every evaluation."""
        named = {f"{phase}/{name}": value for phase, values in self.by_phase.items() for name, value in values.items()}
        return {"train_pairs": len(self.train), "valid_pairs": len(self.valid), **funnel_metrics(self.out), **named}

    def _evaluate_phase(self, phase: str, step: int) -> None:
        if phase not in self.by_phase and is_main():
            self._record(phase, self._validate(self.model, phase, step))

    def _record(self, phase: str, metrics: dict[str, float]) -> None:
        self.by_phase[phase] = metrics
        write_json(self.evaluations, self.by_phase)

    def _validate(self, model: Any, phase: str, step: int) -> dict[str, float]:
        metrics = self._measure(model, self.valid)
        self.log.write(f"valid_{phase}", step, metrics)
        names = ("accuracy", "pass@1", "parse_rate", "auc", "completion_tokens")
        shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in names if name in metrics)
        logger.info("valid, %s, step %d: %s", phase, step, shown)
        return metrics

    def _measure(self, model: Any, examples: list[Example]) -> dict[str, float]:
        engine: Engine
        if self.engine:
            self.engine.load_weights(plain_weights(model))
            engine, autocast = self.engine, False
        else:
            engine = TransformersEngine(model, self.tokenizer, batch_size=self.config.evaluation.batch)
            autocast = self.config.dtype == "bfloat16"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            return evaluate(
                engine,
                self.tokenizer,
                examples,
                num_grades=self.scale.size,
                relevant_from=self.scale.relevant_from,
                samples=self.config.evaluation.samples,
                max_tokens=self.config.max_completion_tokens,
                seed=self.config.seed,
            )

    def _texts(self) -> list[Example]:
        return self._fitting(load_texts(self.pairs, self.prompt, self.tokenizer, self.config.warm_start.texts))

    def _examples(self, split: str, limit: int) -> list[Example]:
        return self._fitting(load_examples(self.pairs, split, self.prompt, self.tokenizer, limit, self.config.seed))

    def _fitting(self, examples: list[Example]) -> list[Example]:
        max_positions = position_limit(self.model.config)
        return drop_too_long(examples, self.tokenizer, max_positions, self.config.max_completion_tokens)


def main() -> None:
    """What `torchrun` starts in every process: `python -m teacher.train TASK RESULT`."""
    if world_size() == 1:  # or each process would start processes of its own
        raise SystemExit("this is what torchrun starts; call train_teacher instead")
    logging.basicConfig(level=logging.INFO if is_main() else logging.ERROR, format="%(asctime)s %(name)s %(message)s")
    task = read_json(Path(sys.argv[1]))
    config = TeacherConfig.model_validate(task["config"])
    result = train_teacher(config, Path(task["base"]), Path(task["pairs"]), Path(task["out"]))
    if is_main():
        write_json(Path(sys.argv[2]), result.model_dump())


if __name__ == "__main__":
    main()
