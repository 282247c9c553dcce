"""The annotation job's part that runs in Spark's Python workers: windows of pairs through an engine, each committed.

Light to import: the environment that torch reads when it loads is set here first.
"""

from __future__ import annotations

import errno
import glob
import io
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.schema import ANNOTATIONS, ContractError
from pipeline.artifacts import digest
from teacher.engines.base import Completion, Engine, EngineConfig, Sampling

log = logging.getLogger(__name__)

TEMPORARY = "_tmp-"
# What a window returns to Spark; the rows themselves go to their file.
SUMMARY = pa.schema([("rows", pa.int64()), ("seconds", pa.float64())])
# So many pairs that all fail alike are the engine's fault, not the pairs'.
_ENGINE_BROKEN_FROM = 8


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; plain values, as it travels to other machines. `teacher` and `out` are folders."""

    key: str
    teacher: str
    out: str
    engine: EngineConfig
    sampling: Sampling
    window: int
    engines: int


@dataclass(frozen=True)
class Teacher:
    """A teacher as loaded in a worker: the engine, and what turns pairs into prompts and completions into grades."""

    engine: Engine
    tokenizer: Any
    prompt: Any
    reader: Any
    num_grades: int


_loaded: dict[str, Teacher] = {}  # one for a worker's life, whichever partitions it is given


def annotate_partition(job: Job, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Annotate one partition; yields one `SUMMARY` row for each committed window."""
    for rows in windows(batches, job.window):
        start = time.monotonic()
        path = window_path(job, [row["pair_id"] for row in rows])
        # A task that Spark tries again finds what its first try had committed.
        if not path.exists():
            commit(path, annotate_rows(job, load_teacher(job), rows))
        yield pa.RecordBatch.from_pydict({"rows": [len(rows)], "seconds": [time.monotonic() - start]}, SUMMARY)


