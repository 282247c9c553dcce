"""One score for a pair, whatever shares its batch; the export fails on an encoder that int8 ruins."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.contracts import ContractError, GradeScale
from student.config import ExportConfig
from student.dataset import read_examples
from student.export import export_student
from student.model import load_classifier
from student.quantise import by_channel
from student.scorer import Scorer, pad, refuse_bf16, softmax


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("int8", 1e-6), ("fp16", 1e-3), ("bf16", 1e-6)])
def test_a_pair_has_one_score_in_any_batch_and_with_any_padding(exported, tiny, precision, tolerance):
    if precision == "bf16":
        need_bf16()
    scorer = Scorer(exported[0], precision)
    rows = read_examples(tiny["pairs"], GradeScale.load(tiny["pairs"]), "test")
    texts = [(query, f"{ad} " * (1 + i % 4)) for i, (query, ad) in enumerate(zip(rows.queries, rows.ads, strict=True))]
    texts.append(("", ""))
    alone = np.concatenate([scorer.logits([text]) for text in texts])
    assert alone.std(axis=0).min() > 1e-3
    for batch_tokens in (40, 200, 5000):
        np.testing.assert_allclose(softmax(scorer.logits(texts, batch_tokens)), softmax(alone), atol=tolerance)
    for i, encoding in enumerate(scorer.tokenizer.encode_batch(texts)):
        longer = [[*encoding.ids, *[0] * (8 + i % 9)]]
        inputs = {
            "input_ids": pad(longer, 0, scorer.multiple),
            "attention_mask": pad([encoding.attention_mask, longer[0]], 0, scorer.multiple)[:1],
            "token_type_ids": pad([encoding.type_ids, longer[0]], 0, scorer.multiple)[:1],
        }
        np.testing.assert_allclose(softmax(scorer.run(inputs)), softmax(alone[i : i + 1]), atol=tolerance)


def need_bf16():
    try:
        refuse_bf16()
    except ValueError as error:
        pytest.skip(str(error))


def test_bf16_is_compared_as_the_others_are(distilled, tiny, tmp_path):
    need_bf16()
    export_student(ExportConfig(bf16=True, max_int8_auc_loss=0.2), distilled / "model", tiny["pairs"], tmp_path)
    parity = json.loads((tmp_path / "export.json").read_text())
    assert 0 < parity["bf16"]["max_abs_dp"] < 0.03
    assert parity["bf16"]["file"] == parity["fp32"]["file"]
    assert parity["bf16_auc_loss"]["value"] == pytest.approx(0, abs=0.02)
    assert "| bf16 |" in (tmp_path / "model_card.md").read_text()


@pytest.mark.parametrize(("module", "words"), [(None, "pip install openvino"), ("old", "no units for bfloat16")])
def test_bf16_is_refused_where_it_cannot_be(exported, module, words, monkeypatch):
    old = SimpleNamespace(Core=lambda: SimpleNamespace(get_property=lambda *_: ["FP32", "INT8"]))
    monkeypatch.setitem(sys.modules, "openvino", module and old)
    with pytest.raises(ValueError, match=words):
        Scorer(exported[0], "bf16")


def test_int8_and_fp16_are_near_and_smaller(exported):
    parity = json.loads((exported[0] / "export.json").read_text())
    assert parity["fp16"]["max_abs_dp"] < 0.005
    assert parity["int8"]["max_abs_dp"] < 0.1
    assert parity["fp16"]["megabytes"] < 0.85 * parity["fp32"]["megabytes"]
    assert parity["int8"]["megabytes"] < 0.75 * parity["fp32"]["megabytes"]
    assert set(parity["int8_decisions_changed"]) == {"grade 0", "grade 1", "grade 2"}
    assert parity["fp16_auc_loss"]["value"] == pytest.approx(0, abs=0.02)


def test_channels_are_quantised_by_their_own_largest_value():
    weight = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32) * [1, 100, 0]
    values, scale = by_channel(weight, 63, 0)
    assert np.abs(values).max(axis=0).tolist() == [63, 63, 0]
    np.testing.assert_allclose(values * scale, weight, atol=100 * 4 / 63 / 2)
    np.testing.assert_allclose((values * scale)[:, 0], weight[:, 0], atol=4 / 63 / 2)


def test_the_export_fails_on_an_encoder_that_int8_ruins(distilled, tiny, tmp_path):
    """One feature of each layer's input is made huge and its weights small: the same function, but not in int8."""
    scale = GradeScale.load(tiny["pairs"])
    card = json.loads((distilled / "model" / "student.json").read_text())
    model = load_classifier(distilled / "model", scale, max_length=card["max_length"], seed=0)
    with torch.no_grad():
        for layer in model.base_model.encoder.layer:
            layer.intermediate.dense.bias[0] = 3e4
            layer.intermediate.dense.weight[0] = 0
            layer.output.dense.bias -= 3e4 * layer.output.dense.weight[:, 0]
    ruined = tmp_path / "ruined"
    model.save_pretrained(ruined)
    for name in ("tokenizer.json", "scale.json", "student.json", "model_card.md"):
        (ruined / name).write_bytes((distilled / "model" / name).read_bytes())
    config = ExportConfig(max_probability_difference=0.05, max_int8_auc_loss=1.0, threads=1)
    with pytest.raises(ContractError, match=r"int8 model decides otherwise than fp32 on \d+\.\d% of grade 'grade \d'"):
        export_student(config, ruined, tiny["pairs"], tmp_path / "export")
    parity = json.loads((tmp_path / "export" / "export.json").read_text())
    assert parity["passed"] is False
    assert parity["fp32"]["max_abs_dp"] < 0.05
    assert not list((tmp_path / "export").glob("*.onnx"))
