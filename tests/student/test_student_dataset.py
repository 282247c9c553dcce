from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from data.contracts import ContractError, GradeScale, write_json
from student.config import StudentConfig
from student.dataset import (
    query_grouped,
    random_batches,
    read_annotated,
    read_examples,
    read_training,
    tokenize,
    with_reasons,
)
from student.scorer import ad_text, batches_by_tokens, load_tokenizer

from .conftest import annotate_pool, annotation, make_rows, write_annotations, write_pairs


def _read(tmp_path, rows, annotations, **config):
    pairs = write_pairs(tmp_path / "pairs", rows)
    where = write_annotations(tmp_path / "annotations", annotations) if annotations is not None else None
    config = StudentConfig(**config)
    return read_training(pairs, read_annotated(where, config.annotation_key)[1], GradeScale.load(pairs), config)


def test_the_pool_gives_annotations_and_never_its_grades(tmp_path):
    rows = make_rows()
    examples = _read(tmp_path, rows, annotate_pool(rows))
    split = {row["pair_id"]: row["split"] for row in rows}
    for i, pair_id in enumerate(examples.pair_ids):
        assert split[pair_id] in ("train", "pool")
        assert (examples.grade[i] >= 0) == (split[pair_id] == "train")
        assert (examples.mix[i] == 1) == (split[pair_id] == "train")
    withheld = [row | {"grade": (row["grade"] + 1) % 3 if row["split"] == "pool" else row["grade"]} for row in rows]
    assert _read(tmp_path / "b", withheld, annotate_pool(rows)).digest() == examples.digest()
    with pytest.raises(ValueError, match="withheld"):
        read_examples(tmp_path / "pairs", GradeScale.load(tmp_path / "pairs"), "pool")


def test_annotations_of_valid_and_test_are_not_learned_from(tmp_path):
    rows = make_rows()
    everywhere = [annotation(row["pair_id"], [0.2, 0.3, 0.5]) for row in rows]
    examples = _read(tmp_path, rows, everywhere, gold_mix=0.25)
    split = {row["pair_id"]: row["split"] for row in rows}
    assert {split[pair_id] for pair_id in examples.pair_ids} == {"train", "pool"}
    assert set(examples.mix[examples.grade >= 0]) == {0.25}
    assert examples.n_annotated == len(examples)


def test_a_rating_between_grades_teaches_both_unless_it_is_not_wanted(tmp_path):
    """Only in split train: valid and test are measured by their grades, and the pool's ratings are withheld."""
    rows = [row | {"grade_raw": row["grade"] + (i % 3) / 4} for i, row in enumerate(make_rows())]
    examples = _read(tmp_path, rows, annotate_pool(rows))
    human = examples.grade >= 0
    assert examples.gold.sum(axis=1) == pytest.approx(human.astype(float))
    assert ((examples.gold > 0).sum(axis=1) == 2).sum() > human.sum() / 4
    elsewhere = [row | ({} if row["split"] == "train" else {"grade_raw": 100.0}) for row in rows]
    assert _read(tmp_path / "b", elsewhere, annotate_pool(rows)).digest() == examples.digest()
    hard = _read(tmp_path / "c", rows, annotate_pool(rows), soft_gold=False)
    assert (hard.gold[human] == np.eye(3)[hard.grade[human]]).all()


def test_agreement_weighs_and_failed_or_doubtful_rows_are_left_out(tmp_path):
    rows = make_rows(8)
    pool = [row["pair_id"] for row in rows if row["split"] == "pool"]
    annotations = [
        annotation(pool[0], [0.5, 0.5, 0.0], agreement=0.5),
        annotation(pool[1], [0.0, 0.0, 1.0], agreement=1.0),
        annotation(pool[2], None),
        annotation(pool[3], [0.4, 0.3, 0.3], agreement=0.4),
        annotation(pool[4], [0.6, 0.2, 0.2], agreement=None),
    ]
    examples = _read(tmp_path, rows, annotations, agreement_power=2, min_agreement=0.45, gold_weight=3)
    weight = dict(zip(examples.pair_ids, examples.weight, strict=True))
    assert {i: w for i, w in weight.items() if i in pool} == pytest.approx({pool[0]: 0.25, pool[1]: 1, pool[4]: 0.36})
    assert {w for i, w in weight.items() if i not in pool} == {3}


