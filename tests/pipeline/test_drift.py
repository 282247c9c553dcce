"""Drift: another topic is seen, chance is not, and a batch is judged once."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import ANNOTATIONS, PAIRS
from pipeline.drift import (
    DriftConfig,
    check_annotations,
    check_pairs,
    compare,
    figures,
    load,
    psi,
    verdict,
)
from pipeline.drift_profile import Text, profile, remember

KEY = "0123456789abcdef"
LIMITS = DriftConfig(min_queries=50)
WORDS = {"tools": [f"tool{i}" for i in range(60)], "garden": [f"plant{i}" for i in range(60)]}


def pair(i: int, topic: str, split: str, rng: np.random.Generator) -> dict[str, Any]:
    query = " ".join(rng.choice(WORDS[topic], rng.integers(1, 4)))
    row = {"pair_id": f"p{i:05}", "query_id": f"q{i // 2}", "query": query, "ad_title": f"{query} for home"}
    return row | {"split": split, "source": "s"}


def write(run: Path, *parts: tuple[int, str, str]) -> None:
    """Pairs of a run: (count, topic, split) each."""
    rng, rows = np.random.default_rng(0), list[dict[str, Any]]()
    for count, topic, split in parts:
        rows += [pair(len(rows) + i, topic, split, rng) for i in range(count)]
    (run / "pairs" / "pairs").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), run / "pairs" / "pairs" / "part.parquet")


def annotate(run: Path, name: str, start: int, count: int, grades: tuple[int, ...] = (0, 1, 2)) -> None:
    row = {"annotation_key": KEY, "votes": [], "n_samples": 1, "n_unparsed": 0, "status": "ok", "error": ""}
    row |= {"prompt_tokens": 1, "completion_tokens": 1, "created_at": datetime.now(UTC)}
    rows = [row | {"pair_id": f"p{i:05}", "grade": grades[i % len(grades)]} for i in range(start, start + count)]
    (run / "annotations").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=ANNOTATIONS), run / "annotations" / f"{KEY}-{name}.parquet")


def test_psi_by_hand_and_by_chance() -> None:
    # shares .9 and .1 become .6 and .4: −.3 ln(.6/.9) + .3 ln(.4/.1)
    assert psi([900_000, 100_000], [600_000, 400_000]) == pytest.approx(0.3 * np.log(6), abs=1e-3)
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(40))
    found = [psi(rng.multinomial(5000, shares), rng.multinomial(300, shares)) for _ in range(200)]
    assert np.mean([index > 0 for index in found]) < 0.05


@pytest.mark.parametrize(("topic", "level"), [("tools", "fine"), ("garden", "stop")])
def test_another_topic_is_seen_by_data_prepare(tmp_path: Path, topic: str, level: str) -> None:
    write(tmp_path, (600, "tools", "train"), (400, topic, "pool"))
    assert check_pairs(LIMITS, tmp_path, tmp_path / "pairs", "") == []  # there is no teacher yet
    (tmp_path / "teacher").mkdir()
    remember(tmp_path / "pairs", tmp_path / "teacher")
    (check,) = check_pairs(LIMITS, tmp_path, tmp_path / "pairs", "")
    assert (check.pairs, check.queries, figures([check], LIMITS)["drift"]) == (400, 200, level)
    annotate(tmp_path, "a", 600, 400)
    assert check_pairs(LIMITS, tmp_path, tmp_path / "pairs", "") == []  # nothing is new


def test_what_learned_from_few_queries_judges_nothing_and_it_is_said(tmp_path: Path, caplog: Any) -> None:
    write(tmp_path, (80, "tools", "train"), (400, "garden", "pool"))
    (tmp_path / "teacher").mkdir()
    remember(tmp_path / "pairs", tmp_path / "teacher")
    reason = "the teacher learned from 40 queries, fewer than drift.min_queries (50)"
    with caplog.at_level("INFO"):
        checks = check_pairs(LIMITS, tmp_path, tmp_path / "pairs", "")
    assert figures(checks, LIMITS) == {"drift_not_judged": reason}
    assert reason in caplog.text
    annotate(tmp_path, "a", 80, 200)
    check_annotations(LIMITS, tmp_path, tmp_path / "annotations", KEY)
    annotate(tmp_path, "b", 280, 200)
    checks = check_annotations(LIMITS, tmp_path, tmp_path / "annotations", KEY)
    assert [(check.against, check.known, bool(check.measures)) for check in checks] == [
        ("teacher", 40, False),
        ("teacher", 40, False),
        ("student", 140, True),
    ]
    assert verdict(checks, LIMITS) == verdict(checks[2:], LIMITS)
    assert figures(checks, LIMITS) == figures(checks[2:], LIMITS) | {"drift_not_judged": reason}


def test_batches_of_annotations_are_judged_once_and_the_worst_stays(tmp_path: Path) -> None:
    write(tmp_path, (600, "tools", "train"), (600, "tools", "pool"), (300, "garden", "pool"))
    (tmp_path / "teacher").mkdir()
    remember(tmp_path / "pairs", tmp_path / "teacher")
    run, annotations = tmp_path, tmp_path / "annotations"
    annotate(run, "a", 600, 300)
    (first,) = check_annotations(LIMITS, run, annotations, KEY)
    assert (first.against, first.pairs, verdict([first], LIMITS)) == ("teacher", 300, ("fine", ""))
    assert check_annotations(LIMITS, run, annotations, KEY) == [first]  # nothing is new
    annotate(run, "b", 900, 300, grades=(2,))
    *_, student = check_annotations(LIMITS, run, annotations, KEY)
    assert (student.against, student.worst.name, student.level(LIMITS)) == ("student", "the teacher's grades", "stop")
    annotate(run, "c", 1200, 20)  # too few to judge; they join the next ones
    assert len(check_annotations(LIMITS, run, annotations, KEY)) == 3
    annotate(run, "d", 1220, 280)
    *_, teacher, _ = checks = check_annotations(LIMITS, run, annotations, KEY)
    assert (teacher.pairs, teacher.level(LIMITS)) == (300, "stop")
    level, sentence = verdict(checks, LIMITS)
    assert level == "stop"
    assert "PSI" in sentence
    assert load(annotations) == checks
    assert verdict(checks, DriftConfig(look=90, stop=99)) == ("fine", "")
    assert check_annotations(LIMITS, run, annotations, "another-key") == []


def test_annotations_that_measure_the_teacher_are_no_new_pairs(tmp_path: Path) -> None:
    write(tmp_path, (600, "tools", "train"), (300, "tools", "pool"), (300, "garden", "valid"))
    annotate(tmp_path, "a", 600, 600)
    (check,) = check_annotations(LIMITS, tmp_path, tmp_path / "annotations", KEY)
    assert (check.pairs, check.queries, check.level(LIMITS)) == (300, 150, "fine")


@pytest.mark.parametrize(("known", "new"), [(325, 1300), (1300, 325), (200, 200), (200, 4000)])
def test_chance_is_no_drift_whatever_the_sizes(known: int, new: int) -> None:
    """Words as in a language: many of them rare, so that what is common among few queries is so by chance."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 5001)

    def texts(count: int, first: int) -> dict[str, Text]:
        words = [first + rng.choice(5000, 3, p=share / share.sum()) for _ in range(count)]
        return {
            str(i): Text(str(i), " ".join(f"w{word}" for word in row), f"w{row[0]} for home")
            for i, row in enumerate(words)
        }

    old = profile(texts(known, 0))
    assert max(measure.psi for measure in compare(old, texts(new, 0))) < 0.02
    assert max(measure.psi for measure in compare(old, texts(new, 2500))) > LIMITS.stop


def test_scripts_and_lengths() -> None:
    latin = {str(i): Text(str(i), "red shoes", "a") for i in range(300)}
    han = {str(i): Text(str(i), "红色跑鞋", "a") for i in range(300)}
    by_name = {measure.name: measure for measure in compare(profile(latin), han)}
    assert by_name["scripts of queries"].found == "cjk: 100.0%"
    assert by_name["scripts of queries"].psi > 1
    assert by_name["query lengths"].expected == "2 words: 100.0%"
    assert by_name["unseen words in queries"].found == "100.0%"
    assert by_name["common words in ads"].psi == 0
