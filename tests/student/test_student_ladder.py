"""Smaller students: cut from a trained one, taught by it, exported beside it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data.contracts import ContractError, GradeScale
from student import distill as distill_module
from student.config import ExportConfig
from student.dataset import read_examples
from student.distill import distill
from student.evaluation import PREDICTIONS
from student.ladder import check_layers, cut, evaluated, export_sizes, taught_by
from student.model import load_classifier
from student.scorer import Scorer

from .conftest import FAMILIES, make_base
from .test_student_export import assert_scores_as_evaluated


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_cut_at_full_depth_is_the_model_itself_and_a_smaller_one_loads(kind, tiny, tmp_path):
    scale = GradeScale.load(tiny["pairs"])
    model = load_classifier(make_base(kind, tiny, tmp_path / "base"), scale, max_length=32, seed=0)
    if kind == "albert":
        with pytest.raises(ContractError, match="cannot be cut"):
            check_layers((1,), model)
        return
    check_layers((1, 2), model)
    with pytest.raises(ContractError, match="has 3, but the encoder has 2 layers"):
        check_layers((1, 3), model)
    ids = torch.arange(5, 15).reshape(1, 10)
    whole, one = (
        load_classifier(cut(model, n, tmp_path / str(n)), scale, max_length=32, seed=9)(input_ids=ids).logits
        for n in (2, 1)
    )
    torch.testing.assert_close(whole, model(input_ids=ids).logits)
    assert one.isfinite().all()
    assert not torch.equal(one, whole)


def test_first_and_last_layer_stay(tiny, tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(tiny["base"], num_hidden_layers=6)
    model = AutoModelForSequenceClassification.from_config(config)
    smaller = AutoModelForSequenceClassification.from_pretrained(cut(model, 3, tmp_path / "cut"))
    for new, old in enumerate((0, 2, 5)):
        ours, theirs = (m.bert.encoder.layer[i].output.dense.weight for m, i in ((smaller, new), (model, old)))
        assert torch.equal(ours, theirs)


def test_the_larger_student_teaches_beside_people_and_teacher(tiny):
    rows = read_examples(tiny["pairs"], GradeScale.load(tiny["pairs"]), "train").take(np.arange(3))
    rows.soft[1], rows.grade[2], rows.mix[2] = (0.0, 1.0, 0.0), -1, 0.0
    taught = taught_by(rows, np.tile([0.5, 0.25, 0.25], (3, 1)), 0.5)
    assert taught.soft.tolist() == [[0.5, 0.25, 0.25], [0.25, 0.625, 0.125], [0.5, 0.25, 0.25]]
    assert taught.mix.tolist() == [0.5, 0.5, 0.0]


def test_every_size_is_trained_calibrated_measured_and_exported(tiny, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(distill_module, "isotonic_losses", lambda *given, **named: (1.0, 0.9))
    # The student is above its floor, and the smaller one is not.
    floor_of, above = distill_module.floor, iter([True, False])
    monkeypatch.setattr(distill_module, "floor", lambda systems: floor_of(systems) | {"above": next(above)})
    trained, out = tmp_path / "student", tmp_path / "export"
    config = quick(epochs=1, layers=(1, 2), warm_up={"pairs": 60}, calibration="best")
    distill(config, tiny["base"], tiny["pairs"], tiny["annotations"], trained)
    systems = {each["name"] for each in json.loads((trained / "evaluation.json").read_text())["systems"]}
    assert {"student", "student_1_layers"} <= systems
    limits = {"max_int8_auc_loss": 1.0, "max_decisions_changed": 1.0, "threads": 1}
    export_sizes(ExportConfig(layers=1, **limits), trained, tiny["pairs"], out)
    sizes = json.loads((out / "ladder.json").read_text())["sizes"]
    assert [(size["layers"], size["chosen"], size["fault"]) for size in sizes] == [(1, True, ""), (2, False, "")]
    assert all(0 < size["roc_auc"]["value"] < 1 for size in sizes)
    for layers, folder, exported in ((1, trained / "layers-1", out), (2, trained, out / "layers-2")):
        card = Scorer(exported).card
        assert (card["layers"], len(card["isotonic"])) == (layers, 3)
        assert_scores_as_evaluated(exported, folder)
    assert evaluated(trained, out) == trained / "layers-1"
    assert evaluated(trained, out / "layers-2") == trained
    predictions = [pq.read_table(folder / PREDICTIONS) for folder in (trained, trained / "layers-1")]
    assert predictions[0].schema == predictions[1].schema
    assert predictions[0] != predictions[1]
    cards = [(folder / "model_card.md").read_text() for folder in (trained / "model", trained / "layers-1")]
    assert ["Do not deploy" in card for card in cards] == [False, True]
    floor = json.loads((trained / "layers-1" / "evaluation.json").read_text())["floor"]
    assert floor["student"] > 0
    assert set(floor["systems"]) == {"untrained_cosine", "warm_up"}
    with pytest.raises(ContractError, match="layers = 5 layers, only of 1, 2"):
        export_sizes(ExportConfig(layers=5, **limits), trained, tiny["pairs"], out)