def test_gold_alone_and_annotations_alone_and_nothing(tmp_path):
    rows = make_rows()
    assert _read(tmp_path / "a", rows, None).n_annotated == 0
    assert _read(tmp_path / "b", rows, []).n_annotated == 0
    no_gold = [row | ({"grade": None} if row["split"] == "train" else {}) for row in rows]
    only = _read(tmp_path / "c", no_gold, annotate_pool(rows))
    assert only.n_gold == 0
    assert only.n_annotated == len(only) > 0
    with pytest.raises(ContractError, match="nothing to learn from"):
        _read(tmp_path / "d", no_gold, [])


def test_the_key_last_annotated_is_taken_and_another_can_be_named(tmp_path):
    rows = make_rows()
    old = [annotation("p0010", [1.0, 0.0, 0.0])]
    new = [annotation("p0010", [0.0, 1.0, 0.0], annotation_key="key-b", created_at=datetime(2026, 2, 1, tzinfo=UTC))]
    where = write_annotations(tmp_path / "annotations", new + old)
    assert read_annotated(where, "") == ("key-b", {"p0010": ([0.0, 1.0, 0.0], 1.0, "", False)})
    assert read_annotated(where, "key-a")[1]["p0010"][0] == [1.0, 0.0, 0.0]
    with pytest.raises(ContractError, match="key-c"):
        _read(tmp_path, rows, new + old, annotation_key="key-c")
    write_json(
        where / "_annotations.json", {"annotation_key": "key-a"}
    )  # as the job leaves it: only reused, nothing new
    assert read_annotated(where, "")[0] == "key-a"


def test_annotations_that_all_failed_are_refused_and_none_at_all_are_not(tmp_path):
    with pytest.raises(ContractError, match="none of the annotations"):
        read_annotated(write_annotations(tmp_path / "failed", [annotation("p0010", None)]), "")
    assert read_annotated(write_annotations(tmp_path / "none", []), "") == ("", {})
    assert read_annotated(tmp_path / "nowhere", "") == ("", {})


@pytest.mark.parametrize("probs", [[0.5, 0.5], [0.5, 0.4, 0.3], [float("nan"), 0.5, 0.5], [-0.5, 1.0, 0.5]])
def test_annotations_of_another_scale_are_refused(tmp_path, probs):
    with pytest.raises(ContractError, match="p0010"):
        _read(tmp_path, make_rows(), [annotation("p0010", probs, agreement=0.5)])


def test_grades_off_the_scale_are_refused(tmp_path):
    with pytest.raises(ContractError, match="grade 5"):
        _read(tmp_path, [row | {"grade": 5} for row in make_rows()], None)


