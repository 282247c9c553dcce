"""Score a whole table with an exported student: Spark partitions over onnxruntime.

Rows that `out` already has for this model are skipped, and each task's rows are committed when the task ends, so a job
that was killed goes on where its finished tasks left it. What was left out: scoring on GPUs.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads

from data.contracts import PAIRS, SCORES, ContractError, check_schema, digest, log_progress
from pipeline.artifacts import StageOutput
from pipeline.progress import duration, watched
from student.config import ScoreConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from student.scorer import Scorer

logger = logging.getLogger(__name__)

TASK_ROWS = 20_000  # what a kill loses at most, for each task that runs
_DDL = "pair_id string, p_relevant double, grade_probs array<double>, model_version string"
_scorers: dict[tuple[str, str, int], Scorer] = {}  # one session for a Python worker's life


def score(config: ScoreConfig, export: Path, pairs: Path, out: Path, spark: SparkSession) -> StageOutput:
    """Write the SCORES table of all pairs in `config.splits` into `out`; rows already there are not scored again.

    Parameters: `export` the exported student's folder, which every executor must be able to read; `pairs` what
    data-prepare wrote (its `pairs/`), or any Parquet file or folder of the PAIRS schema. Raises `ContractError` when
    either is not what it should be.
    """
    from pyspark.sql import functions as F

    from student.scorer import MODEL_FILES

    try:
        fingerprint = json.loads((export / "student.json").read_text(encoding="utf-8"))["fingerprint"]
    except FileNotFoundError:
        raise ContractError(f"{export} holds no exported student (no student.json); run student-export first") from None
    except (ValueError, KeyError, TypeError):
        raise ContractError(f"{export / 'student.json'} is damaged; run student-export again") from None
    if not (export / MODEL_FILES[config.precision]).exists():
        raise ContractError(f"{export} has no {MODEL_FILES[config.precision]}; run student-export again")
    version = f"{fingerprint}-{config.precision}"
    table = pairs / "pairs" if (pairs / "pairs").is_dir() else pairs
    if not table.exists():
        raise ContractError(f"{table} does not exist; run data-prepare first, or name a table of pairs")
    dataset = pads.dataset(table, format="parquet")
    check_schema(dataset.schema, PAIRS, str(table))

    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    wanted = spark.read.parquet(str(table)).where(F.col("split").isin(*config.splits))
    # Spark 4.3 hands a batch whose maps are all null to Python at 12 µs a row, and empty ones at less than one.
    attributes = F.coalesce("attributes", F.create_map().cast("map<string,string>")).alias("attributes")
    wanted = wanted.select("pair_id", "query", "ad_title", "ad_text", attributes)
    before = _scored(out, version)
    if before:
        done = spark.read.parquet(str(out)).where(F.col("model_version") == version).select("pair_id")
        wanted = wanted.join(done, "pair_id", "left_anti")
    rows = dataset.count_rows(filter=pads.field("split").isin(list(config.splits)))
    tasks = config.partitions or max(spark.sparkContext.defaultParallelism, math.ceil((rows - before) / TASK_ROWS))
    run = _Job(str(export.resolve()), config.precision, config.threads, config.window, config.batch_tokens)
    # By pair_id, so that dropping duplicates needs no second shuffle.
    scored = wanted.repartition(tasks, "pair_id").dropDuplicates(["pair_id"]).mapInArrow(run, _DDL)
    # Version 2 of the committer moves a task's file to its place when the task ends, not when the job does.
    with watched(lambda: _say(out, version, before, rows, begin)):
        scored.write.mode("append").option("mapreduce.fileoutputcommitter.algorithm.version", "2").parquet(str(out))
    total, seconds = _scored(out, version), time.monotonic() - begin
    logger.info("scored %d pairs in %.0f s, %d were there before", total - before, seconds, before)
    figures = {
        "rows": total,
        "rows_new": total - before,
        "rows_before": before,
        "seconds": round(seconds, 1),
        "pairs_per_second": round((total - before) / max(seconds, 1e-9), 1),
        "model_version": version,
    }
    return StageOutput(fingerprint=digest([version, total, sorted(config.splits)]), figures=figures)


class _Job:
    """What a task does with its partition; it travels to the executors as these few values."""

    def __init__(self, export: str, precision: str, threads: int, window: int, batch_tokens: int) -> None:
        self.export, self.precision, self.threads = export, precision, threads
        self.window, self.batch_tokens = window, batch_tokens

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        scorer = _scorer(self.export, self.precision, self.threads)
        for rows in _windows(batches, self.window):
            probs = scorer.grade_probs(rows, self.batch_tokens)
            yield pa.RecordBatch.from_pydict(
                {
                    "pair_id": [row["pair_id"] for row in rows],
                    "p_relevant": scorer.p_relevant(probs).tolist(),
                    "grade_probs": probs.tolist(),
                    "model_version": [scorer.version] * len(rows),
                },
                schema=SCORES,
            )


def _scorer(export: str, precision: str, threads: int) -> Scorer:
    from student.scorer import Scorer

    key = (export, precision, threads)
    if key not in _scorers:
        _scorers[key] = Scorer(export, precision, threads)
    return _scorers[key]


def _windows(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows as dicts, `size` at a time: long enough to sort by length, short enough for memory."""
    held: list[dict[str, Any]] = []
    for batch in batches:
        held += batch.to_pylist()
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held:
        yield held


def _say(out: Path, version: str, before: int, rows: int, begin: float) -> None:
    """How far the job is, by the files of its finished tasks."""
    total = _scored(out, version)
    rate = (total - before) / (time.monotonic() - begin)
    if rate:
        left = duration((rows - total) / rate)
        shown = (total, rows, rate, left)
        log_progress(logger, total, rows, "score: %d of %d pairs, %.0f pairs/s, %s left", *shown)


def _scored(out: Path, version: str) -> int:
    """Rows of this model that `out` holds."""
    dataset = pads.dataset(out, format="parquet")
    if not dataset.files:
        return 0
    check_schema(dataset.schema, SCORES, str(out))
    return dataset.count_rows(filter=pads.field("model_version") == version)
