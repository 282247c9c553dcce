"""The annotation job: the teacher labels the pairs of a split, as a Spark job over engines.

Each part of a worker's window is committed as a file of its own by the worker that made it, so that a kill loses at most
one window for each engine and a rerun only does what is missing. Spark itself gets back nothing but counts, and what the
driver holds does not grow with the table. How files get into the folder is told in `annotate_commit`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.contracts import ANNOTATIONS, ContractError, GradeScale, Unavailable, digest, write_json
from pipeline.annotation.compact import compact, finish_merges
from pipeline.annotation.config import AnnotateConfig
from pipeline.annotation.metrics import table_figures
from pipeline.annotation.plan import in_order, missing
from pipeline.annotation.store import commit, disk_errors, files_of, take_over
from pipeline.annotation.worker import (
    PARTS_PER_WINDOW,
    Job,
    Teacher,
    annotate_partition,
    start_teacher,
)
from pipeline.artifacts import StageOutput
from pipeline.progress import duration, watched
from teacher.engines.base import Sampling
from teacher.engines.config import EngineConfig, LocalEngine
from teacher.prompt import TEACHER_FILE, load_prompt

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

CURRENT = "_annotations.json"  # which key the folder was last annotated under, for its readers
_READING = 1  # raised when the same completions would be read as other grades


def annotate(
    config: AnnotateConfig,
    teacher: Path,
    pairs: Path,
    out: Path,
    spark: SparkSession,
    load: Callable[[Job], Teacher] = start_teacher,
) -> StageOutput:
    """Label the pairs of `config.split` that `out` does not have yet under this teacher, prompt and sampling.

    `teacher` is a teacher's model folder, `pairs` the folder that data-prepare wrote, `out` the annotations' folder;
    `load` starts the teacher in a worker (a function of a module that workers can import).
    Raises `ContractError` when more than `config.max_failed_share` of the pairs failed (what was made stays), when the
    teacher and the pairs have different scales, when the disk is full, when no engine can be had, when a worker died more
    often than Spark tries again, or when another run takes the folder over.
    """
    begin = time.monotonic()
    prompt, sampling = load_prompt(teacher), sampling_of(config, teacher)
    key = annotation_key(teacher, sampling)
    if GradeScale.load(teacher) != GradeScale.load(pairs):
        raise ContractError(
            f"teacher {teacher} and pairs {pairs} have different scales; train a teacher on these pairs"
        )
    run = take_over(out)
    finish_merges(out)
    if config.retry_failed:
        drop_failed(out, key, run)
    todo, wanted, count = missing(spark, config, prompt.config, pairs, out, key)
    log.info("annotate: %d pairs wanted, %d there already, %d to do (key %s)", wanted, wanted - count, count, key)
    if count:
        engines = min(config.engines, math.ceil(count / max(1, config.window // PARTS_PER_WINDOW)))
        local = spark.sparkContext.master.startswith("local")
        job = Job(
            key=key,
            teacher=str(teacher.resolve()),
            out=str(out.resolve()),
            run=run,
            engine=_with_threads(config.engine, engines, local),
            sampling=sampling,
            window=config.window,
            engines=engines,
            load=load,
        )
        _run(job, todo, count, max(engines, config.partitions))
    if len(files_of(out, key)) > config.max_files:
        compact(out, key, run, config.file_rows)
    with disk_errors(out):
        write_json(
            out / CURRENT, {"annotation_key": key, "teacher": _teacher_fingerprint(teacher), "split": config.split}
        )
    seconds = time.monotonic() - begin
    fingerprint, figures, reasons = table_figures(spark, out, key, pairs, config.split)
    made = {"n_new": count, "n_reused": wanted - count, "pairs_per_s": round(count / seconds, 3) if count else 0.0}
    failed, total = figures["failed"], figures["pairs"]
    if total and failed / total > config.max_failed_share:
        counted = "; ".join(f"{number} × {reason}" for reason, number in reasons.most_common(5))
        raise ContractError(
            f"{failed} of {total} annotations failed, more than max_failed_share {config.max_failed_share:g} ({counted}); "
            "mend the cause and run again with retry_failed=true"
        )
    return StageOutput(fingerprint=fingerprint, figures=figures | made)


def sampling_of(config: AnnotateConfig, teacher: Path) -> Sampling:
    """The sampling that a config asks of this teacher."""
    prompt = load_prompt(teacher)
    sampling = Sampling(
        n=config.n,
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens or prompt.max_completion_tokens,
        seed=config.seed,
        # the grades, and room for other spellings of them
        logprobs=min(20, prompt.scale.size + 4),
    )
    return _greedy_once(sampling)


def annotation_key(teacher: Path, sampling: Sampling) -> str:
    """What an annotation depends on: teacher weights, prompt, sampling and scale; not the engine that ran it."""
    from transformers import AutoTokenizer

    return digest(
        {
            "teacher": _teacher_fingerprint(teacher),
            "prompt": load_prompt(teacher).rendered_version(AutoTokenizer.from_pretrained(teacher)),
            "sampling": vars(sampling),
            "scale": GradeScale.load(teacher).model_dump(mode="json"),
            "reading": _READING,
        }
    )


def _teacher_fingerprint(teacher: Path) -> str:
    fingerprint = json.loads((teacher / TEACHER_FILE).read_text(encoding="utf-8")).get("fingerprint")
    if not fingerprint:
        raise ContractError(f"{teacher / TEACHER_FILE} has no fingerprint: give the `model` folder of teacher-train")
    return str(fingerprint)


def drop_failed(out: Path, key: str, run: str) -> int:
    """Take the failed rows of `key` out of their files, one file at a time; returns how many they were."""
    dropped = 0
    for file in files_of(out, key):
        table = pq.read_table(file, schema=ANNOTATIONS)
        kept = table.filter(pc.not_equal(table["status"], "failed"))
        if kept.num_rows == table.num_rows:
            continue
        dropped += table.num_rows - kept.num_rows
        # Under the old name, by one rename: no row is ever there twice. A new part cannot have this name, as its pairs
        # would be those of the old one, of which some are still here.
        if kept.num_rows:
            commit(file, kept, run)
        else:
            file.unlink()
    log.info("annotate: %d failed rows dropped, to be tried again", dropped)
    return dropped


def _run(job: Job, todo: DataFrame, count: int, partitions: int) -> None:
    """Annotate `todo` (`count` rows); returns when every part is committed."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException
    from pyspark.sql import functions as F

    ordered = in_order(todo, partitions)
    try:
        with watched(_Progress(Path(job.out), job.key, count).look):
            made = ordered.mapInArrow(partial(annotate_partition, job), "rows long, made long")
            row = made.agg(F.sum("rows").alias("rows")).first()
    except (PySparkException, Py4JJavaError) as error:  # which of them depends on where it came from
        raise _told(error) from error
    if row is None or row["rows"] != count:
        raise RuntimeError(f"{row and row['rows']} rows were annotated, {count} expected")


