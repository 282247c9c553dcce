"""The annotation job's part that runs in Spark's Python workers: a stream of pairs through an engine, committed in parts.

A worker keeps at most `window` pairs under way: started and not yet committed. Parts of a quarter of that go into the
engine one behind the other, so that it decodes without a pause from the first to the last pair of a partition, and each
part becomes a file as soon as its last pair is done. A kill loses what is under way, at most one window.
Light to import: the environment that torch reads when it loads is set here first.
"""

from __future__ import annotations

import gc
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data.contracts import ANNOTATIONS, ContractError, digest
from pipeline.annotation.store import commit, part_path
from teacher.engines.base import Completion, Engine, Result, Sampling
from teacher.engines.config import EngineConfig, LocalEngine
from teacher.reading import AnswerReader, Outcome, combine

# What a part returns to Spark; the rows themselves go to their file. `rows` are there now, `made` of them by this call.
SUMMARY = pa.schema([("rows", pa.int64()), ("made", pa.int64())])
PARTS_PER_WINDOW = 4
# So many prompts in a row on which the engine fails are the engine's fault, not the prompts'.
_ENGINE_BROKEN_FROM = 32

Row = dict[str, Any]
Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Teacher:
    """A teacher as loaded in a worker: the engine, and what turns pairs into prompts and completions into grades.

    `prompts` gives the token ids of each of some pairs, or the reason why a pair has none.
    """

    engine: Engine
    prompts: Callable[[Sequence[Row]], list[list[int] | str]]
    reader: AnswerReader
    num_grades: int


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; plain values, as it travels to other machines. `teacher` and `out` are folders.

    `run` owns `out` (see `annotate_commit`); `load` is named by its module, so that module must be installed there too.
    """

    key: str
    teacher: str
    out: str
    run: str
    engine: EngineConfig
    sampling: Sampling
    window: int
    engines: int
    load: Callable[[Job], Teacher]


class Answer(NamedTuple):
    """What became of one prompt: the outcome of its samples, or (without one) the error."""

    outcome: Outcome | None
    error: str
    prompt_tokens: int
    completion_tokens: int = 0
    n_samples: int = 0


@dataclass
class _Part:
    path: Path
    pair_ids: list[str]
    answers: list[Answer | None]
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.answers)


_loaded: dict[str, Teacher] = {}  # one for a worker's life, whichever partitions it is given


def annotate_partition(job: Job, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Annotate one partition; yields one `SUMMARY` row for each part that is there."""
    stream: Stream | None = None
    try:
        for rows in parts(batches, max(1, job.window // PARTS_PER_WINDOW)):
            path = part_path(Path(job.out), job.key, [row["pair_id"] for row in rows])
            # A task that Spark tries again finds what its first try had committed.
            if path.exists():
                yield _summary(len(rows), 0)
                continue
            if stream is None:
                stream = Stream(job, load_teacher(job))
            while stream.under_way and stream.under_way + len(rows) > job.window:
                yield from (_summary(count, count) for count in stream.advance())
            stream.put(path, rows)
        while stream is not None and stream.under_way:
            yield from (_summary(count, count) for count in stream.advance())
    finally:
        if stream is not None:
            stream.teacher.engine.cancel()  # the engine outlives the task


def parts(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[list[Row]]:
    """The rows of `batches` in lists of `size` (the last may be shorter); at most one Arrow batch more is held.

    `attributes` arrive as JSON (see `annotate_plan`) and leave as a list of entries with `key` and `value`, or None.
    """
    held: list[Row] = []
    for batch in batches:
        rows = batch.to_pylist()
        for row in rows:
            if row["attributes"] is not None:
                row["attributes"] = json.loads(row["attributes"])
        held += rows
        start = 0
        while len(held) - start >= size:
            yield held[start : start + size]
            start += size
        held = held[start:]
    if held:
        yield held


class Stream:
    """Parts on their way through a teacher. `under_way` counts the pairs that are started and not yet committed."""

    def __init__(self, job: Job, teacher: Teacher) -> None:
        self.teacher = teacher
        self.under_way = 0
        self._job = job
        self._waiting: dict[Prompt, list[tuple[_Part, int]]] = {}
        # Answers of late, in two generations of at most a window each.
        self._recent: dict[Prompt, Answer] = {}
        self._older: dict[Prompt, Answer] = {}
        self._done: list[_Part] = []
        self._failures = 0

    def put(self, path: Path, rows: Sequence[Row]) -> None:
        """Start a part (columns of `PAIRS`): its prompts go to the engine, each text once; a bad pair fails alone."""
        part = _Part(path, [row["pair_id"] for row in rows], [None] * len(rows))
        self.under_way += len(rows)
        job, engine = self._job, self.teacher.engine
        for place, made in enumerate(self.teacher.prompts(rows)):
            if isinstance(made, str):
                self._settle(part, place, Answer(None, f"prompt: {made}"[:500], 0))
                continue
            if len(made) + job.sampling.max_tokens > engine.max_model_len:
                asked = f"{len(made)} prompt tokens and {job.sampling.max_tokens} for the answer"
                error = f"too long: {asked} exceed {engine.max_model_len}"
                self._settle(part, place, Answer(None, error, len(made)))
                continue
            prompt = tuple(made)
            if (known := self._recent.get(prompt) or self._older.get(prompt)) is not None:
                self._settle(part, place, known)
            elif prompt in self._waiting:
                self._waiting[prompt].append((part, place))
            else:
                self._waiting[prompt] = [(part, place)]
                engine.submit(prompt, made, job.sampling)

    def advance(self) -> list[int]:
        """Work until at least one part is committed; the sizes of all that were.

        Raises `ContractError` when the engine fails on one prompt after the other, and what `commit` raises.
        """
        while not self._done:
            for prompt, result in self.teacher.engine.finished():
                answer = self._read(prompt, result)
                self._recent[prompt] = answer
                for part, place in self._waiting.pop(prompt):
                    self._settle(part, place, answer)
        if len(self._recent) > self._job.window:
            self._recent, self._older = {}, self._recent
        done, self._done = self._done, []
        for part in done:
            commit(part.path, table_of(self._job.key, part.pair_ids, part.answers), self._job.run)  # type: ignore[arg-type]
            self.under_way -= len(part.pair_ids)
        return [len(part.pair_ids) for part in done]

    def _settle(self, part: _Part, place: int, answer: Answer) -> None:
        part.answers[place] = answer
        part.left -= 1
        if not part.left:
            self._done.append(part)

    def _read(self, prompt: Prompt, result: Result) -> Answer:
        """Completions as votes at once: their tokens and log probabilities would fill the memory."""
        if isinstance(result, Exception):
            self._failures += 1
            error = f"engine: {type(result).__name__}: {result}"
            if self._failures >= _ENGINE_BROKEN_FROM:
                raise ContractError(f"the engine failed on {self._failures} prompts in a row, last with {error[:300]}")
            return Answer(None, error[:500], len(prompt))
        self._failures = 0
        outcome = combine([self.teacher.reader.read(completion) for completion in result], self.teacher.num_grades)
        error = "" if outcome.votes else _no_grade(result, self._job.sampling.max_tokens)
        tokens = sum([len(completion.token_ids) for completion in result])
        return Answer(outcome, error, len(prompt), tokens, len(result))


def table_of(key: str, pair_ids: Sequence[str], answers: Sequence[Answer]) -> pa.Table:
    """One `ANNOTATIONS` row for each pair, in their order."""
    outcomes = [answer.outcome for answer in answers]
    count = len(answers)
    columns = {
        "pair_id": pair_ids,
        "annotation_key": pa.repeat(key, count),
        "grade": [None if o is None else o.grade for o in outcomes],
        "grade_probs": [None if o is None else o.probs for o in outcomes],
        "reasoning": [None if o is None else o.reasoning for o in outcomes],
        "votes": [[] if o is None else o.votes for o in outcomes],
        "agreement": [None if o is None else o.agreement for o in outcomes],
        "n_samples": [answer.n_samples for answer in answers],
        "n_unparsed": [0 if o is None else o.n_unparsed for o in outcomes],
        "status": ["failed" if o is None else "unparsed" if o.grade is None else "ok" for o in outcomes],
        "error": [_storable(answer.error) for answer in answers],
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
        "completion_tokens": [answer.completion_tokens for answer in answers],
        "created_at": pa.repeat(pa.scalar(datetime.now(UTC), pa.timestamp("us", tz="UTC")), count),
    }
    return pa.table([pa.array(columns[field.name], field.type) if isinstance(columns[field.name], list)
                     else columns[field.name] for field in ANNOTATIONS], schema=ANNOTATIONS)  # fmt: skip


def _storable(text: str) -> str:
    # An error may quote what it failed on, and a lone surrogate is no UTF-8.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _no_grade(completions: Sequence[Completion], max_tokens: int) -> str:
    cut = sum(completion.finish_reason == "length" for completion in completions)
    return f"no grade in {len(completions)} samples, of which {cut} were cut off at {max_tokens} tokens"


def load_teacher(job: Job) -> Teacher:
    """The teacher of this worker, started when the first part needs it."""
    name = digest([job.teacher, job.key, job.engine.model_dump(mode="json")])
    if name not in _loaded:
        for other in list(_loaded):  # of an earlier job in the same session: two engines would not fit
            _loaded.pop(other).engine.close()
        _loaded[name] = job.load(job)
        # A teacher is many objects that stay, and a window many that soon go by themselves: there is little to collect.
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
    return _loaded[name]


def start_teacher(job: Job) -> Teacher:
    """The teacher of a folder over the engine that the job names; raises `ContractError` when it cannot be started."""
    # Read by the OpenMP runtime when torch loads it; Spark sets one thread, and spinning threads starve each other.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    if isinstance(job.engine, LocalEngine) and job.engine.threads:
        os.environ["OMP_NUM_THREADS"] = str(job.engine.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the teacher is a complete folder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _choose_gpu(job.engines)
    from transformers import AutoTokenizer

    from teacher.engines import open_engine
    from teacher.prompt import PromptWriter, load_prompt

    folder = Path(job.teacher)
    prompt = load_prompt(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reader = AnswerReader(tokenizer, prompt.scale.size)
    return Teacher(open_engine(job.engine, folder), PromptWriter(prompt, tokenizer), reader, prompt.scale.size)


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


def _summary(rows: int, made: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"rows": [rows], "made": [made]}, SUMMARY)
