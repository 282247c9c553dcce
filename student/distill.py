"""The student's stage: learn from annotations and human grades, calibrate on valid, measure once on test."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.contracts import (
    GradeScale,
    MetricsLog,
    StageOutput,
    digest,
    digest_files,
    read_json,
    write_json,
    write_text,
)
from student.calibration import Curves, best_f1_threshold, fit_calibration, fit_isotonic, isotonic_losses
from student.card import student_card
from student.config import StudentConfig
from student.dataset import Examples, sample_texts
from student.decisions import bad_ad_rates, check_decisions, measure_decisions, operating_curves
from student.ensemble import choose_weight, pooled
from student.evaluation import System, curves, evaluate_systems, floor, floor_fault, write_predictions
from student.fit import Fitted, fit
from student.label_errors import without_suspects
from student.ladder import FOLDER, check_layers, cut, layers_of, taught_by
from student.metrics import Labels, expected_calibration_error, roc_auc
from student.model import head_bias, input_names, pad_token_id, pick_device, quiet_transformers, save_tokenizer
from student.objective import objective_name
from student.peers import peers, without_labels
from student.rows import Rows, read_rows
from student.scorer import probabilities, softmax
from student.setup import Setup
from student.warm_up import warm_up

logger = logging.getLogger(__name__)
Array = np.ndarray


@dataclass(frozen=True)
class Calibrated:
    """A trained model with what was fitted on split valid; `shift` (K,) has been added to its logits.

    `isotonic` has a curve for each grade, or none where temperature and offsets are all; `decisions` are the
    `operating_curves`.
    """

    fitted: Fitted
    temperature: float
    shift: Array
    isotonic: Curves
    threshold: float
    decisions: list[dict[str, list[float]]]
    valid_roc_auc: float


def distill(
    config: StudentConfig,
    base: Path,
    pairs: Path,
    annotations: Path | None,
    out: Path,
    cache: Path | None = None,
    scored_by: Path | None = None,
    human_labels: Path | None = None,
) -> StageOutput:
    """Train, calibrate and evaluate a student into `out`.

    Writes `out/model/` (complete in itself), `evaluation.json`, `curves.json`, `test_predictions.parquet` and
    `metrics.jsonl`. A second call after a kill goes on from the last epoch's checkpoint.

    Parameters: `base` the encoder's folder, `scored_by` that of `warm_up.encoder`, if any; `pairs` what data-prepare wrote;
    `annotations` and `human_labels`, given later, None or empty for none; `cache` of warm-ups, `out/warm_up` if None.
    Raises `ContractError` when valid or test has no human grade, when there is nothing to learn from, or when the tables
    do not fit the scale.
    """
    out.mkdir(parents=True, exist_ok=True)
    scale = check_decisions(config.decisions, GradeScale.load(pairs))
    rows = read_rows(config, pairs, annotations, scale, human_labels)
    building = out / ".model"
    shutil.rmtree(building, ignore_errors=True)
    tokenizer = save_tokenizer(base, building, config.max_length)
    setup = untrained = Setup(config, base, tokenizer, scale, pick_device(config.device), scored_by)
    metrics = MetricsLog(out / "metrics.jsonl")
    # Refuses an encoder that cannot be trained or cut, before the warm-up reads all pairs with it.
    check_layers(config.layers, untrained.reader().model)
    if config.warm_up.pairs:
        setup = replace(setup, base=warm_up(setup, pairs, rows.valid, cache or out / "warm_up", metrics))

    def train(chosen: Examples, phase: str) -> Calibrated:
        equal = setup.for_as_many_steps(len(rows.training), len(chosen))
        fitted = fit(equal, chosen, rows.judged, folder=out / "checkpoints" / phase, metrics=metrics, phase=phase)
        return calibrate(setup, fitted, rows.valid)

    kept = without_suspects(setup, pairs, rows.training, rows.valid, rows.annotations, out, metrics)
    first, pool = None, dict[str, Any]()
    if config.soft_labels == "ensemble" and rows.training.n_annotated and rows.training.n_gold:
        first = train(rows.training.take(kept).gold_only(), "gold_only")
        rows, pool = with_ensemble(setup, first, rows)
    whole, rows = rows.training, replace(rows, training=rows.training.take(kept))
    student = train(rows.training, "student")
    card = save_student(setup, building, student, rows)
    systems = [measured(setup, "student", student, rows.valid, rows.test)]
    free = without_labels(untrained, setup, rows.valid, rows.test)
    if fault := floor_fault(bound := {"floor": floor([*systems, *free])}):
        logger.warning("%s", fault)
    for name, other in taught_otherwise(config, rows.training, whole).items():
        trained = first if first and name == "gold_only" else train(other, name)
        systems.append(measured(setup, name, trained, rows.valid, rows.test))
    systems += smaller_students(setup, base, student, rows, pairs, out, metrics, free)
    systems += [*peers(setup, pairs, rows.annotations, rows.valid, rows.test), *free]
    evaluation = evaluate(setup, systems, student, rows.test) | bound | ({"ensemble": pool} if pool else {})
    key = key_metrics(evaluation, card, student.valid_roc_auc) | rows.skipped
    write_evaluation(out, systems, evaluation, rows.test, scale)
    finish(out, building, key, metrics, student.fitted.steps)
    return StageOutput(fingerprint=card["fingerprint"], figures=key | ({"below_floor": fault} if fault else {}))


def with_ensemble(setup: Setup, first: Calibrated, rows: Rows) -> tuple[Rows, dict[str, Any]]:
    """The rows with soft labels of the teacher and `first` together, but for human grades to learn; and their weights."""

    def probs(examples: Examples) -> Array:
        return probabilities(setup.logits(first.fitted.reader, examples), first.temperature, first.isotonic)

    known = np.flatnonzero(rows.judged.soft.sum(axis=1) > 0)
    valid = rows.judged.take(known)
    of_first = probs(valid)
    chosen = choose_weight(valid.soft, of_first, valid.grade)
    weight = chosen["weight"]
    logger.info("ensemble: the teacher weighs %.2f, by %d annotated pairs of valid", weight, chosen["rows"])

    def together(examples: Examples, at: Array, of_first: Array) -> Examples:
        soft = examples.soft.copy()
        soft[at] = pooled(soft[at], of_first, weight)
        return replace(examples, soft=soft)

    training = rows.training
    at = np.flatnonzero((training.soft.sum(axis=1) > 0) & (training.grade < 0))
    learned = together(training, at, probs(training.take(at)))
    return replace(rows, training=learned, judged=together(rows.judged, known, of_first)), chosen


def taught_otherwise(config: StudentConfig, training: Examples, whole: Examples) -> dict[str, Examples]:
    """What the students learn from that the student is compared with, by name; `whole` has the suspect labels too."""
    others = {"with_suspects": whole} if len(whole) > len(training) else {}
    if config.gold_only_baseline and training.n_annotated and training.n_gold:
        others["gold_only"] = training.gold_only()
    return others


def smaller_students(
    setup: Setup,
    base: Path,
    student: Calibrated,
    rows: Rows,
    pairs: Path,
    out: Path,
    metrics: MetricsLog,
    free: list[System],
) -> list[System]:
    """Students of `config.layers` layers, cut from the trained one, which learn from it into `out/layers-N`; measured.

    They learn from the training rows and the pairs that a warm-up reads, which the trained student annotates. Each one's
    folder also has what its promotion depends on: its test predictions, and its floor, made by the systems `free`.
    """
    config, reader, systems = setup.config, student.fitted.reader, []
    sizes = sorted(n for n in config.layers if n < layers_of(reader.model))
    if not sizes:
        return []
    unlabelled = sample_texts(pairs, config.warm_up.pairs, config.seed, setup.scale.size)
    is_new = ~np.isin(unlabelled.pair_ids.astype(str), rows.training.pair_ids.astype(str))
    training = rows.training.joined(unlabelled.take(np.flatnonzero(is_new)))
    probs = probabilities(setup.logits(reader, training), student.temperature, student.isotonic)
    training = taught_by(training, probs, config.gold_mix)
    for layers in sizes:
        phase, folder = f"student_{layers}_layers", out / FOLDER.format(layers)
        shutil.rmtree(folder, ignore_errors=True)
        save_tokenizer(base, folder, config.max_length)  # a warmed-up encoder's folder has none
        start = replace(setup, base=cut(reader.model, layers, out / "checkpoints" / f"{phase}.start"))
        fitted = fit(start, training, rows.valid, folder=out / "checkpoints" / phase, metrics=metrics, phase=phase)
        smaller = calibrate(setup, fitted, rows.valid)
        save_student(setup, folder, smaller, rows)
        systems.append(measured(setup, phase, smaller, rows.valid, rows.test))
        write_predictions(folder, rows.test, systems[-1].score)
        bound = {"floor": floor([systems[-1], *free])}
        write_json(folder / "evaluation.json", bound)
        if fault := floor_fault(bound):
            logger.warning("of %d layers: %s", layers, fault)
    return systems


def write_evaluation(
    out: Path, systems: list[System], evaluation: dict[str, Any], test: Examples, scale: GradeScale
) -> None:
    """Write what the report and later comparisons read; the first system is the student."""
    write_predictions(out, test, systems[0].score)
    drawn = [system for system in systems if system.name in ("student", "gold_only", "bm25")]
    for folder in (out / ".model", *out.glob(FOLDER.format("*"))):
        own = read_json(folder / "evaluation.json") if folder.name != ".model" else {}  # a smaller student's floor
        write_text(folder / "model_card.md", student_card(read_json(folder / "student.json"), scale, evaluation | own))
    write_json(out / "curves.json", curves(drawn, test, scale.relevant_from))
    write_json(out / "evaluation.json", evaluation)


def calibrate(setup: Setup, fitted: Fitted, valid: Examples) -> Calibrated:
    """Fit temperature, offsets and, where they help, isotonic curves, then the decision threshold, all on `valid`.

    The offsets go into the bias of the model's head, so that whoever serves it divides by the temperature and no more.
    """
    logits = setup.logits(fitted.reader, valid)
    bias = head_bias(fitted.reader.model)
    temperature, offsets = fit_calibration(logits, valid.grade, offsets=bias is not None)
    shift = temperature * offsets
    if bias is not None:
        bias.data += torch.from_numpy(shift).to(bias)
    curves: Curves = []
    if setup.config.calibration == "best":
        alone, with_curves = isotonic_losses(logits, valid.grade, valid.query_id, offsets=bias is not None)
        logger.info("calibration: log loss on valid %.4f, with isotonic curves %.4f", alone, with_curves)
        if with_curves < alone:
            curves = fit_isotonic(softmax(logits + shift, temperature), valid.grade)
    probs, relevant = probabilities(logits + shift, temperature, curves), setup.relevant(valid)
    p, decisions = setup.p_relevant(probs), operating_curves(valid.grade, probs, setup.scale.relevant_from)
    threshold, auc = best_f1_threshold(relevant, p), roc_auc(relevant, p)
    return Calibrated(fitted, temperature, shift, curves, threshold, decisions, auc)


def measured(setup: Setup, name: str, student: Calibrated, valid: Examples, test: Examples) -> System:
    """A trained and calibrated model's output on the test rows."""
    probs = probabilities(setup.logits(student.fitted.reader, test), student.temperature, student.isotonic)
    auc = student.valid_roc_auc
    return System(name, setup.p_relevant(probs), student.threshold, probs, valid_roc_auc=auc)