def _with_threads(engine: EngineConfig, engines: int, local: bool) -> EngineConfig:
    """`engine` with its share of this machine's cores, unless its threads are set or the workers are elsewhere."""
    if not isinstance(engine, LocalEngine) or engine.threads or not local:
        return engine
    cores = int(os.environ.get("OMP_NUM_THREADS") or 0) or len(os.sched_getaffinity(0))
    return engine.model_copy(update={"threads": max(1, cores // engines)})


def _greedy_once(sampling: Sampling) -> Sampling:
    """Greedy samples of a prompt are all the same: one is enough."""
    return replace(sampling, n=1) if sampling.temperature == 0 else sampling


def _told(error: Exception) -> Exception:
    """The one sentence of a `ContractError` raised in a worker, as what it was; any other error as it is."""
    text = str(error)
    found = re.findall(r"(?m)^(?:.*Exception: )?data\.contracts\.errors\.(ContractError|Unavailable): (.+)", text)
    if found:
        kind, sentence = found[-1]
        return (Unavailable if kind == "Unavailable" else ContractError)(sentence.strip())
    if "Python worker exited unexpectedly" in text or "ExecutorLostFailure" in text:
        return ContractError(
            "a worker of the annotation job died (killed, or out of memory: try a smaller max_num_seqs, kv_cache_gib or "
            "max_model_len); run this again: finished annotations are kept"
        )
    return error


class _Progress:
    """Counts what has been committed since it was made."""

    def __init__(self, out: Path, key: str, count: int) -> None:
        self._out, self._key, self._count = out, key, count
        self._seen = {file.name for file in files_of(out, key)}
        self._pairs = self._tokens = self._bad = 0
        self._begin = time.monotonic()

    def look(self) -> None:
        """Read the new files and say how far the job is."""
        new = [file for file in files_of(self._out, self._key) if file.name not in self._seen]
        for file in new:
            table: pa.Table = pq.read_table(file, columns=["status", "prompt_tokens", "completion_tokens"])
            self._seen.add(file.name)
            self._pairs += table.num_rows
            self._bad += pc.sum(pc.not_equal(table["status"], "ok")).as_py() or 0
            self._tokens += pc.sum(table["completion_tokens"]).as_py() or 0
        if not new:
            return
        seconds = time.monotonic() - self._begin
        rate = self._pairs / seconds
        log.info(
            "annotate: %d of %d pairs (%d not ok), %.2f pairs/s, %.0f tokens/s, %s left",
            *(self._pairs, self._count, self._bad, rate, self._tokens / seconds),
            duration((self._count - self._pairs) / rate),
            extra={"progress": (self._pairs, self._count)},
        )
