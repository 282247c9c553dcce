"""The reasons of one part of the labelled pairs, for `benchmarks.gpu.policies`: SHARD-N/cache of a folder gets them."""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.contracts import PAIRS, read_table
from pipeline.settings import choose
from teacher.examples import labelled_rows
from teacher.reasons import collect_reasons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("payload", type=Path)
    parser.add_argument("place", type=Path)
    parser.add_argument("number", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    options, _ = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    teacher = choose("single-gpu", options.config, overrides=options.set).teacher
    if not teacher.warm_start.asks_a_model:
        return
    source, out = options.payload / "pairs", options.place / f"shard-{options.number}"
    rows = labelled_rows(source, "train", teacher.warm_start.examples, teacher.seed)[options.number :: options.count]
    table = read_table(source / "pairs", PAIRS)
    pairs = out / "pairs"
    (pairs / "pairs").mkdir(parents=True, exist_ok=True)
    here = pc.is_in(table["pair_id"], pa.array([row["pair_id"] for row in rows]))
    pq.write_table(table.filter(here), pairs / "pairs" / "part-0.parquet")
    shutil.copyfile(source / "scale.json", pairs / "scale.json")
    model = options.place / "model"
    collect_reasons(teacher, model, model, pairs, out / "out", out / "cache")


if __name__ == "__main__":
    main()