def evaluate(setup: Setup, systems: list[System], student: Calibrated, test: Examples) -> dict[str, Any]:
    """The body of `evaluation.json`: all systems on the test rows, the student's also as it was before calibration."""
    logger.info("student: measuring %d systems on %d test pairs", len(systems), len(test))
    config = setup.config
    labels = Labels(test.grade, test.query_id, setup.scale.relevant_from, config.bootstrap_samples, config.seed)
    evaluation = evaluate_systems(systems, test, labels)
    probs = systems[0].probs
    assert probs is not None
    evaluation["decisions"] = measure_decisions(config.decisions, setup.scale, student.decisions, labels, probs)
    evaluation["bad_ad_rates"] = bad_ad_rates(labels, probs)
    probs = softmax(setup.logits(student.fitted.reader, test) - student.shift)
    before = expected_calibration_error(setup.relevant(test), setup.p_relevant(probs))
    fitted = {"threshold": student.threshold, "temperature": student.temperature}
    return evaluation | fitted | {"ece_before_calibration": before}


def key_metrics(evaluation: dict[str, Any], card: dict[str, Any], valid_roc_auc: float) -> dict[str, Any]:
    """The flat metrics that a tracker shows: the student's with their intervals, the ROC-AUC of the others, counts."""
    metrics: dict[str, Any] = {"valid_roc_auc": valid_roc_auc, "n_test": evaluation["n"]}
    for system in evaluation["systems"]:
        if system["name"] != "student":
            metrics[f"{system['name']}_roc_auc"] = system["metrics"]["roc_auc"]["value"]
            continue
        for name, interval in system["metrics"].items():
            metrics |= {f"test_{name}": interval["value"]}
            metrics |= {f"test_{name}_low": interval["low"], f"test_{name}_high": interval["high"]}
    counts = {name: card[name] for name in ("n_gold", "n_annotated", "epochs", "best_epoch")}
    fitted = {name: float(card[name]) for name in ("temperature", "threshold")}
    before = {"test_ece_before": evaluation["ece_before_calibration"]}
    shares = {
        "teacher_kept": (evaluation["teacher_kept"] or {}).get("share"),
        "teacher_weight": evaluation.get("ensemble", {}).get("weight"),
    }
    metrics |= counts | fitted | before | shares
    return {name: value for name, value in metrics.items() if value is not None and value == value}


