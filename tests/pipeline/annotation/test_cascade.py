"""The cascade: which pairs a student grades in the teacher's stead, and what becomes of its rows."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data.contracts import ANNOTATIONS, PAIRS, SCORES, read_table
from pipeline.annotation.calibration import Calibration, calibrated
from pipeline.annotation.cascade import Scores, cascade_metrics, choose_limit, spare
from pipeline.annotation.config import AnnotateConfig, CascadeConfig
from pipeline.annotation.metrics import annotated
from pipeline.annotation.plan import chosen_pairs
from pipeline.annotation.store import commit, part_path, take_over
from pipeline.annotation.worker import Job, start_annotator
from student.dataset import read_annotated
from teacher.engines.base import Sampling

KEY = "0123456789abcdef"
VALID, POOL, CHECKED = 60, 40, 0.25


def simulated(n: int, seed: int, teacher: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A calibrated student, and a teacher that is right with probability `teacher`."""
    rng = np.random.default_rng(seed)
    probability = rng.uniform(0.4, 1, n)
    return probability, rng.random(n) < probability, rng.random(n) < teacher


@pytest.mark.parametrize(("teacher", "share"), [(0.95, 0.26), (0.8, 0.67), (0.6, 1.0)])
def test_the_loss_on_other_pairs_is_within_what_was_allowed(teacher: float, share: float) -> None:
    losses, shares = [], []
    for seed in range(40):
        limit = choose_limit(*simulated(2000, seed, teacher), 0.01, 0.9)
        probability, student_right, teacher_right = simulated(20_000, 1000 + seed, teacher)
        spared = probability >= limit.probability
        losses.append(((teacher_right * 1.0 - student_right) * spared).mean())
        shares.append(spared.mean())
    assert np.mean(np.array(losses) <= 0.01) >= 0.9
    # Where ∫ (teacher − p) dp / 0.6 from the limit to 1 is 0.01: 0.28, 0.71 and all; fewer, as it must be sure.
    assert np.mean(shares) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("n", [20, 200, 500, 3000])
def test_few_labelled_pairs_spare_less_and_the_promise_holds(n: int) -> None:
    """The student errs with probability 0.3 (1 − p) where the teacher is right: a share of 0.18 costs just max_loss."""
    rng, shares, above = np.random.default_rng(n), [], []
    for _ in range(200):
        probability = rng.random(n)
        wrong = rng.random(n) < 0.3 * (1 - probability)
        limit = choose_limit(probability, ~wrong, np.ones(n, bool), 0.005, 0.9)
        shares.append(limit.share)
        above.append(0.15 * max(0.0, 1 - limit.probability) ** 2 > 0.005)
    assert np.mean(above) <= 0.1
    assert np.mean(shares) <= {20: 0.0, 200: 0.0, 500: 0.12, 3000: 0.18}[n]
    assert n < 3000 or np.mean(shares) > 0.12


def test_a_student_that_errs_nowhere_spares_all_once_there_are_pairs_enough() -> None:
    right = np.ones(470, bool)
    probability = np.linspace(0.5, 1, 470)
    assert choose_limit(probability[:450], right[:450], right[:450], 0.005, 0.9).share == 0
    assert choose_limit(probability, right, right, 0.005, 0.9).share == 1


def test_a_student_that_is_never_right_spares_nothing() -> None:
    probability, _, right = simulated(500, 0, 0.9)
    assert choose_limit(probability, np.zeros(500, bool), right, 0.005, 0.9).share == 0
    nothing = choose_limit(np.zeros(0), np.zeros(0, bool), np.zeros(0, bool), 0.005, 0.9)
    assert nothing.probability > 1


def teacher_rows(pair_ids: list[str]) -> pa.Table:
    row = {"annotation_key": KEY, "grade": 0, "grade_probs": [0.6, 0.4], "grade_probs_raw": [0.6, 0.4], "votes": [0]}
    row |= {"agreement": 1.0, "n_samples": 1, "n_unparsed": 0, "status": "ok", "error": "", "prompt_tokens": 9}
    row |= {"completion_tokens": 9, "created_at": datetime(2026, 1, 1, tzinfo=UTC), "reasoning": "why"}
    return pa.Table.from_pylist([row | {"pair_id": pair_id} for pair_id in pair_ids], schema=ANNOTATIONS)


