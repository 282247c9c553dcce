"""Which pairs a budget of annotations goes to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data.contracts import FREQUENCIES, SCORES, SELECTION, ContractError, read_table
from pipeline.annotation.budget import BEFORE, Sources, select
from pipeline.annotation.cascade import Scores
from pipeline.annotation.config import AnnotateConfig, SelectConfig
from pipeline.annotation.store import commit, part_path, take_over
from tests.pipeline.annotation.test_cascade import KEY, teacher_rows

IDS = [f"p{i:04d}" for i in range(200)]
CANDIDATES = pa.table({"pair_id": IDS, "query_id": [f"q{i % 20}" for i in range(200)]})


def annotate(out: Path, pair_ids: list[str]) -> None:
    commit(part_path(out, KEY, pair_ids), teacher_rows(pair_ids), take_over(out))


def chosen(config: SelectConfig, out: Path, sources: Sources) -> dict[str, str]:
    table = select(config, 0, CANDIDATES, out, KEY, ["v0"], sources)
    assert table.schema == SELECTION
    return dict(zip(table["pair_id"].to_pylist(), table["why"].to_pylist(), strict=True))


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """A student that is the less sure the higher a pair's number, and a log that has seen most queries often."""
    for folder in ("scores", "pairs/frequencies"):
        (tmp_path / folder).mkdir(parents=True)
    p = np.linspace(0.99, 0.51, 200)
    scores = {"pair_id": IDS, "p_relevant": p, "grade_probs": np.stack([1 - p, p], axis=1).tolist()}
    scores |= {"model_version": ["one"] * 200}
    pq.write_table(pa.table(scores, schema=SCORES), tmp_path / "scores" / "part.parquet")
    strata = ["tail" if i % 20 == 0 else "head" for i in range(200)]
    log = pa.table({"pair_id": IDS, "frequency": np.ones(200), "stratum": strata}, schema=FREQUENCIES)
    pq.write_table(log, tmp_path / "pairs" / "frequencies" / "part.parquet")
    return Sources(tmp_path / "pairs", Scores(tmp_path / "scores", "one"))


def test_what_is_annotated_counts_and_a_choice_is_made_once(tmp_path: Path, sources: Sources) -> None:
    config, out = SelectConfig(pairs=30, random=0.5, uncertain=0.25, by_stratum=0.25), tmp_path / "out"
    annotate(out, IDS[:10])
    first = chosen(config, out, sources)
    assert len(first) == 30
    assert [pair_id for pair_id, why in first.items() if why == BEFORE] == IDS[:10]
    assert first[IDS[-1]].startswith("uncertain: margin 0.02")
    assert {"by_stratum: tail", "by_stratum: head", "random"} < set(first.values())
    annotate(out, IDS[10:20])  # as the job goes on
    assert chosen(config, out, sources) == first
    more = chosen(config.model_copy(update={"pairs": 60}), out, sources)
    assert [pair_id for pair_id, why in more.items() if why == BEFORE] == IDS[:20]
    assert len(more) == 60
    assert len(list(out.glob("_selection-*.parquet"))) == 2
    read_table(next(out.glob("_selection-*.parquet")), SELECTION)


def test_a_choice_is_made_anew_when_what_it_goes_by_has_changed(
    tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, encoder = tmp_path / "out", tmp_path / "encoder"
    out.mkdir()
    by_stratum = SelectConfig(pairs=20, random=0.0, by_stratum=1.0)
    first = chosen(by_stratum, out, sources)
    strata = ["tail" if i % 20 == 7 else "head" for i in range(200)]  # other queries are rare now
    log = pa.table({"pair_id": IDS, "frequency": np.ones(200), "stratum": strata}, schema=FREQUENCIES)
    pq.write_table(log, tmp_path / "pairs" / "frequencies" / "part.parquet")
    second = chosen(by_stratum, out, sources)
    tail = {IDS[i] for i in range(7, 200, 20)}
    assert tail <= set(second)
    assert not tail <= set(first)
    assert chosen(by_stratum, out, sources) == second

    asked: list[int] = []

    def vectors(left: pa.Table, sources: Sources) -> np.ndarray:
        asked.append(len(left))
        return np.random.default_rng(len(asked)).random((len(left), 4))

    monkeypatch.setattr("pipeline.annotation.budget._vectors", vectors)
    encoder.mkdir()
    diverse = SelectConfig(pairs=20, random=0.0, diverse=1.0, encoder=f"path:{encoder}")
    for content, times in (("one", 1), ("one", 1), ("two", 2)):
        (encoder / "model.safetensors").write_text(content)
        chosen(diverse, out, Sources(sources.pairs, encoder=encoder))
        assert len(asked) == times


@pytest.mark.parametrize("strategy", ["random", "uncertain", "by_stratum"])
def test_nothing_is_left_to_choose(tmp_path: Path, sources: Sources, strategy: str) -> None:
    config, out = SelectConfig.model_validate({"pairs": 200, "random": 0.0, strategy: 1.0}), tmp_path / "out"
    annotate(out, IDS)
    assert set(chosen(config, out, sources).values()) == {BEFORE}
    none = CANDIDATES.slice(0, 0)
    assert not len(select(config, 0, none, out, KEY, [], sources))


def test_a_budget_in_tokens_goes_by_what_measured_pairs_took(tmp_path: Path, sources: Sources) -> None:
    config, out = SelectConfig(tokens=18 * 25 + 3), tmp_path / "out"
    annotate(out, IDS[:3])
    with pytest.raises(ContractError, match=r"annotate.valid_pairs"):
        chosen(config, out, sources)
    annotate(out, ["v0"])  # 18 tokens
    assert len(chosen(config, out, sources)) == 25
    assert len(chosen(SelectConfig(tokens=10**6, pairs=7), out, sources)) == 7
    assert len(chosen(SelectConfig(tokens=10**6), out, sources)) == 200


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"select": {"uncertain": 1}}, "a strategy needs a budget"),
        ({"select": {"random": 0, "pairs": 10}}, "no strategy has a share"),
        ({"select": {"diverse": 1, "pairs": 10}}, "needs `encoder`"),
        ({"select": {"uncertain": 1, "pairs": 10}}, "need `student`"),
        ({"cascade": {"max_loss": 0.01}}, "need `student`"),
        ({"cascade": {"max_loss": 0.01}, "student": "export", "valid_pairs": 0}, "needs `valid_pairs`"),
        (
            {"cascade": {"max_loss": 0.01}, "student": "export", "valid_pairs": 230},
            "it takes 231, or a larger `max_loss`",
        ),
    ],
)
def test_settings_that_cannot_choose_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        AnnotateConfig.model_validate(settings)
