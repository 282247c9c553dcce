"""The cascade: an exported student grades the pairs that it is sure of, and the teacher the others.

How sure is enough is chosen on labelled pairs of `valid` that both have graded. The student's rows are under the teacher's
key, name their annotator, and are made anew whenever the student or its limit changes; the teacher's rows stay.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from pydantic import BaseModel

from data.contracts import ANNOTATIONS, PAIRS, read_annotations, read_json, read_table, write_json
from pipeline.annotation.metrics import annotated
from pipeline.annotation.store import commit, drop, part_path
from pipeline.annotation.worker import Job

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)
Array = np.ndarray
_HASHES = 10_000
_LIMITS = 50  # that are tried: each further one can end the search by luck


@dataclass(frozen=True)
class Scores:
    """Where an exported student's `SCORES` lie, and its version; the folder can have those of other versions too."""

    folder: Path
    version: str

    def table(self, spark: SparkSession) -> DataFrame:
        """The rows of this version."""
        from pyspark.sql import functions as F

        return spark.read.parquet(str(self.folder)).where(F.col("model_version") == self.version)


class Limit(BaseModel):
    """Pairs of which the student's likeliest grade has this `probability` need no teacher.

    On the `rows` it was chosen on, they are the `share`, and the annotations' accuracy is lower by `loss`.
    """

    probability: float = 2.0
    share: float = 0.0
    loss: float = 0.0
    rows: int = 0


def choose_limit(
    probability: Array, student_right: Array, teacher_right: Array, max_loss: float, confidence: float
) -> Limit:
    """A limit at which the student in the teacher's stead costs at most `max_loss` of accuracy, with `confidence`.

    Parameters: of N labelled pairs the probability (N,) of the student's likeliest grade, and whether student and teacher
    are right, bool (N,). Limits are tried from the surest pairs on, until the first that fails: the best of many would
    promise too much (fixed sequence testing: Angelopoulos and others, Learn then Test, arXiv 2110.01052). A limit's cost is
    the mean of the isotonic fit, which falls as the probability rises, with a normal bound and − ln(1 − confidence) / N, by
    which the truth may be worse where no loss was seen at all (the rule of three): with fewer pairs than that term and
    `max_loss` allow, none is spared.
    """
    from scipy.stats import norm
    from sklearn.isotonic import IsotonicRegression

    n = len(probability)
    if not n:
        return Limit()
    cost = teacher_right.astype(float) - student_right
    order = np.argsort(-probability, kind="stable")
    smooth = IsotonicRegression(increasing=False).fit_transform(probability, cost)[order]
    ordered = probability[order]
    tried = np.flatnonzero(np.r_[ordered[1:] < ordered[:-1], True])  # the last of equals
    tried = (
        tried[np.unique(np.linspace(0, len(tried), _LIMITS + 1).astype(int)[1:] - 1)] if len(tried) > _LIMITS else tried
    )
    mean = np.cumsum(smooth) / n
    error = np.sqrt(np.maximum(np.cumsum(cost[order] ** 2) / n - mean**2, 0) / n)
    worst = (mean + norm.ppf(confidence) * error - np.log(1 - confidence) / n)[tried]
    passed = int(np.argmax(np.r_[worst > max_loss + 1e-9, True]))
    if not passed:
        return Limit(rows=n)
    count = int(tried[passed - 1]) + 1
    below = ordered[count] if count < n else 0.0
    loss = float(cost[order][:count].sum() / n)
    return Limit(probability=float(ordered[count - 1] + below) / 2, share=count / n, loss=loss, rows=n)


def spare(job: Job, chosen: DataFrame, scores: Scores | None, pairs: Path, ids: Sequence[str]) -> Limit | None:
    """Write the student's rows of the pairs `chosen` that it is sure of, but for those that the teacher grades to check it.

    `ids` are pairs of valid that the teacher has graded. None where the settings ask for no cascade: then the rows of an
    earlier one are dropped, so that the teacher grades these pairs.
    """
    from pyspark.sql import functions as F

    config, spark = job.config.cascade, chosen.sparkSession
    if scores is None or not config.max_loss:
        _drop(job)
        return None
    table = scores.table(spark)
    limit = choose_limit(*_on_valid(job, table, pairs, ids), config.max_loss, config.confidence)
    message = (
        "annotate: the student grades pairs from probability %.3f on: %.0f %% of valid, for %.4f of accuracy there"
    )
    log.info(message, limit.probability, 100 * limit.share, limit.loss)
    if limit.rows < config.pairs_needed:
        log.warning(
            "annotate: the student grades nothing: for a loss of %g it takes %d labelled pairs of valid, and there are %d; "
            "raise annotate.cascade.max_loss, or label more",
            *(config.max_loss, config.pairs_needed, limit.rows),
        )
    state = {"student": scores.version, "limit": limit.probability, "checked": config.checked}
    note = _note(job)
    if not note.exists() or read_json(note) != state:
        _drop(job)
        write_json(note, state)
    checked = F.pmod(F.xxhash64("pair_id"), F.lit(_HASHES)) < round(config.checked * _HASHES)
    sure = table.where((F.array_max("grade_probs") >= limit.probability) & ~checked).select("pair_id", "grade_probs")
    todo = sure.join(chosen.select("pair_id").distinct(), "pair_id", "left_semi")
    todo = todo.join(annotated(spark, Path(job.out), job.key).select("pair_id"), "pair_id", "left_anti")
    parts = todo.repartition(spark.sparkContext.defaultParallelism, "pair_id").sortWithinPartitions("pair_id")
    parts.mapInArrow(partial(_write, job, scores.version), "rows long").agg(F.sum("rows")).collect()
    return limit