@pytest.fixture
def case(tmp_path: Path) -> SimpleNamespace:
    """All human grades are 0, and so are the teacher's. The student says 0 with 0.9, but 1 with 0.7 of every second pair."""
    ids = [f"v{i:04d}" for i in range(VALID)] + [f"p{i:04d}" for i in range(POOL)]
    texts = {"query": "q", "ad_title": "a", "source": "s", "grade": 0}
    rows = [texts | {"pair_id": i, "query_id": i, "split": "valid" if i[0] == "v" else "pool"} for i in ids]
    probs = [[0.3, 0.7] if int(i[1:]) % 2 else [0.9, 0.1] for i in ids]
    pairs, out = tmp_path / "data", tmp_path / "out"
    for folder in (pairs / "pairs", out / "_scores"):
        folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), pairs / "pairs" / "part.parquet")
    for version in ("one", "two"):
        columns = {"pair_id": ids, "p_relevant": [p[1] for p in probs], "grade_probs": probs}
        scores = pa.table(columns | {"model_version": [version] * len(ids)}, schema=SCORES)
        pq.write_table(scores, out / "_scores" / f"{version}.parquet")
    run = take_over(out)
    before = [*ids[:VALID], "p0001"]
    commit(part_path(out, KEY, before), teacher_rows(before), run)
    return SimpleNamespace(pairs=pairs, out=out, run=run, valid=ids[:VALID], before=before)


@pytest.mark.spark
def test_the_student_s_rows_follow_the_student_and_the_teacher_s_stay(case: SimpleNamespace, spark: object) -> None:
    def cascade(version: str, max_loss: float = 0.05) -> list[dict]:
        settings = {"max_loss": max_loss, "checked": CHECKED}
        config = AnnotateConfig(student=Path("export"), cascade=CascadeConfig(**settings))
        job = Job(KEY, "teacher", str(case.out), case.run, config, Sampling(n=1, max_tokens=9), 1, start_annotator)
        scores = Scores(case.out / "_scores", version)
        limit = spare(job, chosen_pairs(spark, config, case.pairs), scores, case.pairs, case.valid)
        rows = read_table(case.out, ANNOTATIONS)
        assert rows.num_rows == len(set(rows["pair_id"].to_pylist()))
        assert set(case.before) <= set(rows.filter(pc.is_null(rows["annotator"]))["pair_id"].to_pylist())
        if limit is not None:
            assert limit.share == 0.5
            metrics = cascade_metrics(annotated(spark, case.out, KEY), scores.table(spark), limit)
            assert metrics["n_spared"] == rows.num_rows - len(case.before)
            assert (metrics["cascade_checked"], metrics["cascade_disagreement"]) == (VALID / 2, 0)
        return rows.filter(pc.is_valid(rows["annotator"])).to_pylist()

    first = cascade("one")
    assert all(int(row["pair_id"][1:]) % 2 == 0 and row["grade"] == 0 for row in first)
    assert 0.5 * POOL / 2 < len(first) < POOL / 2  # but for those that the teacher checks
    assert cascade("one") == first  # nothing is written again
    assert {row["annotator"] for row in cascade("two")} == {"two"}
    _, learned = read_annotated(case.out, KEY)
    assert [pair_id for pair_id, row in learned.items() if row.by_student] == [row["pair_id"] for row in first]
    table = read_table(case.out, ANNOTATIONS)
    mapped = calibrated(table, Calibration(method="temperature", temperature=2.0, offsets=[0.0, 0.0]))
    moved = {row["pair_id"]: row["grade_probs"] != row["grade_probs_raw"] for row in mapped.to_pylist()}
    assert moved == {row["pair_id"]: row["annotator"] is None for row in table.to_pylist()}
    assert cascade("two", max_loss=0) == []  # off: the teacher grades these pairs
