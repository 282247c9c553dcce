"""The annotation job's part in Spark's Python workers: a stream of pairs through an engine, committed in parts.

A worker has at most `max_in_flight` pairs started and not yet committed. Parts of a quarter of that go into the engine one
behind the other, so that it decodes without a pause from the first pair of a partition to the last, and a part becomes a
file as soon as its last pair is done. A pair whose grade is undecided goes into the engine again, beside the others, for
further samples (see `stopping`). A kill loses what is in flight.
Light to import: the environment that torch reads when it loads is set here first.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data.contracts import ANNOTATIONS, ContractError, digest
from pipeline.annotation.calibration import Calibration, calibrated
from pipeline.annotation.config import AnnotateConfig
from pipeline.annotation.stopping import further_samples
from pipeline.annotation.store import commit, part_path
from pipeline.rows import Row, row_chunks
from pipeline.spark import use_assigned_gpu
from teacher.annotator import Annotator, open_annotator
from teacher.engines.base import Result, Sampling
from teacher.engines.config import LocalEngine
from teacher.reading import Aggregate, Sample, aggregate

_ENGINE_BROKEN_FROM = 32  # so many failures in a row are the engine's fault, not the prompts'
_NO_SAMPLES = aggregate([], 0)
Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; plain values, as it travels to other machines. `teacher` and `out` are folders.

    `run` owns `out` (see `store`); `engines` are at work on this job; `calibration` is that of the rows in `out`; `load` is
    named by its module, so that module must be installed there too.
    """

    key: str
    teacher: str
    out: str
    run: str
    config: AnnotateConfig
    sampling: Sampling
    engines: int
    load: Callable[[Job], Annotator]
    calibration: Calibration = field(default_factory=Calibration)


class Answer(NamedTuple):
    """What became of one prompt; the fields are columns of `ANNOTATIONS`, and so are those of `aggregate`."""

    status: str
    error: str
    prompt_tokens: int
    aggregate: Aggregate = _NO_SAMPLES
    n_samples: int = 0
    completion_tokens: int = 0


@dataclass
class _Part:
    path: Path
    pair_ids: list[str]
    answers: list[Any]
    unanswered: int


@dataclass
class _Waiting:
    """The places that wait for one prompt's answer, and its samples so far."""

    places: list[tuple[_Part, int]]
    samples: list[Sample] = field(default_factory=list)
    tokens: int = 0
    cut_off: int = 0


_loaded: dict[str, Annotator] = {}  # one for a worker's life, whichever partitions it is given


