"""Pairs, tiny teachers and recorded completions for the annotation job."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.replay import make_teacher
from data.contracts import PAIRS, Grade, GradeScale
from teacher.config import PromptConfig
from teacher.prompt import Prompt, save_prompt
from teacher.scratch import make_decoder

SCALE = GradeScale(grades=tuple(Grade(name=f"g{i}", definition="d") for i in range(4)), relevant_from=2)


def write_pairs(folder: Path, rows: list[dict]) -> Path:
    """A table of pairs as data-prepare leaves it."""
    (folder / "pairs").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), folder / "pairs" / "part.parquet")
    SCALE.save(folder)
    return folder


def tiny_teacher(pairs: Path, folder: Path, prompt: PromptConfig | None = None, max_completion_tokens: int = 8) -> Path:
    """An untrained teacher that knows the words of `pairs`."""
    make_decoder(pairs, folder, "tiny", 0)
    prompt = prompt or PromptConfig()
    save_prompt(Prompt(prompt, SCALE, max_completion_tokens=max_completion_tokens), folder, fingerprint="f1")
    return folder


def replayed(teacher: Path, texts: list[str], folder: Path, **how: object) -> Path:
    """A teacher that answers with these completions instead, see `benchmarks.replay`."""
    sample = {"token_ids": [5, 6, 1], "finish_reason": "stop", "top_logprobs": None}
    recording = folder.with_suffix(".jsonl")
    recording.write_text("".join(json.dumps([sample | {"text": text}]) + "\n" for text in texts))
    return make_teacher(teacher, recording, folder, **how)
