from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.dataset as pads
import pytest
from pydantic import ValidationError

from data.contracts import ContractError, GradeScale, MetricsLog
from student.config import StudentConfig
from student.dataset import read_examples, read_texts, sample_texts
from student.distill import distill
from student.evaluation import System, floor, floor_fault
from student.model import save_tokenizer
from student.setup import Setup
from student.warm_up import LOWEST, free_scores, negative_pairs, rank_targets, warm_up, with_targets

from .conftest import make_rows, write_pairs

WARM_UP = {"pairs": 80, "epochs": 2, "learning_rate": 1e-3}


def make_setup(tiny, folder, **warm_up) -> Setup:
    config = StudentConfig(device="cpu", max_length=32, warm_up=WARM_UP | warm_up)
    tokenizer = save_tokenizer(tiny["base"], folder / "tokenizer", 32)
    return Setup(config, tiny["base"], tokenizer, GradeScale.load(tiny["pairs"]), "cpu")


def test_trials_share_a_warm_up_and_it_is_in_the_table(tiny, quick, tmp_path, caplog):
    def train(name: str, pairs=tiny["pairs"], **over):
        caplog.clear()
        caplog.set_level("INFO")
        config = quick(warm_up=WARM_UP, epochs=1, **over)
        distill(config, tiny["base"], pairs, None, tmp_path / name, tmp_path / "cache")
        return json.loads((tmp_path / name / "evaluation.json").read_text())

    evaluation = train("first")
    assert [system["name"] for system in evaluation["systems"]][-2:] == ["untrained_cosine", "warm_up"]
    assert set(evaluation["floor"]["systems"]) == {"untrained_cosine", "warm_up"}
    assert MetricsLog(tmp_path / "first" / "metrics.jsonl").read("warm_up")
    card = json.loads((tmp_path / "first" / "model" / "student.json").read_text())
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert card["warm_up"] == folder.name
    train("second", learning_rate=2e-3, class_balance=0.5)
    assert f"reused from {folder}" in caplog.text
    # Other grades of train and pool are nothing to it; other texts are.
    regraded = [row | ({} if row["split"] in ("valid", "test") else {"grade": 2}) for row in make_rows()]
    train("third", write_pairs(tmp_path / "regraded", regraded))
    assert f"reused from {folder}" in caplog.text
    train("fourth", write_pairs(tmp_path / "other", [row | {"ad_text": "new"} for row in make_rows()]))
    assert "reused" not in caplog.text


def test_a_warm_up_of_other_tokens_is_another(tiny, tmp_path):
    setup, log = make_setup(tiny, tmp_path), MetricsLog(tmp_path / "metrics.jsonl")
    valid = read_examples(tiny["pairs"], setup.scale, "valid")
    first = warm_up(setup, tiny["pairs"], valid, tmp_path / "cache", log)
    assert warm_up(make_setup(tiny, tmp_path), tiny["pairs"], valid, tmp_path / "cache", log) == first
    tokenizer = save_tokenizer(tiny["base"], tmp_path / "other", 32)
    tokenizer.normalizer = None
    assert warm_up(replace(setup, tokenizer=tokenizer), tiny["pairs"], valid, tmp_path / "cache", log) != first


def test_texts_of_valid_and_test_are_not_read(tiny, quick, tmp_path):
    rows = sample_texts(tiny["pairs"], 1000, 0, 3)
    split = {row["pair_id"]: row["split"] for row in make_rows()}
    assert {split[pair_id] for pair_id in rows.pair_ids} == {"train", "pool"}
    assert len(rows) == 96
    assert not (rows.grade >= 0).any()
    held_out = write_pairs(tmp_path / "p", [row for row in make_rows() if row["split"] not in ("train", "pool")])
    setup, log = make_setup(tiny, tmp_path), MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ContractError, match="no pairs in splits pool and train"):
        warm_up(setup, held_out, rows, tmp_path / "cache", log)


@pytest.mark.parametrize("source", [{}, {"source": "bm25"}, {"encoder": True}, {"encoder": "vocab"}])
def test_the_more_words_a_pair_shares_the_higher_is_its_target(tiny, tmp_path, source):
    source = dict(source)
    kind = source.pop("encoder", None)
    encoder = tiny["base"] if kind else None
    if kind == "vocab":  # as older encoders have their words
        encoder = tmp_path / "encoder"
        shutil.copytree(tiny["base"], encoder)
        words = json.loads((encoder / "tokenizer.json").read_text())["model"]["vocab"]
        (encoder / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)) + "\n")
        (encoder / "tokenizer.json").unlink()
    setup = replace(make_setup(tiny, tmp_path, **source), scored_by=encoder)
    rows = read_texts(tiny["pairs"], pads.field("split") == "pool", 3)
    grade = np.array([row["grade"] for row in make_rows() if row["split"] == "pool"])
    targets = rank_targets(free_scores(setup, rows))
    assert (targets.min(), targets.max()) == (LOWEST, 1) or source  # BM25 has ties
    assert targets[grade == 2].mean() > targets[grade == 0].mean() + 0.1


def test_negatives_are_no_pairs_of_the_query(tiny, tmp_path):
    setup = make_setup(tiny, tmp_path, random_negatives=2.0, hard_negatives=2.0)
    rows = sample_texts(tiny["pairs"], 80, 0, 3)
    negatives, targets = negative_pairs(setup, rows)
    known = set(zip(rows.query_id, rows.ads, strict=True))
    assert not known & set(zip(negatives.query_id, negatives.ads, strict=True))
    assert set(targets) == {0.02, 0.15}
    assert len(negatives) > 200
    again = negative_pairs(setup, rows)[0]
    assert (again.ads == negatives.ads).all()


def test_a_target_is_what_raters_would_say(tiny):
    rows = sample_texts(tiny["pairs"], 3, 0, 3)
    taught = with_targets(rows, np.array([0.0, 0.5, 1.0]), 3)
    assert taught.soft == pytest.approx(np.array([[1, 0, 0], [0.25, 0.5, 0.25], [0, 0, 1]]))
    assert (taught.n_gold, taught.n_annotated) == (0, 3)


def test_an_encoder_beside_bm25_is_refused(quick):
    with pytest.raises(ValidationError, match="`encoder` has no effect with source = 'bm25'"):
        quick(warm_up={"pairs": 10, "source": "bm25", "encoder": "hf:a/b"})


def test_a_student_below_what_costs_no_label_is_named():
    def system(name: str, auc: float) -> System:
        return System(name, np.zeros(1), None, valid_roc_auc=auc)

    def fault(*aucs: float) -> str | None:
        names = ("student", "untrained_cosine", "warm_up")
        return floor_fault({"floor": floor([*map(system, names, aucs), system("bm25", 1.0)])})

    assert fault(0.72, 0.69, 0.71) is None
    assert "ROC-AUC on valid 0.700, warm_up 0.710; label more" in (fault(0.70, 0.69, 0.71) or "")
    assert (fault(0.70, 0.69, 0.71) or "").endswith("or warm it up on more pairs (`data.log`)")
    assert (fault(0.69, 0.69) or "").endswith(
        "0.690; label more pairs, annotate the pool, or set student.warm_up.pairs"
    )
    assert fault(float("nan"), float("nan"), float("nan")) is None
    assert floor_fault({}) is None