def cascade_metrics(rows: DataFrame, scores: DataFrame, limit: Limit) -> dict[str, Any]:
    """Of the annotations `rows`, `n_spared` the teacher; what the limit cost on valid; and among the pairs above it that the
    teacher graded, `cascade_checked`, the share where it says otherwise, which no loss of accuracy exceeds."""
    from pyspark.sql import functions as F

    student_grade = (F.array_position("grade_probs", F.array_max("grade_probs")) - 1).alias("student_grade")
    sure = scores.where(F.array_max("grade_probs") >= limit.probability).select("pair_id", student_grade)
    checked = rows.where(F.col("annotator").isNull() & (F.col("status") == "ok")).join(sure, "pair_id")
    differ = F.avg((F.col("grade") != F.col("student_grade")).cast("double"))
    found = checked.agg(F.count("*").alias("n"), differ.alias("differ")).first()
    assert found is not None  # an aggregate without groups has one row
    metrics = {"n_spared": rows.where(F.col("annotator").isNotNull()).count(), "cascade_checked": found["n"]}
    metrics |= {"cascade_disagreement": found["differ"]} if found["n"] else {}
    return metrics | {f"cascade_valid_{name}": value for name, value in limit.model_dump(exclude={"rows"}).items()}


def _on_valid(job: Job, scores: DataFrame, pairs: Path, ids: Sequence[str]) -> tuple[Array, Array, Array]:
    """Of the pairs `ids`: the probability of the student's likeliest grade, and whether student and teacher are right."""
    from pyspark.sql import functions as F

    wanted = pads.field("pair_id").isin(pa.array(ids, pa.string()))
    labels = read_table(pairs / "pairs", PAIRS, columns=["pair_id", "grade"], where=wanted)
    human = dict(zip(labels["pair_id"].to_pylist(), labels["grade"].to_pylist(), strict=True))
    batches = read_annotations(Path(job.out), ["pair_id", "grade"], job.key, wanted)
    teacher = {row["pair_id"]: row["grade"] for batch in batches for row in batch.to_pylist()}
    probs = {row["pair_id"]: row["grade_probs"] for row in scores.where(F.col("pair_id").isin(list(ids))).collect()}
    both = [pair_id for pair_id in ids if pair_id in teacher and pair_id in probs]
    student = np.array([probs[pair_id] for pair_id in both]).reshape(len(both), -1)
    if not both:
        return np.zeros(0), np.zeros(0, bool), np.zeros(0, bool)
    truth = np.array([human[pair_id] for pair_id in both])
    graded = np.array([-1 if teacher[pair_id] is None else teacher[pair_id] for pair_id in both])
    return student.max(axis=1), student.argmax(axis=1) == truth, graded == truth


def _write(job: Job, version: str, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Commit the student's rows of one partition (pair_id, grade_probs); yields their number."""
    count = 0
    for batch in batches:
        ids, probs = batch["pair_id"].to_pylist(), batch["grade_probs"].to_pylist()
        path = part_path(Path(job.out), job.key, ids)
        count += len(ids)
        if ids and not path.exists():
            commit(path, student_rows(job.key, version, ids, probs), job.run)
    yield pa.RecordBatch.from_pydict({"rows": [count]})


def student_rows(key: str, version: str, pair_ids: Sequence[str], probs: Sequence[Sequence[float]]) -> pa.Table:
    """`ANNOTATIONS` of a student's probabilities: no votes, no samples, no tokens and no reason."""
    now = datetime.now(UTC)
    empty = {"votes": [], "n_samples": 0, "n_unparsed": 0, "prompt_tokens": 0, "completion_tokens": 0, "error": ""}
    row = {"annotation_key": key, "status": "ok", "created_at": now, "annotator": version} | empty
    rows = [
        row | {"pair_id": pair_id, "grade": int(np.argmax(each)), "grade_probs": each, "grade_probs_raw": each}
        for pair_id, each in zip(pair_ids, probs, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=ANNOTATIONS)


def _drop(job: Job) -> None:
    """Drop the student's rows. The note goes last, as it says that there can be some."""
    if (note := _note(job)).exists():
        drop(Path(job.out), job.key, job.run, pc.field("annotator").is_valid())
        note.unlink()


def _note(job: Job) -> Path:
    return Path(job.out) / f"_cascade-{job.key}.json"
