"""A teacher that replays recorded completions, so that the annotation job can be measured without its engine.

    python -m benchmarks.replay TEACHER PAIRS RECORDING [--prompts 512]

records completions of a real teacher under vLLM. `make_teacher` puts a recording into a teacher's folder, `make_pairs` makes
a pool of any size, and `load_replay` is what the job then loads in its workers: everything else is the product's own code. A
prompt gets the recorded completions that its hash points at, so equal prompts get equal answers in every run. A recording
must hold as many samples of a prompt as the job may ask for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.annotation.worker import Job
from pipeline.rows import Row
from teacher.annotator import Annotator
from teacher.engines import open_engine
from teacher.engines.base import Completion, Engine, Result, Sampling
from teacher.engines.config import VLLMConfig

RECORDING = "recording.jsonl"
_OPTIONS = "replay.json"


class ReplayEngine(Engine):
    """See `Engine`. `pairs_per_s` 0 answers at once, otherwise it is the speed in requests.

    `log` is a folder where every process notes the prompts of which it completed the first samples.
    """

    max_model_len = 1_000_000

    def __init__(self, recorded: list[list[Completion]], pairs_per_s: float, log: str) -> None:
        self._recorded = recorded
        self._pairs_per_s = pairs_per_s
        self._log = Path(log) / f"{os.getpid()}-{time.time_ns()}.log" if log else None
        self._queue: list[tuple[Any, list[int], Sampling]] = []

    def submit(self, tag: Any, prompt: list[int], sampling: Sampling) -> None:
        """See `Engine.submit`."""
        self._queue.append((tag, prompt, sampling))

    def finished(self) -> list[tuple[Any, Result]]:
        """See `Engine.finished`: all that is queued, or a twentieth of a second's worth of it."""
        if self._pairs_per_s:
            self._queue.sort(key=lambda request: request[2].first == 0)
        batch = self._queue
        if self._pairs_per_s:
            batch = batch[: max(1, round(self._pairs_per_s / 20))]
            time.sleep(len(batch) / self._pairs_per_s)
        self._queue = self._queue[len(batch) :]
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(prompt)}\n" for _, prompt, sampling in batch if not sampling.first))
        recorded, count = self._recorded, len(self._recorded)
        return [
            (tag, recorded[hash(tag) % count][sampling.first : sampling.first + sampling.n])
            for tag, _, sampling in batch
        ]

    def cancel(self) -> None:
        """See `Engine.cancel`."""
        self._queue = []

    def close(self) -> None:
        """Nothing to free."""


def make_teacher(
    teacher: Path, recording: Path, out: Path, *, prompts: bool = False, pairs_per_s: float = 0.0, log: str = ""
) -> Path:
    """A copy of a teacher's folder, without its weights, that `load_replay` can load.

    prompts: render and tokenise every pair as a real engine needs it; without, a pair's id stands for its prompt.
    """
    shutil.copytree(teacher, out, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copyfile(recording, out / RECORDING)
    options = {"prompts": prompts, "pairs_per_s": pairs_per_s, "log": log}
    (out / _OPTIONS).write_text(json.dumps(options), encoding="utf-8")
    return out


def load_replay(job: Job) -> Annotator:
    """The teacher of a folder that `make_teacher` made."""
    from transformers import AutoTokenizer

    from teacher.prompt import PromptWriter, load_prompt
    from teacher.reading import AnswerReader

    folder = Path(job.teacher)
    options = json.loads((folder / _OPTIONS).read_text(encoding="utf-8"))
    recorded = [
        [completion_of(sample) for sample in json.loads(line)]
        for line in (folder / RECORDING).read_text(encoding="utf-8").splitlines()
    ]
    prompt = load_prompt(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = ReplayEngine(recorded, options["pairs_per_s"], options["log"])
    writer = PromptWriter(prompt, tokenizer) if options["prompts"] else ids_as_prompts
    return Annotator(engine, writer, AnswerReader(tokenizer, prompt.scale.size))


def ids_as_prompts(rows: Sequence[Row]) -> list[list[int] | str]:
    """A pair's id, a hash, as its prompt."""
    return [[int(row["pair_id"], 16)] for row in rows]


def record(teacher: Path, pairs: Path, out: Path, count: int, sampling: Sampling) -> None:
    """Write the completions of the first `count` pairs of the pool, one JSON line for each pair."""
    from transformers import AutoTokenizer

    from teacher.prompt import PromptWriter, load_prompt

    writer = PromptWriter(load_prompt(teacher), AutoTokenizer.from_pretrained(teacher))
    prompts = []
    for ids in writer(pool_rows(pairs, count)):
        if isinstance(ids, str):
            raise SystemExit(f"a pair has no prompt ({ids}): the lines would not be those of the pool")
        prompts.append(ids)
    engine = open_engine(VLLMConfig(max_model_len=512), teacher)
    made = engine.generate(prompts, sampling)
    engine.close()
    lines = [json.dumps([asdict(sample) for sample in samples], ensure_ascii=False) for samples in made]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def pool_rows(pairs: Path, count: int) -> list[Row]:
    """The first `count` pairs of the pool by id, as the annotation job hands them to a `PromptWriter`."""
    import pyarrow.dataset as pads

    from data.contracts import PAIRS, read_table

    table = read_table(pairs / "pairs", PAIRS, where=pads.field("split") == "pool").sort_by("pair_id")
    return table.slice(0, count).to_pylist()


def make_pairs(spark: Any, size: int, out: Path) -> None:
    """A pool of `size` different pairs of about the length of a search ad's texts."""
    from pyspark.sql import functions as F

    known = ("red", "blue", "green", "running", "hiking", "shoes", "boots", "tent", "sofa", "lamp", "kettle")
    words = F.array(*[F.lit(word) for word in known])

    def word(salt: int) -> Any:
        return F.element_at(words, (F.abs(F.hash("id", F.lit(salt))) % F.lit(11)).cast("int") + 1)

    query = F.concat_ws(" ", word(1), word(2), (F.col("id") % 100_000).cast("string"))
    table = spark.range(size).select(
        F.substring(F.sha2(F.col("id").cast("string"), 256), 1, 20).alias("pair_id"),
        F.substring(F.sha2(query, 256), 1, 20).alias("query_id"),
        query.alias("query"),
        F.concat_ws(" ", word(3), word(4), word(5), F.lit("best price"), F.col("id").cast("string")).alias("ad_title"),
        F.lit("Order today and get it within two days.").alias("ad_text"),
        F.lit(None).cast("map<string,string>").alias("attributes"),
        F.lit(None).cast("int").alias("grade"),
        F.lit(None).cast("double").alias("grade_raw"),
        F.lit("pool").alias("split"),
        F.lit("made-up").alias("source"),
    )
    table.write.parquet(str(out / "pairs"))


def completion_of(recorded: dict[str, Any]) -> Completion:
    """A completion as `record` wrote it."""
    top = recorded["top_logprobs"]
    steps = None if top is None else [{int(token): value for token, value in step.items()} for step in top]
    return Completion(recorded["text"], recorded["token_ids"], recorded["finish_reason"], steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=4, help="completions of a prompt")
    options = parser.parse_args()
    sampling = Sampling(n=options.samples, temperature=1.0, max_tokens=64, logprobs=8)
    record(options.teacher, options.pairs, options.recording, options.prompts, sampling)


if __name__ == "__main__":
    main()