def windows(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of `batches` in lists of `size` (the last may be shorter); at most one Arrow batch more is held."""
    held: list[dict[str, Any]] = []
    for batch in batches:
        held += batch.to_pylist()
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held:
        yield held


def window_path(job: Job, pair_ids: Sequence[str]) -> Path:
    """A window's file: its name follows from the key and the pairs, so that the same window is never there twice."""
    return Path(job.out) / f"{job.key}-{digest(sorted(pair_ids))}.parquet"


def commit(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `ANNOTATIONS` rows so that the file is there complete or not at all."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=ANNOTATIONS), buffer, compression="zstd")
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ContractError(
                f"the disk of {path.parent} is full; free some space and run this again: finished windows are kept"
            ) from error
        raise


def load_teacher(job: Job) -> Teacher:
    """The teacher of this worker, started when the first window needs it."""
    name = digest([job.teacher, job.key, job.engine.model_dump(mode="json")])
    if name not in _loaded:
        for other in list(_loaded):  # of an earlier job in the same session: two engines would not fit
            _loaded.pop(other).engine.close()
        _loaded[name] = _start_teacher(job)
    return _loaded[name]


def _start_teacher(job: Job) -> Teacher:
    # Read by the OpenMP runtime when torch loads it; Spark sets one thread, and spinning threads starve each other.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    if job.engine.threads:
        os.environ["OMP_NUM_THREADS"] = str(job.engine.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the teacher is a complete folder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _choose_gpu(job.engines)
    from transformers import AutoTokenizer

    from pipeline.votes import AnswerReader
    from teacher.engines.base import open_engine
    from teacher.prompt import load_prompt

    folder = Path(job.teacher)
    prompt = load_prompt(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reader = AnswerReader(tokenizer, prompt.scale.size)
    return Teacher(open_engine(job.engine, folder), tokenizer, prompt, reader, prompt.scale.size)


def _choose_gpu(engines: int) -> None:
    """Give this worker the GPU that Spark assigned to its task or, without that, the one of its partition's number."""
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is None:
        return
    assigned = context.resources().get("gpu")
    if assigned is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(assigned.addresses)
        return
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = listed.split(",") if listed else [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    if engines > 1 and len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[context.partitionId() % len(gpus)]


def annotate_rows(job: Job, teacher: Teacher, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One `ANNOTATIONS` row for each row of `rows` (columns of `PAIRS`), in their order; a bad pair is a failed row.

    Raises `ContractError` when the engine fails on every pair of a window that is not tiny.
    """
    prompts: list[tuple[int, ...] | str] = [_prompt(job, teacher, row) for row in rows]
    # Pairs that differ only in what the prompt leaves out are generated once.
    unique = list(dict.fromkeys(prompt for prompt in prompts if not isinstance(prompt, str)))
    results = dict(
        zip(unique, _generate(teacher.engine, [list(prompt) for prompt in unique], job.sampling), strict=True)
    )
    broken = [result for result in results.values() if isinstance(result, str)]
    if len(broken) >= _ENGINE_BROKEN_FROM and len(broken) == len(results):
        raise ContractError(f"the engine failed on all {len(broken)} prompts of a window: {broken[0]}")
    now = datetime.now(UTC)
    return [
        _row(job, teacher, row["pair_id"], prompt, prompt if isinstance(prompt, str) else results[prompt], now)
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def _prompt(job: Job, teacher: Teacher, row: dict[str, Any]) -> tuple[int, ...] | str:
    """A pair's prompt, or the reason why it has none."""
    try:
        attributes = dict(row["attributes"]) if row["attributes"] else None
        ids = teacher.prompt.ids(teacher.tokenizer, row["query"], row["ad_title"], row["ad_text"], attributes)
    except Exception as error:  # whatever a hostile text sets off is that pair's failure
        return f"prompt: {type(error).__name__}: {error}"
    limit = teacher.engine.max_model_len
    if len(ids) + job.sampling.max_tokens > limit:
        return f"too long: {len(ids)} prompt tokens and {job.sampling.max_tokens} for the answer exceed {limit}"
    return tuple(ids)


def _generate(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion] | str]:
    """Completions for each prompt, or the error of a prompt that the engine refuses, found by halving the batch."""
    if not prompts:
        return []
    try:
        return list(engine.generate(prompts, sampling))
    except ContractError:
        raise
    except Exception as error:
        if len(prompts) == 1:
            return [f"engine: {type(error).__name__}: {error}"]
        log.warning("the engine failed on %d prompts, trying halves: %s", len(prompts), error)
    middle = len(prompts) // 2
    return _generate(engine, prompts[:middle], sampling) + _generate(engine, prompts[middle:], sampling)


def _row(
    job: Job,
    teacher: Teacher,
    pair_id: str,
    prompt: tuple[int, ...] | str,
    result: list[Completion] | str,
    now: datetime,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "pair_id": pair_id,
        "annotation_key": job.key,
        "votes": [],
        "n_samples": 0,
        "n_unparsed": 0,
        "status": "failed",
        "error": "",
        "prompt_tokens": 0 if isinstance(prompt, str) else len(prompt),
        "completion_tokens": 0,
        "created_at": now,
    }
    if isinstance(result, str):
        return row | {"error": result[:500]}
    from pipeline.votes import combine

    outcome = combine([teacher.reader.read(completion) for completion in result], teacher.num_grades)
    return row | {
        "grade": outcome.grade,
        "grade_probs": outcome.probs,
        "reasoning": outcome.reasoning,
        "votes": outcome.votes,
        "agreement": outcome.agreement,
        "n_samples": len(result),
        "n_unparsed": outcome.n_unparsed,
        "status": "unparsed" if outcome.grade is None else "ok",
        "error": "" if outcome.votes else _no_grade(result, job.sampling.max_tokens),
        "completion_tokens": sum(len(completion.token_ids) for completion in result),
    }


def _no_grade(completions: Sequence[Completion], max_tokens: int) -> str:
    cut = sum(completion.finish_reason == "length" for completion in completions)
    return f"no grade in {len(completions)} samples, of which {cut} were cut off at {max_tokens} tokens"


def with_threads(engine: EngineConfig, engines: int, local: bool) -> EngineConfig:
    """`engine` with its share of this machine's cores, unless its threads are set or the workers are elsewhere."""
    if engine.threads or not local:
        return engine
    cores = int(os.environ.get("OMP_NUM_THREADS") or 0) or len(os.sched_getaffinity(0))
    return engine.model_copy(update={"threads": max(1, cores // engines)})


def greedy_once(sampling: Sampling) -> Sampling:
    """Greedy samples of a prompt are all the same: one is enough."""
    return replace(sampling, n=1) if sampling.temperature == 0 else sampling