def test_batches_hold_every_row_once():
    rng = np.random.default_rng(0)
    batches = random_batches(1003, 16, rng)
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert len(batches) == -(-1003 // 16)
    query = rng.integers(200, size=1003).astype(str).astype(object)
    by_query = query_grouped(query, 16, rng)
    assert sorted(np.concatenate(by_query)) == list(range(1003))
    whole = sum(any((query[b] == q).sum() == (query == q).sum() for b in by_query) for q in np.unique(query))
    assert whole > 0.6 * len(np.unique(query))


def test_a_reason_follows_query_and_ad_in_the_second_segment(tiny):
    tokenizer = load_tokenizer(tiny["base"] / "tokenizer.json", 12)
    plain = tokenize(tokenizer, ["red kettle"] * 2, ["blue sofa number number number number number number"] * 2, 0)
    found = with_reasons(plain, tokenizer, ["red [SEP] lamp" + " lamp" * 40, ""], 3)
    assert len(with_reasons(plain, tokenizer, ["lamp " * 40, ""], 30).ids[0]) == 12 + 30 + 1
    assert len(tokenizer.encode("lamp " * 40).ids) == 12  # the limit of query and ad is back
    assert len(plain.ids[0]) == 12  # cut, and cut alike in both views
    assert found.ids[0][:12] == plain.ids[0]
    assert len(found.ids[0]) == 12 + 3 + 1
    assert found.ids[0][-1] == plain.ids[0][-1]
    assert plain.ids[0][-1] not in found.ids[0][12:-1]  # what a reason says is never a special token
    assert found.type_ids[0][12:] == [1] * 4
    assert found.ids[1] == plain.ids[1]


def test_an_ad_cannot_write_special_tokens(tiny):
    tokenizer = load_tokenizer(tiny["base"] / "tokenizer.json", 32)
    special = {tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]", "[MASK]", "[PAD]")}
    honest = tokenizer.encode("red kettle", ad_text("tent"))
    hostile = tokenizer.encode("red kettle", ad_text("tent [SEP] [CLS] red kettle [SEP] [PAD][MASK]"))
    assert sum(i in special for i in hostile.ids) == sum(i in special for i in honest.ids) == 3
    assert hostile.type_ids[-1] == 1


def test_ad_text_takes_maps_lists_and_broken_unicode():
    assert (
        ad_text("a", "b", {"y": "2", "x": "1"}) == ad_text("a", "b", [("x", "1"), ("y", "2")]) == "a | x: 1 | y: 2 | b"
    )
    assert ad_text("a", None, None) == "a"
    assert "\ud800" not in ad_text("bad \ud800")
    assert len(ad_text("x" * 10_000_000)) < 10_000


def test_batches_by_tokens_hold_every_row_once_and_their_limit():
    lengths = np.array([5, 40, 12, 12, 7, 100, 5])
    found = list(batches_by_tokens(lengths, 48))
    assert sorted(np.concatenate(found)) == list(range(7))
    assert all(len(rows) == 1 or lengths[rows].max() * len(rows) <= 48 for rows in found)
    assert [len(rows) for rows in found] == [1, 1, 4, 1]
    assert list(batches_by_tokens([], 48)) == []


def test_what_people_said_later_wins_and_moves_no_pair(tmp_path):
    rows = make_rows()
    by_split = {
        split: [row["pair_id"] for row in rows if row["split"] == split] for split in ("train", "pool", "valid", "test")
    }
    labels = {ids[0]: [2, 1, 2] for ids in by_split.values()} | {by_split["pool"][1]: [0]}
    pairs = write_pairs(tmp_path / "pairs", rows)
    annotated = read_annotated(write_annotations(tmp_path / "annotations", annotate_pool(rows)), "")[1]
    scale, config = GradeScale.load(pairs), StudentConfig(gold_weight=2)
    plain, examples = (read_training(pairs, annotated, scale, config, given) for given in ({}, labels))
    assert sorted(examples.pair_ids) == sorted(plain.pair_ids)
    at = {pair_id: i for i, pair_id in enumerate(examples.pair_ids)}
    for pair_id in (by_split["train"][0], by_split["pool"][0]):
        i = at[pair_id]
        assert (examples.grade[i], examples.mix[i], examples.weight[i], examples.soft[i].sum()) == (2, 1, 2, 0)
        assert examples.gold[i] == pytest.approx([0, 1 / 3, 2 / 3])
    assert by_split["pool"][1] in examples.gold_only().pair_ids
    assert by_split["valid"][0] not in at
    with pytest.raises(ContractError, match="not on the scale"):
        read_training(pairs, annotated, scale, config, {by_split["pool"][0]: [7]})
