"""Tiny tables and models for the student's tests, made on the fly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import ANNOTATIONS, PAIRS, Grade, GradeScale, StageOutput
from student.config import ExportConfig, StudentConfig

THINGS = ("kettle", "sofa", "tent", "lamp", "phone", "bicycle")
COLOURS = ("red", "blue", "green", "black")


# Sizes of a tiny encoder of each family that is known to work, see `make_base`.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "bert": SIZES,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "electra": SIZES | {"embedding_size": 32},
    "ernie": SIZES,
    "albert": SIZES | {"embedding_size": 16},
    "nomic_bert": SIZES,
    "roberta": SIZES,
    "xlm-roberta": SIZES,
    "camembert": SIZES,
    "mpnet": SIZES,
    "deberta": SIZES,
    "deberta-v2": SIZES,
    "modernbert": SIZES,
    "qwen2": SIZES | {"num_key_value_heads": 2},
}
PADDED = {"deberta", "deberta-v2", "qwen2"}  # those that cannot read packed pairs


def make_rows(n_queries: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Four ads for each query; grade 2 = thing and colour, 1 = thing, 0 = neither. Splits take turns by query."""
    rng = np.random.default_rng(seed)
    splits = ("train", "pool", "valid", "test")
    rows = []
    for q in range(n_queries):
        thing, colour = THINGS[q % len(THINGS)], COLOURS[int(rng.integers(len(COLOURS)))]
        for a, grade in enumerate((2, 1, 0, 0)):
            other_thing = THINGS[(q + 1 + int(rng.integers(len(THINGS) - 1))) % len(THINGS)]
            other_colour = COLOURS[(COLOURS.index(colour) + 1) % len(COLOURS)]
            title = f"{colour if grade == 2 else other_colour} {thing if grade else other_thing} number {a}"
            rows.append(
                {
                    "pair_id": f"p{q:03d}{a}",
                    "query_id": f"q{q:03d}",
                    "query": f"{colour} {thing} q{q}",
                    "ad_title": title,
                    "ad_text": "free delivery" if a % 2 else None,
                    "attributes": [("colour", title.split()[0])] if a == 3 else None,
                    "grade": grade,
                    "grade_raw": float(grade),
                    "split": splits[q % 4],
                    "source": "synthetic" if q % 3 else "other",
                }
            )
    return rows


def write_pairs(folder: Path, rows: list[dict[str, Any]], grades: int = 3) -> Path:
    """A folder as data-prepare writes it."""
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    names = tuple(Grade(name=f"grade {i}", definition=f"definition {i}") for i in range(grades))
    GradeScale(grades=names, relevant_from=1).save(folder)
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), folder / "pairs" / "part-0.parquet")
    return folder


def annotation(pair_id: str, probs: list[float] | None, **over: Any) -> dict[str, Any]:
    """One annotation; without `probs` it is a failed one."""
    row = {
        "pair_id": pair_id,
        "annotation_key": "key-a",
        "grade": None if probs is None else int(np.argmax(probs)),
        "grade_probs": probs,
        "reasoning": "because",
        "votes": [],
        "agreement": None if probs is None else max(probs),
        "n_samples": 4,
        "n_unparsed": 0,
        "status": "ok" if probs else "failed",
        "error": "" if probs else "no answer",
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return row | over


def write_annotations(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=ANNOTATIONS), folder / "window-0.parquet")
    return folder


def annotate_pool(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A teacher that is right, and 80 % sure."""
    probs = {g: [0.8 if i == g else 0.1 for i in range(3)] for g in range(3)}
    return [annotation(row["pair_id"], probs[row["grade"]]) for row in rows if row["split"] == "pool"]


def make_base(kind: str, tiny: dict[str, Path], folder: Path) -> Path:
    """A tiny encoder of a family with random weights and the tokenizer of `tiny`."""
    import torch
    from transformers import AutoConfig, AutoModel

    vocabulary = AutoConfig.from_pretrained(tiny["base"]).vocab_size
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, pad_token_id=0, **FAMILIES[kind])
    for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 2)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    for file in tiny["base"].glob("token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders `pairs`, `annotations` and `base` (a random encoder: hidden 32, 2 layers)."""
    from student.scratch import make_encoder

    root = tmp_path_factory.mktemp("student")
    rows = make_rows()
    pairs = write_pairs(root / "pairs", rows)
    annotations = write_annotations(root / "annotations", annotate_pool(rows))
    base = make_encoder(pairs, root / "base", "tiny", seed=0)
    return {"pairs": pairs, "annotations": annotations, "base": base}


@pytest.fixture(scope="session")
def quick() -> Callable[..., StudentConfig]:
    """Settings of a training that takes a second."""

    def make(**over: Any) -> StudentConfig:
        values = {"epochs": 2, "bootstrap_samples": 100, "max_length": 32, "batch_size": 16, "learning_rate": 3e-3}
        return StudentConfig(**(values | {"gold_only_baseline": False, "device": "cpu"} | over))

    return make


@pytest.fixture(scope="session")
def distilled(
    tiny: dict[str, Path], quick: Callable[..., StudentConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output of one finished distill stage, with the gold-only baseline."""
    from student.distill import distill

    out = tmp_path_factory.mktemp("distilled")
    distill(quick(gold_only_baseline=True, epochs=6), tiny["base"], tiny["pairs"], tiny["annotations"], out)
    return out


@pytest.fixture(scope="session")
def exported(
    distilled: Path, tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StageOutput]:
    """The folder of that student's export in every precision, and the stage's result."""
    from student.export import export_student

    out = tmp_path_factory.mktemp("export")
    config = ExportConfig(max_int8_auc_loss=0.2, max_decisions_changed=0.2, threads=1, fp16=True)
    return out, export_student(config, distilled / "model", tiny["pairs"], out)
