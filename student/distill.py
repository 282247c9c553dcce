"""The student's stage: learn from annotations and human grades, calibrate on valid, measure once on test."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from tokenizers import Tokenizer

from data.contracts import PAIRS, ContractError, GradeScale, MetricsLog, read_table, write_json
from student import baselines
from student.calibration import best_f1_threshold, fit_calibration
from student.card import student_card
from student.config import StudentConfig
from student.dataset import Annotated, Examples, read_annotated, read_examples, read_training, tokenize
from student.evaluation import System, curves, evaluate_systems, graded, write_predictions
from student.fit import Fitted, fit
from student.metrics import expected_calibration_error, roc_auc
from student.model import (
    head_bias,
    input_names,
    keep_tokenizer,
    pad_token_id,
    pick_device,
    predict_logits,
    quiet_transformers,
)
from student.objective import objective_name
from student.scorer import ad_text, softmax

logger = logging.getLogger(__name__)
Array = np.ndarray


class StudentResult(BaseModel):
    """The fingerprint of the trained student and its key figures."""

    fingerprint: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class Calibrated:
    """A trained model with what was fitted on split valid; `shift` (K,) has been added to its logits."""

    fitted: Fitted
    temperature: float
    shift: Array
    threshold: float
    valid_roc_auc: float


def distill(config: StudentConfig, base: Path, pairs: Path, annotations: Path | None, out: Path) -> StudentResult:
    """Train, calibrate and evaluate a student into `out`.

    Writes `out/model/` (complete in itself), `evaluation.json`, `curves.json`, `test_predictions.parquet` and
    `metrics.jsonl`. A second call after a kill goes on from the last epoch's checkpoint.

    Parameters: `base` the encoder's folder; `pairs` what data-prepare wrote; `annotations` a table of annotations, None
    or empty for human grades alone. Raises `ContractError` when valid or test has no human grade, when there is nothing
    to learn from, or when the tables do not fit the scale.
    """
    out.mkdir(parents=True, exist_ok=True)
    scale, device = GradeScale.load(pairs), pick_device(config.device)
    rows = read_training(pairs, annotations, scale, config)
    valid, test = read_examples(pairs, scale, "valid"), read_examples(pairs, scale, "test")
    for split, examples in (("valid", valid), ("test", test)):
        if not len(examples):
            raise ContractError(f"split '{split}' has no human grades; the student needs some to be measured against")
    logger.info(
        "student: %d rows to learn from (%d human grades, %d annotations)", len(rows), rows.n_gold, rows.n_annotated
    )
    metrics = MetricsLog(out / "metrics.jsonl")
    building = out / ".model"
    shutil.rmtree(building, ignore_errors=True)
    tokenizer = keep_tokenizer(base, building, config.max_length)

    def train(chosen: Examples, phase: str) -> Calibrated:
        folder = out / "checkpoints" / phase
        found = fit(
            config, base, tokenizer, chosen, valid, scale, folder=folder, metrics=metrics, phase=phase, device=device
        )
        return calibrate(config, found, tokenizer, valid, scale, device)

    student = train(rows, "student")
    key, annotated = read_annotated(annotations, config.annotation_key)
    card = _save(config, base, building, student, scale, rows, valid, key)

    probs = predict_probs(config, student, tokenizer, test, device)
    systems = [graded("student", probs, scale.relevant_from, student.threshold)]
    if config.gold_only_baseline and rows.n_annotated and rows.n_gold:
        gold = train(rows.gold_only(), "gold_only")
        systems.append(
            graded(
                "gold_only", predict_probs(config, gold, tokenizer, test, device), scale.relevant_from, gold.threshold
            )
        )
    systems += rankers(config, base, tokenizer, pairs, valid, test, scale, device)
    systems += teacher_on_test(annotated, test, scale)
    logger.info("student: measuring %d systems on %d test pairs", len(systems), len(test))
    evaluation = evaluate_systems(
        systems, test, relevant_from=scale.relevant_from, n_boot=config.bootstrap_samples, seed=config.seed
    )
    evaluation |= {"threshold": student.threshold, "temperature": student.temperature}
    uncalibrated = predict_probs(config, student, tokenizer, test, device, calibrated=False)
    relevant = test.grade >= scale.relevant_from
    before = expected_calibration_error(relevant, uncalibrated[:, scale.relevant_from :].sum(axis=1))
    evaluation["ece_before_calibration"] = before

    figures = key_figures(evaluation, card) | {"test_ece_before": before, "valid_roc_auc": student.valid_roc_auc}
    figures = {name: value for name, value in figures.items() if value is not None and value == value}
    write_json(building / "metrics.json", figures)
    (building / "model_card.md").write_text(student_card(card, scale, evaluation), encoding="utf-8")
    write_predictions(out, test, systems[0].score)
    drawn = [system for system in systems if system.name in ("student", "gold_only", "bm25")]
    write_json(out / "curves.json", curves(drawn, test, scale.relevant_from))
    write_json(out / "evaluation.json", evaluation)
    metrics.rewind("test", -1)
    metrics.write("test", student.fitted.steps, {k: v for k, v in figures.items() if isinstance(v, float)})
    shutil.rmtree(out / "model", ignore_errors=True)
    building.rename(out / "model")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return StudentResult(fingerprint=card["fingerprint"], figures=figures)


def calibrate(
    config: StudentConfig, fitted: Fitted, tokenizer: Tokenizer, valid: Examples, scale: GradeScale, device: str
) -> Calibrated:
    """Fit temperature and offsets, then the threshold on the calibrated probability, all on `valid`.

    The offsets go into the bias of the model's head, so that whoever serves it divides by the temperature and no more.
    """
    logits = _logits(config, fitted, tokenizer, valid, device)
    bias = head_bias(fitted.model)
    temperature, offsets = fit_calibration(logits, valid.grade, offsets=bias is not None)
    shift = temperature * offsets
    if bias is not None:
        bias.data += torch.from_numpy(shift).to(bias)
    p = softmax(logits + shift, temperature)[:, scale.relevant_from :].sum(axis=1)
    relevant = valid.grade >= scale.relevant_from
    return Calibrated(fitted, temperature, shift, best_f1_threshold(relevant, p), roc_auc(relevant, p))


def predict_probs(
    config: StudentConfig,
    student: Calibrated,
    tokenizer: Tokenizer,
    rows: Examples,
    device: str,
    calibrated: bool = True,
) -> Array:
    """Probabilities (N, K) of the grades; those that the model had before it was calibrated without `calibrated`."""
    logits = _logits(config, student.fitted, tokenizer, rows, device)
    return softmax(logits, student.temperature) if calibrated else softmax(logits - student.shift)


def rankers(
    config: StudentConfig,
    base: Path,
    tokenizer: Tokenizer,
    pairs: Path,
    valid: Examples,
    test: Examples,
    scale: GradeScale,
    device: str,
) -> list[System]:
    """The systems that have seen no label: BM25, BM25 as a share of the query's limit, the untrained encoder's cosine.

    Their thresholds come from valid.
    """
    columns = ["ad_title", "ad_text", "attributes"]
    table = read_table(pairs / "pairs", PAIRS, columns=columns).to_pylist()
    bm25 = baselines.Bm25([ad_text(row["ad_title"], row["ad_text"], row["attributes"]) for row in table])

    def cosine(rows: Examples) -> Array:
        return baselines.encoder_cosine(
            base, tokenizer, rows.queries, rows.ads, batch_size=config.eval_batch_size, device=device
        )

    scorers: dict[str, Callable[[Examples], Array]] = {
        "bm25": lambda rows: bm25.scores(rows.queries, rows.ads),
        "bm25_relative": lambda rows: bm25.scores(rows.queries, rows.ads, relative=True),
        "untrained_cosine": cosine,
    }
    relevant = valid.grade >= scale.relevant_from
    return [System(name, scorer(test), best_f1_threshold(relevant, scorer(valid))) for name, scorer in scorers.items()]


def teacher_on_test(annotated: dict[str, Annotated], test: Examples, scale: GradeScale) -> list[System]:
    """The teacher's own grades of the test rows, where it was asked to annotate them; its threshold is 0.5."""
    rows = np.array([i for i, pair_id in enumerate(test.pair_ids) if pair_id in annotated], dtype=np.int64)
    if not len(rows):
        return []
    probs = np.array([annotated[test.pair_ids[i]].probs for i in rows])
    return [graded("teacher", probs, scale.relevant_from, 0.5, rows)]


