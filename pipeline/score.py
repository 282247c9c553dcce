"""Score a whole table with an exported student: Spark partitions over onnxruntime.

Rows that `out` already has for this model are skipped, and each task's rows are committed when the task ends, so a job
that was killed goes on where its finished tasks left it. What was left out: scoring on GPUs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.dataset as pads

from data.contracts import PAIRS, SCORES, ContractError, StageOutput, check_schema, digest, log_progress, read_json
from pipeline.progress import duration, watched
from pipeline.rows import attributes_as_json, row_chunks
from student.config import ScoreConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from student.scorer import Scorer

logger = logging.getLogger(__name__)

TASK_ROWS = 20_000  # what a kill loses at most, for each task that runs


def score(config: ScoreConfig, export: Path, pairs: Path, out: Path, spark: SparkSession) -> StageOutput:
    """Write the SCORES table of all pairs in `config.splits` into `out`; rows already there are not scored again.

    Parameters: `export` the exported student's folder, which every executor must be able to read; `pairs` what
    data-prepare wrote (its `pairs/`), or any Parquet file or folder of the PAIRS schema. Raises `ContractError` when
    either is not what it should be.
    """
    from pyspark.sql import functions as F
    from pyspark.sql.pandas.types import from_arrow_schema

    version = _model_version(export, config.precision)
    table = pairs / "pairs" if (pairs / "pairs").is_dir() else pairs
    if not table.exists():
        raise ContractError(f"{table} does not exist; run data-prepare first, or name a table of pairs")
    dataset = pads.dataset(table, format="parquet")
    check_schema(dataset.schema, PAIRS, str(table))

    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    todo = spark.read.parquet(str(table)).where(F.col("split").isin(*config.splits))
    todo = todo.select("pair_id", "query", "ad_title", "ad_text", attributes_as_json())
    before = _scored(out, version)
    if before:
        done = spark.read.parquet(str(out)).where(F.col("model_version") == version).select("pair_id")
        todo = todo.join(done, "pair_id", "left_anti")
    rows = dataset.count_rows(filter=pads.field("split").isin(list(config.splits)))
    tasks = config.partitions or max(spark.sparkContext.defaultParallelism, math.ceil((rows - before) / TASK_ROWS))
    # By pair_id, so that dropping duplicates needs no second shuffle.
    todo = todo.repartition(tasks, "pair_id").dropDuplicates(["pair_id"])
    scored = todo.mapInArrow(partial(_score_rows, str(export.resolve()), config), from_arrow_schema(SCORES))
    # Version 2 of the committer moves a task's file to its place when the task ends, not when the job does.
    writer = scored.write.mode("append").option("mapreduce.fileoutputcommitter.algorithm.version", "2")
    with watched(lambda: _log_progress(out, version, before, rows, begin)):
        writer.parquet(str(out))
    total, seconds = _scored(out, version), time.monotonic() - begin
    logger.info("scored %d pairs in %.0f s, %d were there before", total - before, seconds, before)
    metrics = {"rows": total, "rows_new": total - before, "rows_before": before, "model_version": version}
    metrics |= {"seconds": round(seconds, 1), "pairs_per_second": round((total - before) / seconds, 1)}
    return StageOutput(fingerprint=digest([version, total, sorted(config.splits)]), figures=metrics)


def _score_rows(export: str, config: ScoreConfig, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    scorer = _scorer(export, config.precision, config.threads)
    for rows in row_chunks(batches, config.window):
        probs = scorer.grade_probs(rows, config.batch_tokens)
        columns = {
            "pair_id": [row["pair_id"] for row in rows],
            "p_relevant": scorer.p_relevant(probs).tolist(),
            "grade_probs": probs.tolist(),
            "model_version": [scorer.version] * len(rows),
        }
        yield pa.RecordBatch.from_pydict(columns, schema=SCORES)


@cache
def _scorer(export: str, precision: str, threads: int) -> Scorer:
    """One session for a Python worker's life."""
    from student.scorer import Scorer

    return Scorer(export, precision, threads)


def _model_version(export: Path, precision: str) -> str:
    from student.scorer import MODEL_FILES, VERSIONS

    if not (export / "student.json").exists():
        raise ContractError(f"{export} holds no exported student (no student.json); run student-export first")
    fingerprint = read_json(export / "student.json").get("fingerprint")
    if not fingerprint or not (export / MODEL_FILES[precision]).exists():
        raise ContractError(
            f"{export} lacks {MODEL_FILES[precision]} or a fingerprint; run student-export again"
            + (" with export.fp16=true" if precision == "fp16" else "")
        )
    return f"{fingerprint}-{VERSIONS[precision]}"


def _log_progress(out: Path, version: str, before: int, rows: int, begin: float) -> None:
    """How far the job is, by the files of its finished tasks."""
    total = _scored(out, version)
    rate = (total - before) / (time.monotonic() - begin)
    if rate:
        shown = (total, rows, rate, duration((rows - total) / rate))
        log_progress(logger, total, rows, "score: %d of %d pairs, %.0f pairs/s, %s left", *shown)


def _scored(out: Path, version: str) -> int:
    """Rows of this model that `out` holds."""
    dataset = pads.dataset(out, format="parquet")
    if not dataset.files:
        return 0
    check_schema(dataset.schema, SCORES, str(out))
    return dataset.count_rows(filter=pads.field("model_version") == version)
