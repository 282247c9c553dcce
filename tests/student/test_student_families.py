"""Every family of encoders goes the whole way: warm-up, packed training, fp32, int8, score.py; what cannot is refused."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from data.contracts import ContractError, GradeScale
from student.config import ExportConfig
from student.distill import distill
from student.export import export_student
from student.model import load_classifier, longest_text
from student.scorer import Scorer
from student.vocabulary import occurring_tokens

from .conftest import FAMILIES, PADDED, make_base, make_rows


@pytest.mark.e2e
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_of_encoders_trains_exports_and_scores_alike(kind, tiny, quick, tmp_path, caplog):
    base = make_base(kind, tiny, tmp_path / "base")
    config = quick(epochs=1, warm_up={"pairs": 60})
    with caplog.at_level(logging.INFO):
        distill(config, base, tiny["pairs"], tiny["annotations"], tmp_path / "student")
    assert ("batches are padded" in caplog.text) == (kind in PADDED)
    limits = ExportConfig(max_probability_difference=1e-5, max_int8_auc_loss=1, max_decisions_changed=1, threads=1)
    figures = export_student(limits, tmp_path / "student", tiny["pairs"], tmp_path / "export").figures
    assert figures["fp32_max_abs_dp"] < 1e-6
    assert figures["int8_max_abs_dp"] < 0.08
    assert figures["int8_megabytes"] < 0.8 * figures["fp32_megabytes"]
    written = pq.read_table(tmp_path / "student" / "test_predictions.parquet").to_pandas().set_index("pair_id")
    rows = [row for row in make_rows() if row["split"] == "test"]
    expected = written.loc[[row["pair_id"] for row in rows], "p_relevant"]
    for precision, tolerance in (("fp32", 1e-5), ("int8", 0.08)):
        scorer = Scorer(tmp_path / "export", precision)
        alone = np.concatenate([scorer.p_relevant(scorer.grade_probs([row])) for row in rows])
        np.testing.assert_allclose(alone, expected, atol=tolerance)
        for batch_tokens in (60, 2000):
            np.testing.assert_allclose(scorer.p_relevant(scorer.grade_probs(rows, batch_tokens)), alone, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "camembert", "mpnet", "electra", "distilbert"])
def test_the_longest_text_of_a_family_is_read_and_a_longer_one_is_refused(kind, tiny, tmp_path):
    """Also where positions begin after the padding token's (RoBERTa's family, MPNet)."""
    base, scale = make_base(kind, tiny, tmp_path), GradeScale.load(tiny["pairs"])
    longest = longest_text(load_classifier(base, scale, max_length=32, seed=0))
    model = load_classifier(base, scale, max_length=longest, seed=0)
    ids = torch.full((2, longest), 7)
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()
    with pytest.raises(ContractError, match=f"max_length is {longest + 1}, but the encoder .* has {longest} positions"):
        load_classifier(base, scale, max_length=longest + 1, seed=0)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}),
        ("t5", {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    ],
)
def test_what_cannot_grade_pairs_is_refused_at_the_start_by_its_name(kind, sizes, tiny, tmp_path):
    AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=100, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ContractError, match=f"is a {kind}, which .*; choose one like BERT") as refused:
        load_classifier(tmp_path, GradeScale.load(tiny["pairs"]), max_length=32, seed=0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "0.auto_model."])
@pytest.mark.parametrize("left_out", ["", ".layer.1."])
def test_weights_that_are_not_the_encoders_are_refused(tiny, tmp_path, prefix, left_out):
    folder = tmp_path / "base"
    shutil.copytree(tiny["base"], folder)
    weights = load_file(folder / "model.safetensors")
    kept = {f"{prefix}{name}": tensor for name, tensor in weights.items() if not left_out or left_out not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    scale = GradeScale.load(tiny["pairs"])
    if not prefix and not left_out:
        load_classifier(folder, scale, max_length=32, seed=0)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ContractError, match=r"the weights in .* lack .* save_pretrained"):
        load_classifier(folder, scale, max_length=32, seed=0)


def test_a_scaled_embedding_stays_whole(tiny, tmp_path):
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 5 * super().forward(ids)

    model = load_classifier(tiny["base"], GradeScale.load(tiny["pairs"]), max_length=32, seed=0)
    scaled = Scaled(model.config.vocab_size, model.config.hidden_size)
    model.set_input_embeddings(scaled)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    with occurring_tokens(model, np.array([5, 6, 7])):
        torch.testing.assert_close(model(ids).logits, expected)