def annotate_partition(job: Job, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Annotate one partition; yields its number of `rows` when all of them are committed."""
    stream: Stream | None = None
    count = 0
    try:
        for rows in row_chunks(batches, job.config.part_size):
            count += len(rows)
            path = part_path(Path(job.out), job.key, [row["pair_id"] for row in rows])
            if path.exists():  # a task that Spark tries again finds what its first try had committed
                continue
            stream = stream or Stream(job, load_annotator(job))
            while stream.in_flight and stream.in_flight + len(rows) > job.config.max_in_flight:
                stream.advance()
            stream.put(path, rows)
        while stream is not None and stream.in_flight:
            stream.advance()
    finally:
        if stream is not None:
            stream.annotator.engine.cancel()  # the engine outlives the task
    yield pa.RecordBatch.from_pydict({"rows": [count]})


class Stream:
    """Parts on their way through a teacher. `in_flight` counts the pairs that are started and not yet committed."""

    def __init__(self, job: Job, annotator: Annotator) -> None:
        self.annotator = annotator
        self.in_flight = 0
        self._job = job
        self._waiting: dict[Prompt, _Waiting] = {}
        # Answers of late, in two generations of about `max_in_flight` each.
        self._recent: dict[Prompt, Answer] = {}
        self._older: dict[Prompt, Answer] = {}
        self._done: list[_Part] = []
        self._failures = 0

    def put(self, path: Path, rows: Sequence[Row]) -> None:
        """Start a part (columns of `PAIRS`): its prompts go to the engine, each text once; a bad pair fails alone."""
        part = _Part(path, [row["pair_id"] for row in rows], [None] * len(rows), len(rows))
        self.in_flight += len(rows)
        engine, sampling = self.annotator.engine, self._job.sampling
        for place, ids in enumerate(self.annotator.prompts(rows)):
            if isinstance(ids, str):
                self._settle(part, place, Answer("failed", f"prompt: {ids}"[:500], 0))
                continue
            prompt = tuple(ids)
            answer = self._recent.get(prompt) or self._older.get(prompt)
            if len(ids) + sampling.max_tokens > engine.max_model_len:
                needed = f"{len(ids)} prompt tokens and {sampling.max_tokens} for the answer"
                answer = Answer("failed", f"too long: {needed} exceed {engine.max_model_len}", len(ids))
            if answer is not None:
                self._settle(part, place, answer)
            elif prompt in self._waiting:
                self._waiting[prompt].places.append((part, place))
            else:
                self._waiting[prompt] = _Waiting([(part, place)])
                engine.submit(prompt, ids, sampling)

    def advance(self) -> None:
        """Work until at least one part is committed.

        Raises `ContractError` when the engine fails on one prompt after the other, and what `commit` raises.
        """
        while not self._done:
            for prompt, result in self.annotator.engine.finished():
                answer = self._read(prompt, result)
                if answer is None:  # it has further samples to come
                    continue
                self._recent[prompt] = answer
                for part, place in self._waiting.pop(prompt).places:
                    self._settle(part, place, answer)
        if len(self._recent) > self._job.config.max_in_flight:
            self._recent, self._older = {}, self._recent
        for part in self._done:
            table = table_of(self._job.key, part.pair_ids, part.answers)
            commit(part.path, calibrated(table, self._job.calibration), self._job.run)
            self.in_flight -= len(part.pair_ids)
        self._done = []

    def _settle(self, part: _Part, place: int, answer: Answer) -> None:
        part.answers[place] = answer
        part.unanswered -= 1
        if not part.unanswered:
            self._done.append(part)

    def _read(self, prompt: Prompt, result: Result) -> Answer | None:
        """The answer of a prompt with its new completions; None when its grade is undecided and it was submitted again.

        Completions are read at once: their tokens and log probabilities would fill the memory.
        """
        if isinstance(result, Exception):
            self._failures += 1
            error = f"engine: {type(result).__name__}: {result}"
            if self._failures >= _ENGINE_BROKEN_FROM:
                raise ContractError(f"the engine failed on {self._failures} prompts in a row, last with {error[:300]}")
            return Answer("failed", error[:500], len(prompt))
        self._failures = 0
        reader, waiting, config = self.annotator.reader, self._waiting[prompt], self._job.config
        waiting.samples += [self.annotator.read(completion) for completion in result]
        waiting.tokens += sum([len(completion.token_ids) for completion in result])
        waiting.cut_off += sum([completion.finish_reason != "stop" for completion in result])
        read, count = aggregate(waiting.samples, reader.num_grades), len(waiting.samples)
        if config.adaptive and (more := further_samples(read, count, config.n_max, config.confidence)):
            self.annotator.engine.submit(prompt, list(prompt), replace(self._job.sampling, n=more, first=count))
            return None
        status, error = "ok", ""
        if not read.votes:
            status, error = "unparsed", f"no grade in {count} samples"
            if waiting.cut_off and not self.annotator.opened:
                error += f", of which {waiting.cut_off} were cut off at {self._job.sampling.max_tokens} tokens"
        return Answer(status, error, len(prompt), read, count, waiting.tokens)


def table_of(key: str, pair_ids: Sequence[str], answers: Sequence[Answer]) -> pa.Table:
    """One `ANNOTATIONS` row for each pair, in their order, not calibrated yet."""
    columns: dict[str, Any] = dict(zip(Answer._fields, zip(*answers, strict=True), strict=True))
    columns |= zip(Aggregate._fields, zip(*columns["aggregate"], strict=True), strict=True)
    # An error may quote what it failed on, and a lone surrogate is no UTF-8.
    errors = [text if text.isascii() else text.encode("utf-8", "replace").decode() for text in columns["error"]]
    now = pa.scalar(datetime.now(UTC), ANNOTATIONS.field("created_at").type)
    columns |= {"annotation_key": pa.repeat(key, len(pair_ids)), "created_at": pa.repeat(now, len(pair_ids))}
    columns |= {"pair_id": pair_ids, "error": errors, "grade_probs_raw": columns["grade_probs"]}
    columns["annotator"] = pa.nulls(len(pair_ids))
    return pa.Table.from_pydict(columns, schema=ANNOTATIONS)


def load_annotator(job: Job) -> Annotator:
    """The teacher of this worker, started when the first part needs it."""
    name = digest([job.teacher, job.key, job.config.engine.model_dump(mode="json")])
    if name not in _loaded:
        for other in list(_loaded):  # of an earlier job in the same session: two engines would not fit
            _loaded.pop(other).engine.close()
        _loaded[name] = job.load(job)
        # A teacher is many objects that stay, and the pairs in flight many that soon go by themselves: little to collect.
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
    return _loaded[name]


def start_annotator(job: Job) -> Annotator:
    """The teacher of a folder over the engine that the job names; raises `ContractError` when it cannot be started."""
    # Read by the OpenMP runtime when torch loads it; Spark sets one thread, and spinning threads starve each other.
    os.environ.update(OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false")
    os.environ["HF_HUB_OFFLINE"] = "1"  # the teacher is a complete folder
    if isinstance(job.config.engine, LocalEngine) and job.config.engine.threads:
        os.environ["OMP_NUM_THREADS"] = str(job.config.engine.threads)
    use_assigned_gpu(job.engines)
    return open_annotator(Path(job.teacher), job.config.engine)
