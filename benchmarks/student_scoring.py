"""Scoring with an exported student against sentence-transformers' `CrossEncoder.predict` with the same weights and pairs.

    python -m benchmarks.student_scoring --run runs/cpu-real

`--run` is a finished run: its student is exported anew and scores the graded test pairs of its `pairs`.
sentence-transformers must be installed (6.2.0 was used). Every side is tried with several batch sizes, in turns, each as
often as `--rounds`; its best time counts, tokenising included, on `--threads` threads. Prints one JSON line: pairs per
second, ratios, ROC-AUC of each. `cpu_ratio` is that of CPU seconds, which other work on the machine moves less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.contracts import GradeScale
from student.config import ExportConfig
from student.dataset import read_examples
from student.export import export_student
from student.metrics import roc_auc
from student.scorer import Scorer, refuse_bf16, softmax

BATCH_SIZES = (8, 16, 32, 64)  # pairs for the peer, 24 tokens each for ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from sentence_transformers.cross_encoder import CrossEncoder

    pairs, model = options.run / "pairs", options.run / "student" / "model"
    scale = GradeScale.load(pairs)
    test = read_examples(pairs, scale, "test")
    test = test.take(np.random.default_rng(0).permutation(len(test))[: options.rows])
    texts = list(zip(test.queries, test.ads, strict=True))
    relevant = test.grade >= scale.relevant_from

    def auc(logits: np.ndarray) -> float:
        return roc_auc(relevant, softmax(logits)[:, scale.relevant_from :].sum(axis=1))

    def scored(scorer: Scorer, size: int) -> Any:
        return scorer.logits(texts, 24 * size)

    with tempfile.TemporaryDirectory() as folder:
        export_student(ExportConfig(parity_rows=256), model, pairs, Path(folder))
        ours = ["fp32", "int8"]
        try:
            refuse_bf16()
            ours.append("bf16")
        except ValueError as error:
            print(f"without bf16: {error}", file=sys.stderr)
        scorers = {precision: Scorer(folder, precision, options.threads) for precision in ours}
        peer = CrossEncoder(str(model), max_length=scorers["fp32"].card["max_length"], device="cpu")
        sides: dict[str, Callable[[int], Any]] = {
            "cross_encoder": lambda size: peer.predict(texts, batch_size=size, show_progress_bar=False),
            **{name: partial(scored, scorer) for name, scorer in scorers.items()},
        }
        found = {name: auc(np.asarray(side(32))) for name, side in sides.items()}  # and the first call's costs
        best: dict[tuple[str, int], float] = {}
        best_cpu = best.copy()
        for _ in range(options.rounds):
            for size in BATCH_SIZES:
                for name, side in sides.items():
                    begin, begin_cpu = time.perf_counter(), time.process_time()
                    side(size)
                    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
                    best[name, size] = min(best.get((name, size), seconds), seconds)
                    best_cpu[name, size] = min(best_cpu.get((name, size), cpu), cpu)
    speed, cpu_speed = (
        {name: max(len(texts) / times[name, size] for size in BATCH_SIZES) for name in sides}
        for times in (best, best_cpu)
    )
    print(
        json.dumps(
            {
                "benchmark": "student_scoring",
                "rows": len(texts),
                "threads": options.threads,
                "pairs_per_second": {name: round(value, 1) for name, value in speed.items()},
                "best_batch_size": {name: min(BATCH_SIZES, key=lambda size: best[name, size]) for name in sides},
                "ratio": {name: round(speed[name] / speed["cross_encoder"], 3) for name in ours},
                "cpu_ratio": {name: round(cpu_speed[name] / cpu_speed["cross_encoder"], 3) for name in ours},
                "roc_auc": {name: round(value, 5) for name, value in found.items()},
                "auc_loss": {name: round(found["fp32"] - found[name], 5) for name in ours[1:]},
                # What one layer's product of matrices reaches, and what fp32 does: its limit on this machine.
                "sgemm_gflops": round(sgemm(options.threads), 1),
                "fp32_gflops": round(speed["fp32"] * operations(model, scorers["fp32"], texts) / 1e9, 1),
            }
        )
    )


def sgemm(threads: int, rows: int = 384, width: int = 384) -> float:
    """10⁹ operations a second of the product of a batch with a weight of an encoder's feed-forward layer."""
    torch.set_num_threads(threads)
    a, b = torch.randn(rows, width), torch.randn(width, 4 * width)
    for _ in range(20):
        a @ b
    begin = time.perf_counter()
    for _ in range(300):
        a @ b
    return 300 * 2 * rows * width * 4 * width / (time.perf_counter() - begin) / 1e9


def operations(model: Path, scorer: Scorer, texts: list[tuple[str, str]]) -> float:
    """Operations in the linear layers for a mean pair; the last layer computes keys and values alone for most tokens."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    width, inner = config["hidden_size"], config["intermediate_size"]
    layer = 4 * width**2 + 2 * width * inner
    weights = (config["num_hidden_layers"] - 1) * layer + 2 * width**2
    return 2 * weights * float(np.mean([len(e.ids) for e in scorer.tokenizer.encode_batch(texts)]))


if __name__ == "__main__":
    main()
