"""A run with pairs of hostile texts and annotations, made without a teacher."""

import csv
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import ANNOTATIONS, PAIRS, Grade, GradeScale
from pipeline.annotation.config import AnnotateConfig
from pipeline.artifacts import Recipe, StageOutput, run_stage
from pipeline.settings import PipelineConfig, load_preset

KEY = "0123456789abcdef"
SCALE = GradeScale(grades=[Grade(name=n, definition=f"{n} <&>") for n in ("no", "half", "full")], relevant_from=2)


def annotations(folder: Path, count: int, seed: int = 0) -> dict[str, bool]:
    """A table of `count` usable annotations; whether each is right, mostly where the votes agree."""
    rng, rows, right = np.random.default_rng(seed), [], {}
    for i in range(count):
        agreement = float(rng.choice([1.0, 0.75, 0.5], p=[0.7, 0.2, 0.1]))
        row = {"pair_id": f"p{i:05}", "annotation_key": KEY, "grade": int(rng.choice(3, p=[0.6, 0.3, 0.1]))}
        row |= {"agreement": agreement, "votes": [0], "n_samples": 4, "n_unparsed": 0, "status": "ok", "error": ""}
        row |= {"prompt_tokens": 1, "completion_tokens": 1, "created_at": datetime(2026, 1, 1, tzinfo=UTC)}
        rows.append(row | {"grade_probs": None, "reasoning": "because"})
        right[row["pair_id"]] = bool(rng.random() < agreement - 0.1)
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=ANNOTATIONS), folder / f"{KEY}-0.parquet")
    return right


@pytest.fixture
def settings(tmp_path: Path) -> PipelineConfig:
    """Of a run with pairs of hostile texts and annotations."""
    settings = load_preset("sample", ["run=tiny", f"runs={tmp_path}", "tracking.enabled=false"])
    annotations(settings.folder / "made", 300)
    recipe = Recipe("annotate", AnnotateConfig(), {})

    def work(out: Path) -> StageOutput:
        (settings.folder / "made" / f"{KEY}-0.parquet").rename(out / f"{KEY}-0.parquet")
        return StageOutput(fingerprint="f", figures={"annotation_key": KEY})

    run_stage(settings.folder / "annotations", recipe, work)
    pairs = settings.folder / "pairs"
    (pairs / "pairs").mkdir(parents=True)
    SCALE.save(pairs)
    row = {
        "query_id": "q",
        "query": "=1+1; \u2028 \x1b x",
        "ad_title": '@SUM(1) "a";b\r\n',
        "split": "pool",
        "source": "s",
    }
    rows = [row | {"pair_id": f"p{i:05}", "grade": i % 3, "attributes": [("size", "-1")]} for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), pairs / "pairs" / "part.parquet")
    return settings


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def answered(draw: Path, grade: str, rater: str = "anna", rows: int | None = None) -> Path:
    """The draw's sheet as it comes back, the first `rows` of it answered with `grade`."""
    path = draw.parent.parent / f"{rater}-{draw.name}.csv"
    given = [{"id": row["id"], "grade": grade, "rater": rater} for row in read(draw / "sheet.csv")[:rows]]
    with path.open("w", encoding="utf-8", newline="") as file:
        (writer := csv.DictWriter(file, ("id", "grade", "rater"))).writeheader()
        writer.writerows(given)
    return path
