"""Training the student against sentence-transformers' `CrossEncoderTrainer`: the same model, pairs, batch size and epochs.

    python -m benchmarks.student_training --pairs runs/cpu-real/pairs --base runs/weights/minilm

`--pairs` is what data-prepare wrote, `--base` an encoder's folder; sentence-transformers must be installed (6.2.0 was
used). Each side has its own defaults, and is a process of its own, in turns. Timed is a whole training of one epoch from
texts to weights: tokenising, all steps, and on our side the checkpoint and the measurement on a few valid pairs that belong
to it. Prints one JSON line: median training pairs per second, and the loss of both over the last tenth of the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import TORCH, answer, ask

LEARNING_RATE = 5e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument(
        "--dropout", action="store_true", help="on our side too; the peer has the encoder's own by default"
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="on our side")
    parser.add_argument("--peer-bf16", action="store_true", help="the peer in bfloat16, which is not its default")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        answer({"ours": ours, "peer": peer}[options.side](options))
        return
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for round_ in range(options.rounds):
        for side in ("ours", "peer") if round_ % 2 else ("peer", "ours"):
            found[side].append(_child(side))
    speed = {side: statistics.median(run["pairs_per_second"] for run in runs) for side, runs in found.items()}
    print(
        json.dumps(
            {
                "benchmark": "student_training",
                "rows": options.rows,
                "batch_size": options.batch_size,
                "threads": os.cpu_count(),
                "pairs_per_second": {side: round(value, 1) for side, value in speed.items()},
                "ratio": round(speed["ours"] / speed["peer"], 3),
                "last_loss": {side: round(runs[0]["last_loss"], 4) for side, runs in found.items()},
            }
        )
    )


def ours(options: argparse.Namespace) -> dict[str, float]:
    """One epoch with `student.fit`."""
    from data.contracts import MetricsLog
    from student.config import StudentConfig
    from student.fit import fit
    from student.model import save_tokenizer
    from student.setup import Setup

    scale, rows, valid = _examples(options)
    config = StudentConfig(
        epochs=1,
        batch_size=options.batch_size,
        max_length=options.max_length,
        learning_rate=LEARNING_RATE,
        dropout=options.dropout,
        precision=options.precision,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        tokenizer = save_tokenizer(options.base, out / "tokenizer", options.max_length)
        metrics = MetricsLog(out / "metrics.jsonl")
        begin = time.perf_counter()
        setup = Setup(config, options.base, tokenizer, scale, "cpu")
        fit(setup, rows, valid, folder=out / "checkpoints", metrics=metrics, phase="student")
        seconds = time.perf_counter() - begin
        known = [line["loss"] for line in metrics.read("student") if "loss" in line]
    return {"pairs_per_second": len(rows) / seconds, "last_loss": float(np.mean(known[-max(1, len(known) // 10) :]))}


def peer(options: argparse.Namespace) -> dict[str, float]:
    """One epoch with `CrossEncoderTrainer` as its documentation has it."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import CrossEntropyLoss

    scale, rows, _ = _examples(options)
    table = Dataset.from_dict({"query": list(rows.queries), "ad": list(rows.ads), "label": rows.grade.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        model = CrossEncoder(str(options.base), num_labels=scale.size, max_length=options.max_length, device="cpu")
        trainer = CrossEncoderTrainer(
            model=model,
            args=CrossEncoderTrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=options.batch_size,
                learning_rate=LEARNING_RATE,
                warmup_steps=0.1,
                weight_decay=0.01,
                use_cpu=True,
                bf16=options.peer_bf16,
                save_strategy="no",
                eval_strategy="no",
                report_to=[],
                logging_steps=10,
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=table,
            loss=CrossEntropyLoss(model),
        )
        trainer.train()
        seconds = time.perf_counter() - begin
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"pairs_per_second": len(rows) / seconds, "last_loss": float(np.mean(losses[-max(1, len(losses) // 10) :]))}


def _examples(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The scale, the first rows of train in an order drawn once, and a few of valid."""
    from data.contracts import GradeScale
    from student.dataset import read_examples

    scale = GradeScale.load(options.pairs)
    train, valid = (read_examples(options.pairs, scale, split) for split in ("train", "valid"))
    if len(train) < options.rows:
        raise SystemExit(
            f"{options.pairs} has {len(train)} graded rows in split train, fewer than --rows {options.rows}"
        )
    drawn = np.random.default_rng(0).permutation(len(train))[: options.rows]
    return scale, train.take(drawn), valid.take(np.arange(min(64, len(valid))))


def _child(side: str) -> dict[str, Any]:
    return ask(
        "benchmarks.student_training", *sys.argv[1:], "--side", side, environment=TORCH | {"HF_HUB_OFFLINE": "1"}
    )


if __name__ == "__main__":
    main()