def finish(out: Path, building: Path, key: dict[str, Any], metrics: MetricsLog, step: int) -> None:
    """Record the metrics, and put the complete model folder in its place."""
    write_json(building / "metrics.json", key)
    metrics.rewind("test", -1)
    metrics.write("test", step, {name: each for name, each in key.items() if isinstance(each, float)})
    shutil.rmtree(out / "model", ignore_errors=True)
    building.rename(out / "model")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # last: a kill before would train all of it again


def save_student(setup: Setup, folder: Path, student: Calibrated, rows: Rows) -> dict[str, Any]:
    """Write weights, scale and `student.json` into `folder`; returns the latter's content."""
    config, model = setup.config, student.fitted.reader.model
    with quiet_transformers():
        model.save_pretrained(folder)
    setup.scale.save(folder)
    serving = {
        "max_length": config.max_length,
        "temperature": student.temperature,
        "head_shift": student.shift.tolist(),
        "threshold": student.threshold,
        "decisions": student.decisions,
        "inputs": list(input_names(model)),
        "pad_token_id": pad_token_id(model.config),
    } | ({"isotonic": student.isotonic} if student.isotonic else {})
    files = digest_files([folder / "model.safetensors", folder / "tokenizer.json"])
    card = serving | {
        "fingerprint": digest([serving, setup.scale.model_dump(mode="json"), files]),
        "data_fingerprint": digest([rows.training.digest(), rows.valid.digest()]),
        "annotation_key": rows.annotation_key,
        "n_gold": rows.training.n_gold,
        "n_annotated": rows.training.n_annotated,
        "epochs": student.fitted.epochs,
        "best_epoch": student.fitted.best_epoch,
        "base": config.base,
        "layers": layers_of(model),
        "warm_up": setup.base.name if config.warm_up.pairs else "",
        "objective": objective_name(config),
        "config": config.model_dump(mode="json"),
    }
    write_json(folder / "student.json", card)
    return card
