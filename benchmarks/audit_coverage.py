"""How often the interval of an audit's accuracy covers the truth, over many audits of one table of annotations.

    python -m benchmarks.audit_coverage [--audits 1000] [--size 300]

A population of annotations with known truths (right more often where a pair's samples agree, as of a real teacher) is
audited again and again by the product's own draw and estimate. Prints one JSON line: share of intervals that cover the
truth, bias, mean width, and the width of a simple random sample's interval of the same size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KEY = "0123456789abcdef"
LEVELS = {1.0: (0.62, 0.88), 0.875: (0.16, 0.7), 0.625: (0.14, 0.5), 0.5: (0.08, 0.4)}
"""Agreement → share of the pairs, share that is right."""


def population(folder: Path, pairs: int, seed: int) -> dict[str, bool]:
    """Write annotations of `pairs` pairs; returns which are right."""
    from data.contracts import ANNOTATIONS

    rng = np.random.default_rng(seed)
    levels, parts = list(LEVELS), [share for share, _ in LEVELS.values()]
    agreement, grade = rng.choice(levels, pairs, p=parts), rng.choice(3, pairs, p=[0.5, 0.35, 0.15])
    row = {"annotation_key": KEY, "votes": [], "n_samples": 8, "n_unparsed": 0, "status": "ok", "error": ""}
    row |= {"prompt_tokens": 0, "completion_tokens": 0, "created_at": datetime(2026, 1, 1, tzinfo=UTC)}
    rows: list[dict[str, Any]] = [
        row | {"pair_id": f"p{i:06}", "grade": int(grade[i]), "agreement": float(agreement[i])} for i in range(pairs)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=ANNOTATIONS), folder / f"{KEY}-0.parquet")
    chance = rng.random(pairs)
    return {f"p{i:06}": bool(chance[i] < LEVELS[float(agreement[i])][1]) for i in range(pairs)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audits", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from pipeline.audit.draw import stratified
    from pipeline.audit.estimate import accuracy, wilson

    with tempfile.TemporaryDirectory() as folder:
        right = population(Path(folder), options.pairs, options.seed)
        truth = float(np.mean(list(right.values())))
        covered, values, widths = [], [], []
        for audit in range(options.audits):
            rows, populations = stratified(Path(folder), KEY, options.size, audit)
            answers: dict[str, list[float]] = {}
            for row in rows:
                answers.setdefault(row["stratum"], []).append(float(right[row["pair_id"]]))
            found = accuracy(populations, answers)
            value, low, high = (np.float64(each) for each in (found.value, found.low, found.high))
            covered.append(low <= truth <= high)
            values.append(value)
            widths.append(high - low)
    simple = wilson(truth, len(rows))
    result = {"audits": options.audits, "pairs": options.pairs, "drawn": len(rows), "truth": truth}
    result |= {
        "covered": float(np.mean(covered)),
        "bias": float(np.mean(values)) - truth,
        "width": float(np.mean(widths)),
    }
    print(json.dumps(result | {"width_simple_random": simple[1] - simple[0]}))


if __name__ == "__main__":
    main()