def key_figures(evaluation: dict[str, Any], card: dict[str, Any]) -> dict[str, Any]:
    """The flat figures that a tracker shows: the student's with their intervals, the ROC-AUC of the others, counts."""
    figures: dict[str, Any] = {}
    for system in evaluation["systems"]:
        if system["name"] != "student":
            figures[f"{system['name']}_roc_auc"] = system["metrics"]["roc_auc"]["value"]
            continue
        for name, interval in system["metrics"].items():
            figures |= {f"test_{name}": interval["value"]}
            figures |= {f"test_{name}_low": interval["low"], f"test_{name}_high": interval["high"]}
    counts = {name: card[name] for name in ("n_gold", "n_annotated", "epochs", "best_epoch")}
    fitted = {name: float(card[name]) for name in ("temperature", "threshold")}
    return figures | counts | fitted | {"n_test": evaluation["n"]}


def _logits(config: StudentConfig, fitted: Fitted, tokenizer: Tokenizer, rows: Examples, device: str) -> Array:
    tokens = tokenize(tokenizer, rows.queries, rows.ads, pad_token_id(fitted.model.config))
    return predict_logits(fitted.model, tokens, config.eval_batch_size, device)


def _save(
    config: StudentConfig,
    base: Path,
    folder: Path,
    student: Calibrated,
    scale: GradeScale,
    rows: Examples,
    valid: Examples,
    annotation_key: str,
) -> dict[str, Any]:
    """Write weights, scale and `student.json` into `folder`; returns the latter's content."""
    model = student.fitted.model
    with quiet_transformers():
        model.save_pretrained(folder)
    scale.save(folder)
    kept = {
        "max_length": config.max_length,
        "temperature": student.temperature,
        "head_shift": student.shift.tolist(),
        "threshold": student.threshold,
        "inputs": list(input_names(model)),
        "pad_token_id": pad_token_id(model.config),
    }
    hashed = hashlib.sha256(json.dumps([kept, scale.model_dump(mode="json")], sort_keys=True).encode())
    for name in ("model.safetensors", "tokenizer.json"):
        hashed.update((folder / name).read_bytes())
    card = kept | {
        "fingerprint": hashed.hexdigest()[:16],
        "data_fingerprint": hashlib.sha256((rows.digest() + valid.digest()).encode()).hexdigest()[:16],
        "annotation_key": annotation_key,
        "n_gold": rows.n_gold,
        "n_annotated": rows.n_annotated,
        "epochs": student.fitted.epochs,
        "best_epoch": student.fitted.best_epoch,
        "base": config.base if config.base else base.name,
        "objective": objective_name(config),
        "config": config.model_dump(mode="json"),
    }
    write_json(folder / "student.json", card)
    return card
