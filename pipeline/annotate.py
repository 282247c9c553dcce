"""The annotation job: the teacher labels the pairs of a split, as a Spark job over engines.

Each window of pairs is committed as a file of its own by the worker that made it, so that a kill loses at most one
window for each engine and a rerun only does what is missing. Spark itself gets back nothing but counts.
What was left out: object stores (the folder is one that all workers can write, such as a shared file system).
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from data.schema import ANNOTATIONS, PAIRS, ContractError, GradeScale, check_schema
from pipeline.annotate_config import AnnotateConfig
from pipeline.annotate_figures import table_figures
from pipeline.annotate_worker import TEMPORARY, Job, annotate_partition, commit, greedy_once, with_threads
from pipeline.artifacts import StageOutput, digest, write_json
from teacher.engines.base import Sampling
from teacher.prompt import TEACHER_FILE, load_prompt

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

CURRENT = "_annotations.json"  # which key the folder was last annotated under, for its readers
_READING = 1  # raised when the same completions would be read as other grades
_LOG_EVERY = 10.0


def annotate(config: AnnotateConfig, teacher: Path, pairs: Path, out: Path, spark: SparkSession) -> StageOutput:
    """Label the pairs of `config.split` that `out` does not have yet under this teacher, prompt and sampling.

    `teacher` is a teacher's model folder, `pairs` the folder that data-prepare wrote, `out` the annotations' folder.
    Raises `ContractError` when more than `config.max_failed_share` of the pairs failed (what was made stays), when the
    teacher and the pairs have different scales, when the disk is full, or when no engine can be had.
    """
    begin = time.monotonic()
    sampling = sampling_of(config, teacher)
    key = annotation_key(teacher, sampling)
    if GradeScale.load(teacher) != GradeScale.load(pairs):
        raise ContractError(
            f"teacher {teacher} and pairs {pairs} have different scales; train a teacher on these pairs"
        )
    out.mkdir(parents=True, exist_ok=True)
    clean(out)
    if config.retry_failed:
        drop_failed(out, key)
    todo, wanted = missing(spark, config, pairs, out, key)
    count = todo.count()
    log.info("annotate: %d pairs wanted, %d there already, %d to do (key %s)", wanted, wanted - count, count, key)
    if count:
        engines = min(config.engines, math.ceil(count / config.window))
        local = spark.sparkContext.master.startswith("local")
        job = Job(
            key=key,
            teacher=str(teacher.resolve()),
            out=str(out.resolve()),
            engine=with_threads(config.engine, engines, local),
            sampling=sampling,
            window=config.window,
            engines=engines,
        )
        _run(job, todo, count)
    write_json(out / CURRENT, {"annotation_key": key, "teacher": _teacher_fingerprint(teacher), "split": config.split})
    seconds = time.monotonic() - begin
    fingerprint, figures, reasons = table_figures(out, key, pairs, config.split)
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
    return greedy_once(sampling)


def annotation_key(teacher: Path, sampling: Sampling) -> str:
    """What an annotation depends on: teacher weights, prompt, sampling and scale; not the engine that ran it."""
    return digest(
        {
            "teacher": _teacher_fingerprint(teacher),
            "prompt": load_prompt(teacher).version,
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


def clean(out: Path) -> None:
    """Remove what killed workers left half written."""
    for leftover in out.glob(f"{TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


def drop_failed(out: Path, key: str) -> int:
    """Take the failed rows of `key` out of their files, one file at a time; returns how many they were."""
    dropped = 0
    for file in sorted(out.glob(f"{key}-*.parquet")):
        table = pq.read_table(file, schema=ANNOTATIONS)
        kept = table.filter(pc.not_equal(table["status"], "failed"))
        if kept.num_rows == table.num_rows:
            continue
        dropped += table.num_rows - kept.num_rows
        # Under the old name, by one rename: no row is ever there twice. A new window cannot have this name, as its pairs
        # would be those of the old one, of which some are still here.
        if kept.num_rows:
            commit(file, kept.to_pylist())
        else:
            file.unlink()
    log.info("annotate: %d failed rows dropped, to be tried again", dropped)
    return dropped


def missing(spark: SparkSession, config: AnnotateConfig, pairs: Path, out: Path, key: str) -> tuple[DataFrame, int]:
    """The wanted pairs that have no row under `key` yet (columns of the prompt and the id), and how many are wanted."""
    from pyspark.sql import functions as F

    source = pairs / "pairs"
    if not source.is_dir():
        raise ContractError(f"{source} does not exist; run data-prepare first")
    check_schema(pads.dataset(source, format="parquet").schema, PAIRS, str(source))
    wanted = spark.read.parquet(str(source)).where(F.col("split") == config.split)
    wanted = wanted.select("pair_id", "query", "ad_title", "ad_text", "attributes").dropDuplicates(["pair_id"])
    if config.limit:
        wanted = wanted.orderBy("pair_id").limit(config.limit)
    count = wanted.count()
    if not count:
        raise ContractError(f"split '{config.split}' of {source} has no pairs; choose another split")
    if any(out.glob(f"{key}-*.parquet")):
        done = spark.read.option("pathGlobFilter", f"{key}-*.parquet").parquet(str(out)).select("pair_id")
        wanted = wanted.join(done, "pair_id", "left_anti")
    return wanted, count


def _run(job: Job, todo: DataFrame, count: int) -> None:
    """Annotate `todo` (`count` rows); returns when every window is committed."""
    from pyspark.errors import PySparkException
    from pyspark.sql import functions as F

    length = F.length("query") + F.length("ad_title") + F.coalesce(F.length("ad_text"), F.lit(0))
    # Longest first: what does not fit shows at once. By id within a length: the windows are the same for every try.
    ordered = (
        todo.repartition(job.engines, "pair_id")
        .withColumn("length", length)
        .sortWithinPartitions(F.desc("length"), "pair_id")
        .drop("length")
    )
    progress = _Progress(Path(job.out), job.key, count)
    progress.start()
    try:
        done = ordered.mapInArrow(partial(annotate_partition, job), "rows long, seconds double").collect()
    except PySparkException as error:
        raise _told(error) from error
    finally:
        progress.stop()
    rows = sum(row["rows"] for row in done)
    if rows != count:
        raise RuntimeError(f"{rows} rows were annotated, {count} expected")


def _told(error: Exception) -> Exception:
    """The one sentence of a `ContractError` raised in a worker; any other error as it is."""
    found = re.findall(r"ContractError: (.+)", str(error))
    return ContractError(found[-1].strip()) if found else error


class _Progress(threading.Thread):
    """Counts committed windows from the driver, as workers have no channel to it while their task runs."""

    def __init__(self, out: Path, key: str, count: int) -> None:
        super().__init__(name="annotate-progress", daemon=True)
        self._out, self._key, self._count = out, key, count
        self._seen = {file.name for file in out.glob(f"{key}-*.parquet")}
        self._pairs = self._tokens = self._bad = 0
        self._begin = time.monotonic()
        self._finished = threading.Event()

    def run(self) -> None:
        while not self._finished.wait(_LOG_EVERY):
            self._look()

    def stop(self) -> None:
        """Say a last line and end."""
        self._finished.set()
        self.join()
        self._look()

    def _look(self) -> None:
        new = [file for file in self._out.glob(f"{self._key}-*.parquet") if file.name not in self._seen]
        for file in new:
            table: pa.Table = pq.read_table(file, columns=["status", "prompt_tokens", "completion_tokens"])
            self._seen.add(file.name)
            self._pairs += table.num_rows
            self._bad += sum(n for status, n in Counter(table["status"].to_pylist()).items() if status != "ok")
            self._tokens += pc.sum(table["completion_tokens"]).as_py() or 0
        if not new:
            return
        seconds = time.monotonic() - self._begin
        rate = self._pairs / seconds
        log.info(
            "annotate: %d of %d pairs (%d not ok), %.2f pairs/s, %.0f tokens/s, %s left",
            *(self._pairs, self._count, self._bad, rate, self._tokens / seconds),
            _duration((self._count - self._pairs) / rate),
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
