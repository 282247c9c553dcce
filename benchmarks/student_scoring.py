"""Scoring with an exported student against sentence-transformers' `CrossEncoder.predict` with the same weights and pairs.

    python -m benchmarks.student_scoring --run runs/cpu-real

`--run` is a finished run: its student is exported anew and scores the graded test pairs of its `pairs`.
sentence-transformers must be installed (6.2.0 was used). Every side is tried with several batch sizes, in turns, each as
often as `--rounds`; its best time counts, tokenising included. Prints one JSON line: pairs per second, ratios, ROC-AUC of
each.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.contracts import GradeScale
from student.config import ExportConfig
from student.dataset import read_examples
from student.export import export_student
from student.metrics import roc_auc
from student.scorer import Scorer, softmax

BATCH_SIZES = (8, 16, 32, 64)  # pairs for the peer, 24 tokens each for ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from sentence_transformers.cross_encoder import CrossEncoder

    pairs, model = options.run / "pairs", options.run / "student" / "model"
    scale = GradeScale.load(pairs)
    test = read_examples(pairs, scale, "test")
    test = test.take(np.random.default_rng(0).permutation(len(test))[: options.rows])
    texts = list(zip(test.queries, test.ads, strict=True))
    relevant = test.grade >= scale.relevant_from

    def auc(logits: np.ndarray) -> float:
        return roc_auc(relevant, softmax(logits)[:, scale.relevant_from :].sum(axis=1))

    with tempfile.TemporaryDirectory() as folder:
        export_student(ExportConfig(parity_rows=256), model, pairs, Path(folder))
        scorers = {precision: Scorer(folder, precision) for precision in ("fp32", "int8")}
        peer = CrossEncoder(str(model), max_length=scorers["fp32"].card["max_length"], device="cpu")
        sides: dict[str, Callable[[int], Any]] = {
            "cross_encoder": lambda size: peer.predict(texts, batch_size=size, show_progress_bar=False),
            "fp32": lambda size: scorers["fp32"].logits(texts, 24 * size),
            "int8": lambda size: scorers["int8"].logits(texts, 24 * size),
        }
        found = {name: auc(np.asarray(side(32))) for name, side in sides.items()}  # and the first call's costs
        best: dict[tuple[str, int], float] = {}
        for _ in range(options.rounds):
            for size in BATCH_SIZES:
                for name, side in sides.items():
                    begin = time.perf_counter()
                    side(size)
                    seconds = time.perf_counter() - begin
                    best[name, size] = min(best.get((name, size), seconds), seconds)
    speed = {name: max(len(texts) / best[name, size] for size in BATCH_SIZES) for name in sides}
    print(
        json.dumps(
            {
                "benchmark": "student_scoring",
                "rows": len(texts),
                "threads": os.cpu_count(),
                "pairs_per_second": {name: round(value, 1) for name, value in speed.items()},
                "best_batch_size": {name: min(BATCH_SIZES, key=lambda size: best[name, size]) for name in sides},
                "ratio": {name: round(speed[name] / speed["cross_encoder"], 3) for name in ("fp32", "int8")},
                "roc_auc": {name: round(value, 5) for name, value in found.items()},
                "int8_auc_loss": round(found["fp32"] - found["int8"], 5),
            }
        )
    )


if __name__ == "__main__":
    main()
