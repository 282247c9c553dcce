"""The annotation job: the teacher labels the pairs of a split, as a Spark job over engines.

Workers commit their rows themselves, as files of their own (see `store`), so that a kill loses at most `max_in_flight` pairs
for each engine and a rerun only does what is missing. Spark gets back nothing but counts, and what the driver holds does not
grow with the table.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import pyarrow.dataset as pads

from data.contracts import (
    KEY_FILE,
    ContractError,
    GradeScale,
    StageOutput,
    Unavailable,
    digest,
    log_progress,
    read_json,
    write_json,
)
from pipeline.annotation.budget import Scores, Sources, select
from pipeline.annotation.calibration import calibration_of, recalibrate
from pipeline.annotation.cascade import cascade_metrics, spare
from pipeline.annotation.config import AnnotateConfig
from pipeline.annotation.metrics import Reasons, annotated, measured_beside, table_metrics
from pipeline.annotation.plan import chosen_pairs, in_order, measured_ids, missing, pairs_of
from pipeline.annotation.store import compact, disk_errors, drop, files_of, take_over
from pipeline.annotation.worker import Job, annotate_partition, start_annotator
from pipeline.progress import duration, watched
from student.config import ScoreConfig
from teacher.annotator import Annotator
from teacher.engines.base import Sampling
from teacher.engines.config import EngineConfig, LocalEngine
from teacher.prompt import TEACHER_FILE, Prompt, load_prompt, opened_answer
from teacher.reading import answer_logprobs

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

_READING = 1  # raised when the same completions would be read as other grades


def annotate(
    config: AnnotateConfig,
    teacher: Path,
    pairs: Path,
    out: Path,
    spark: SparkSession,
    load: Callable[[Job], Annotator] = start_annotator,
    encoder: Path | None = None,
) -> StageOutput:
    """Label the pairs of `config.split` that `out` does not have yet under this teacher, prompt and sampling; before them
    the labelled pairs of splits valid and test that the teacher is calibrated and measured on.

    `teacher` is a teacher's model folder, `pairs` the folder that data-prepare wrote, `out` the annotations' folder;
    `load` starts the teacher in a worker (a function of a module that workers can import); `encoder` is the folder of
    `select.encoder`.
    Raises `ContractError` when too many pairs failed or too few got a grade (the annotations stay), when the teacher and the
    pairs have different scales, when the disk is full, when no engine can be had, when a worker died more often than Spark
    tries again, or when another run takes the folder over.
    """
    from pyspark.sql import functions as F
    from transformers import AutoTokenizer

    prompt = load_prompt(teacher)
    sampling = sampling_of(config, prompt, AutoTokenizer.from_pretrained(teacher))
    key = annotation_key(teacher, config)
    if prompt.scale != GradeScale.load(pairs):
        raise ContractError(f"teacher {teacher} and pairs {pairs} have different scales; train one on these pairs")
    run = take_over(out)
    if config.retry_failed:
        dropped = drop(out, key, run, pc.field("status") == "failed")
        log.info("annotate: %d failed rows dropped, to be tried again", dropped)
    job = Job(key, str(teacher.resolve()), str(out.resolve()), run, config, sampling, config.engines, load)
    chosen, ids = chosen_pairs(spark, config, pairs), measured_ids(config, pairs)
    if measured := ids["valid"] + ids["test"]:
        done = annotated(spark, out, key).where(F.col("pair_id").isin(measured)) if files_of(out, key) else None
        label(job, *missing(pairs_of(spark, pairs, measured), done, prompt.config), "valid and test")
    calibration = recalibrate(out, key, run, pairs, ids["valid"])
    log.info("annotate: probabilities calibrated by %s, on %d pairs", calibration.method, calibration.rows)
    begin = time.monotonic()
    beside = measured_beside(spark, pairs, config.split)
    scores = _scores(config, pairs, out, spark) if config.uses_student else None
    limit = spare(job, chosen, scores, pairs, ids["valid"])
    if config.select.has_budget:
        chosen = _within_budget(job, chosen, measured, Sources(pairs, scores, encoder))
    done = annotated(spark, out, key, beside) if files_of(out, key) else None
    todo, total, count = missing(chosen, done, prompt.config)
    label(job, todo, total, count, config.split)
    if len(files_of(out, key)) > config.max_files:
        compact(out, key, run, config.file_rows)
    with disk_errors(out):
        write_json(out / KEY_FILE, {"annotation_key": key, "split": config.split})
    seconds = time.monotonic() - begin
    fingerprint, metrics, reasons = table_metrics(spark, out, key, pairs, config.split)
    _check_shares(config, metrics, reasons)
    metrics |= {"n_new": count, "n_reused": total - count, "pairs_per_s": round(count / seconds, 3) if count else 0.0}
    if scores is not None and limit is not None:
        metrics |= cascade_metrics(annotated(spark, out, key, beside), scores.table(spark), limit)
    return StageOutput(fingerprint=fingerprint, figures=metrics | calibration.metrics)


def _scores(config: AnnotateConfig, pairs: Path, out: Path, spark: SparkSession) -> Scores:
    """What the exported student says of the split, and of valid; only new pairs are scored."""
    from pipeline.score import score

    assert config.student is not None
    splits = tuple(dict.fromkeys((config.split, "valid")))
    scored = score(ScoreConfig(splits=splits), config.student, pairs, out / "_scores", spark)
    return Scores(out / "_scores", scored.figures["model_version"])


def _within_budget(job: Job, chosen: DataFrame, measured: Sequence[str], sources: Sources) -> DataFrame:
    """Those of the pairs that the budget goes to; what a student has graded costs nothing."""
    from pyspark.sql import functions as F

    spark, out = chosen.sparkSession, Path(job.out)
    candidates = chosen.select("pair_id", "query_id").distinct()
    if files_of(out, job.key):
        by_student = annotated(spark, out, job.key).where(F.col("annotator").isNotNull()).select("pair_id")
        candidates = candidates.join(by_student, "pair_id", "left_anti")
    config = job.config
    selection = select(config.select, config.seed, candidates.toArrow(), out, job.key, measured, sources)
    return chosen.join(spark.createDataFrame(selection.select(["pair_id"])), "pair_id", "left_semi")


def label(job: Job, todo: DataFrame, total: int, count: int, what: str) -> None:
    """Label the `count` pairs `todo` that are missing of `total` ones."""
    log.info("annotate: %s: %d pairs, %d there already, %d to do (key %s)", what, total, total - count, count, job.key)
    if not count:
        return
    config, engines = job.config, min(job.config.engines, math.ceil(count / job.config.part_size))
    if todo.sparkSession.sparkContext.master.startswith("local"):
        config = config.model_copy(update={"engine": _with_threads(config.engine, engines)})
    job = replace(job, config=config, engines=engines, calibration=calibration_of(Path(job.out), job.key))
    _run(job, in_order(todo, max(engines, config.partitions)), count)


def sampling_of(config: AnnotateConfig, prompt: Prompt, tokenizer: Any) -> Sampling:
    """The sampling that a config asks of a teacher with this prompt and tokenizer: one token where the answer is opened."""
    return Sampling(
        n=config.n if config.temperature else 1,  # greedy samples of a prompt are all the same
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=1 if opened_answer(prompt, tokenizer) else config.max_tokens or prompt.max_completion_tokens,
        seed=config.seed,
        logprobs=answer_logprobs(prompt.scale.size),
    )


def annotation_key(teacher: Path, config: AnnotateConfig) -> str:
    """What an annotation depends on: teacher weights, prompt, sampling and scale; not the engine that ran it."""
    from transformers import AutoTokenizer

    fingerprint, prompt = read_json(teacher / TEACHER_FILE).get("fingerprint"), load_prompt(teacher)
    if not fingerprint:
        raise ContractError(f"{teacher / TEACHER_FILE} has no fingerprint: give the `model` folder of teacher-train")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    version, sampling = prompt.rendered_version(tokenizer), dict(vars(sampling_of(config, prompt, tokenizer)))
    del sampling["first"]  # every pair begins with 0
    if not config.temperature:  # the likeliest token, whatever these are
        sampling |= {"seed": 0, "top_p": 1.0}
    if config.adaptive:
        sampling |= {"n_max": config.n_max, "confidence": config.confidence}
    content = {"teacher": str(fingerprint), "prompt": version, "sampling": sampling, "reading": _READING}
    return digest(content | {"scale": prompt.scale.model_dump(mode="json")})


def unwrap_worker_error(error: Exception) -> Exception:
    """The one sentence of a `ContractError` raised in a worker, as what it was; any other error as it is."""
    text = str(error)
    raised = re.findall(r"(?m)^(?:.*Exception: )?data\.contracts\.errors\.(ContractError|Unavailable): (.+)", text)
    if raised:
        kind, sentence = raised[-1]
        return (Unavailable if kind == "Unavailable" else ContractError)(sentence.strip())
    if "Python worker exited unexpectedly" in text or "ExecutorLostFailure" in text:
        return ContractError(
            "a worker of the annotation job died (killed, or out of memory: try a smaller max_num_seqs, kv_cache_gib or "
            "max_model_len); run this again: finished annotations are kept"
        )
    return error


def _with_threads(engine: EngineConfig, engines: int) -> EngineConfig:
    """`engine` with its share of this machine's cores, unless its threads are set."""
    if not isinstance(engine, LocalEngine) or engine.threads:
        return engine
    cores = int(os.environ.get("OMP_NUM_THREADS") or 0) or len(os.sched_getaffinity(0))
    return engine.model_copy(update={"threads": max(1, cores // engines)})


def _run(job: Job, ordered: DataFrame, count: int) -> None:
    """Annotate `ordered` (`count` rows); returns when every part is committed."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException
    from pyspark.sql import functions as F

    try:
        with watched(_Progress(Path(job.out), job.key, count).log):
            parts = ordered.mapInArrow(partial(annotate_partition, job), "rows long")
            row = parts.agg(F.sum("rows").alias("rows")).first()
    except (PySparkException, Py4JJavaError) as error:  # which of them depends on where it came from
        raise unwrap_worker_error(error) from error
    if row is None or row["rows"] != count:
        raise RuntimeError(f"{row and row['rows']} rows were annotated, {count} expected")


def _check_shares(config: AnnotateConfig, metrics: dict[str, Any], reasons: Reasons) -> None:
    def counted(reasons: Counter[str]) -> str:
        return "; ".join(f"{number} × {reason}" for reason, number in reasons.most_common(5))

    pairs, failed, ok = metrics["pairs"], metrics["failed"], metrics["ok"]
    if failed > config.max_failed_share * pairs:
        raise ContractError(
            f"{failed} of {pairs} annotations failed, more than max_failed_share {config.max_failed_share:g} "
            f"({counted(reasons['failed'])}); mend the cause and run again with retry_failed=true"
        )
    if ok < config.min_ok_share * pairs:
        raise ContractError(
            f"only {ok} of {pairs} annotations have a grade, less than min_ok_share {config.min_ok_share:g} "
            f"({counted(reasons['unparsed'] + reasons['failed'])}); give the teacher a longer warm start "
            "(teacher.warm_start) or another base model (teacher.model), or its answers more room (max_tokens)"
        )


class _Progress:
    """Counts what has been committed since it was made."""

    def __init__(self, out: Path, key: str, total: int) -> None:
        self._out, self._key, self._total = out, key, total
        self._seen = set(files_of(out, key))
        self._done, self._bad, self._tokens = 0, 0, 0
        self._begin = time.monotonic()

    def log(self) -> None:
        """Read the files that are new, and say how far the job is."""
        new = set(files_of(self._out, self._key)) - self._seen
        if not new:
            return
        self._seen |= new
        rows = pads.dataset(list(map(str, new)), format="parquet").to_table(columns=["status", "completion_tokens"])
        self._done += rows.num_rows
        self._bad += pc.sum(pc.not_equal(rows["status"], "ok")).as_py()
        self._tokens += pc.sum(rows["completion_tokens"]).as_py()
        seconds = time.monotonic() - self._begin
        left = duration((self._total - self._done) * seconds / self._done)
        values = (self._done, self._total, self._bad, self._done / seconds, self._tokens / seconds, left)
        message = "annotate: %d of %d pairs (%d not ok), %.2f pairs/s, %.0f tokens/s, %s left"
        log_progress(log, self._done, self._total, message, *values)
