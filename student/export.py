"""From a trained student to a folder that scores with onnxruntime and tokenizers alone, checked before it is offered."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from transformers import PreTrainedModel

from data.contracts import ContractError, GradeScale, StageOutput, digest_files, read_json, write_json, write_text
from student import scorer
from student.card import export_card
from student.config import ExportConfig
from student.dataset import Examples, read_examples, tokenize
from student.first_token import first_token_only
from student.metrics import Labels, compare, roc_auc
from student.model import load_classifier, model_folder
from student.onnx_files import INLINE_BYTES, files_of, remove
from student.reader import Reader, predict_logits
from student.scorer import MODEL_FILES, Scorer, load_tokenizer, probabilities

logger = logging.getLogger(__name__)
Array = np.ndarray


def export_student(
    config: ExportConfig, student: Path, pairs: Path, out: Path, inline_bytes: int = INLINE_BYTES
) -> StageOutput:
    """Write `model.onnx`, `model.int8.onnx`, tokenizer, scale, `student.json`, `score.py` and cards into `out`.

    A model of more than `inline_bytes` of weights has them in a second file, `model.onnx.data`, see `student.onnx_files`.

    `student` is the trained model's folder; `pairs` what data-prepare wrote, of which graded rows of test and valid are
    scored by the trained and all exported models. Raises `ContractError`, and leaves no ONNX file behind, when a
    probability of the fp32 model moved by more than `max_probability_difference`, or when another precision loses more
    than `max_int8_auc_loss` of ROC-AUC against fp32 or decides otherwise on more than `max_decisions_changed` of a grade's
    pairs; and more than chance, since a few dozen pairs cannot say.
    """
    source = model_folder(student)
    out.mkdir(parents=True, exist_ok=True)
    card = read_json(source / "student.json")
    scale = GradeScale.load(source)
    rows = _sample(pairs, scale, config)
    for name in ("tokenizer.json", "scale.json", "student.json"):
        shutil.copyfile(source / name, out / name)
    shutil.copyfile(scorer.__file__, out / "score.py")
    model = load_classifier(source, scale, max_length=card["max_length"], seed=0)
    logger.info("export: tracing the model")
    asked = {"fp16": config.fp16, "bf16": config.bf16}
    precisions = [name for name in MODEL_FILES if asked.get(name, True)]
    files = {out / MODEL_FILES[name] for name in precisions}
    _write_models(model, card, out, precisions, inline_bytes)

    logger.info("export: comparing on %d pairs", len(rows))
    tokenizer = load_tokenizer(out / "tokenizer.json", card["max_length"])
    tokens = tokenize(tokenizer, rows.queries, rows.ads, card["pad_token_id"])
    begin = time.monotonic()
    logits = predict_logits(Reader(model, "cpu"), tokens, 32)
    trained = probabilities(logits, card["temperature"], card.get("isotonic"))
    torch_speed = len(rows) / (time.monotonic() - begin)
    relevant = rows.grade >= scale.relevant_from
    parity: dict[str, Any] = {
        "n": len(rows),
        "threads": config.threads or os.cpu_count(),
        "batch_tokens": config.batch_tokens,
        "torch": {"pairs_per_second": torch_speed, "roc_auc": _auc(relevant, trained, scale)},
    }
    scores = {}
    with _removed_at_a_fault(files):
        for precision in precisions:
            parity[precision], scores[precision] = _measure(out, precision, rows, trained, scale, config)
            if precision != "fp32":
                parity |= _losses(rows, precision, scores, card["threshold"], scale)
        fault = parity_fault(parity, config)
        parity["passed"] = fault is None
        write_json(out / "export.json", parity)
        if fault is not None:
            raise ContractError(fault)
    trained_card = (source / "model_card.md").read_text(encoding="utf-8")
    write_text(out / "model_card.md", export_card(trained_card, parity))
    weights = [file for model_file in sorted(files) for file in files_of(model_file)]
    served = (*weights, *(out / name for name in ("tokenizer.json", "student.json", "scale.json")))
    return StageOutput(fingerprint=digest_files(served), figures=_key_metrics(parity))


def _write_models(
    model: PreTrainedModel, card: dict[str, Any], out: Path, precisions: list[str], inline_bytes: int
) -> None:
    """Write the ONNX model of each precision into `out`."""
    from student.quantise import write_int8  # onnx is needed by nobody who only trains

    of_card = card["inputs"], card["max_length"]
    write_onnx(model, *of_card, out / MODEL_FILES["fp32"], inline_bytes)
    write_int8(out / MODEL_FILES["fp32"], out / MODEL_FILES["int8"], inline_bytes)
    if "fp16" in precisions:
        write_onnx(copy.deepcopy(model).half(), *of_card, out / MODEL_FILES["fp16"], inline_bytes)


@contextmanager
def _removed_at_a_fault(files: Iterable[Path]) -> Iterator[None]:
    """Remove the files after a `ContractError`: nobody is to serve them."""
    try:
        yield
    except ContractError:
        remove(files)
        raise


def write_onnx(
    model: PreTrainedModel, inputs: list[str], max_length: int, path: Path, inline_bytes: int = INLINE_BYTES
) -> None:
    """Write the model as ONNX with any batch size and any length up to `max_length`.

    It is one file with the weights inside, or two where these are more than `inline_bytes`, see `student.onnx_files`.
    """
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=max_length)
    # Sizes that differ from each other and from 1, so that the tracer takes none of them for a constant.
    example = {
        "input_ids": torch.randint(0, model.config.vocab_size, (3, 13)),
        "attention_mask": torch.ones(3, 13, dtype=torch.long),
        "token_type_ids": torch.zeros(3, 13, dtype=torch.long),
    }
    example["attention_mask"][1, 7:] = 0
    with _silent():
        program = torch.onnx.export(
            _Logits(first_token_only(model), inputs).eval(),
            tuple(example[name] for name in inputs),
            dynamo=True,
            input_names=inputs,
            output_names=["logits"],
            dynamic_shapes=(tuple({0: batch, 1: sequence} for _ in inputs),),
            verbose=False,
        )
        remove([path])  # an older, larger model had a second file
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        program.save(str(path), external_data=size > inline_bytes)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the converters' notes on packages that are not installed, on axis names and on every tensor they see."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _Logits(torch.nn.Module):
    """The model as a function of its inputs in order, to its logits."""

    def __init__(self, model: PreTrainedModel, inputs: list[str]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.inputs, tensors, strict=True))).logits.float()


def _sample(pairs: Path, scale: GradeScale, config: ExportConfig) -> Examples:
    """Graded rows of test, then of valid where test has too few, drawn by `seed`."""
    chosen, missing = [], config.parity_rows
    for split in ("test", "valid"):
        graded = read_examples(pairs, scale, split)
        order = np.random.default_rng(config.seed).permutation(len(graded))[:missing]
        chosen.append(graded.take(np.sort(order)))
        missing -= len(order)
    rows = chosen[0].joined(chosen[1])
    if not len(rows):
        raise ContractError(f"{pairs} has no graded rows in splits test and valid to check the export with; add some")
    return rows


def _measure(
    out: Path, precision: str, rows: Examples, trained: Array, scale: GradeScale, config: ExportConfig
) -> tuple[dict[str, Any], Array]:
    """What an exported model does to these rows, and its scores (N,)."""
    scorer = Scorer(out, precision, threads=config.threads)
    texts = list(zip(rows.queries, rows.ads, strict=True))
    scorer.logits(texts[:32], config.batch_tokens)  # the first batch pays for memory
    begin = time.monotonic()
    logits = scorer.logits(texts, config.batch_tokens)
    if not np.isfinite(logits).all():
        remedy = (
            f"set export.{precision} = false" if precision in ("fp16", "bf16") else "train it at a lower learning rate"
        )
        raise ContractError(
            f"in {precision} the student gives values that are no numbers (beyond its range?); {remedy}"
        )
    probs = probabilities(logits, scorer.card["temperature"], scorer.card.get("isotonic"))
    seconds = time.monotonic() - begin
    files = files_of(out / MODEL_FILES[precision])
    measured = {
        "file": ", ".join(file.name for file in files),
        "megabytes": sum(file.stat().st_size for file in files) / 1e6,
        "pairs_per_second": len(rows) / seconds,
        "max_abs_dp": float(np.abs(probs - trained).max()),
        "roc_auc": _auc(rows.grade >= scale.relevant_from, probs, scale),
    }
    return measured, probs[:, scale.relevant_from :].sum(axis=1)


def _losses(
    rows: Examples, precision: str, scores: dict[str, Array], threshold: float, scale: GradeScale
) -> dict[str, Any]:
    """ROC-AUC that `precision` loses against fp32, and by grade the share of its pairs that it decides otherwise."""
    loss = compare(Labels(rows.grade, rows.query_id, scale.relevant_from), scores["fp32"], scores[precision])
    changed = (scores["fp32"] >= threshold) != (scores[precision] >= threshold)
    shares = {}
    for grade in np.unique(rows.grade):
        of_grade = changed[rows.grade == grade]
        low = binomtest(int(of_grade.sum()), len(of_grade)).proportion_ci(0.95).low
        shares[scale.grades[grade].name] = {"value": float(of_grade.mean()), "low": float(low)}
    return {
        f"{precision}_auc_loss": {"value": loss.difference, "low": loss.low, "high": loss.high},
        f"{precision}_decisions_changed": shares,
    }


def parity_fault(parity: dict[str, Any], config: ExportConfig) -> str | None:
    """Why the export must not be used, or None."""
    moved = parity["fp32"]["max_abs_dp"]
    if not moved <= config.max_probability_difference:
        return (
            f"the exported fp32 model differs from the trained one by {moved:.1e} in a probability (limit "
            f"{config.max_probability_difference:.1e}); export again with the versions in the constraints file"
        )
    for precision in (name for name in MODEL_FILES if name != "fp32" and name in parity):
        loss = parity[f"{precision}_auc_loss"]
        if loss["value"] is None:
            return (
                "graded rows of test and valid are all of one class, so int8 cannot be checked; label some of the other"
            )
        if loss["value"] > config.max_int8_auc_loss and (loss["low"] is None or loss["low"] > 0):
            return (
                f"the {precision} model loses {loss['value']:.4f} ROC-AUC against fp32 (limit {config.max_int8_auc_loss}); "
                "raise export.max_int8_auc_loss if that is acceptable, or train a larger student"
            )
        name, changed = max(parity[f"{precision}_decisions_changed"].items(), key=lambda grade: grade[1]["low"])
        if changed["low"] > config.max_decisions_changed:
            return (
                f"the {precision} model decides otherwise than fp32 on {changed['value']:.1%} of grade '{name}' "
                f"(limit {config.max_decisions_changed:.1%}); raise export.max_decisions_changed if that is acceptable, or "
                "train another encoder"
            )
    return None


def _key_metrics(parity: dict[str, Any]) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "parity_rows": parity["n"],
        "fp32_max_abs_dp": parity["fp32"]["max_abs_dp"],
        "int8_max_abs_dp": parity["int8"]["max_abs_dp"],
        "int8_auc_loss": parity["int8_auc_loss"]["value"],
        "int8_decisions_changed": max(grade["value"] for grade in parity["int8_decisions_changed"].values()),
        "torch_pairs_per_second": parity["torch"]["pairs_per_second"],
    }
    for precision in (name for name in MODEL_FILES if name in parity):
        for name in ("pairs_per_second", "megabytes", "roc_auc"):
            metrics[f"{precision}_{name}"] = parity[precision][name]
    return metrics


def _auc(relevant: Array, probs: Array, scale: GradeScale) -> float | None:
    value = roc_auc(relevant, probs[:, scale.relevant_from :].sum(axis=1))
    return None if np.isnan(value) else value
