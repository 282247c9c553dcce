"""A score depends on its pair alone: an encoder that lets padding into a text's vectors is refused when it is loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from data.contracts import ContractError, GradeScale
from student.baselines import Encoder
from student.distill import distill
from student.model import load_classifier, save_tokenizer

from .conftest import FAMILIES, SIZES, make_base

MIXED = ("fnet", "nystromformer", "convbert", "yoso", "canine")


def mixed_base(kind, tiny, folder):
    FAMILIES[kind] = SIZES
    try:
        return make_base(kind, tiny, folder)
    finally:
        del FAMILIES[kind]


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("max_length", [16, 96])
def test_an_encoder_that_mixes_padding_in_is_refused(kind, max_length, tiny, tmp_path):
    base, scale = mixed_base(kind, tiny, tmp_path), GradeScale.load(tiny["pairs"])
    message = rf"is a {kind}, whose vectors of a text depend on .* padding \(they moved by .*%\); choose one like BERT"
    with pytest.raises(ContractError, match=message) as refused:
        load_classifier(base, scale, max_length=max_length, seed=0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("max_length", [16, 77])
def test_the_families_that_work_are_not_even_with_wide_weights(kind, max_length, tiny, tmp_path):
    """Weights ten times as wide as new ones, since a trained encoder's are no longer as even as those."""
    base = make_base(kind, tiny, tmp_path)
    encoder = AutoModel.from_pretrained(base)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    encoder.save_pretrained(base)
    load_classifier(base, GradeScale.load(tiny["pairs"]), max_length=max_length, seed=0)


def test_a_text_that_sees_the_others_of_its_batch_is_noticed(tiny, monkeypatch):
    layer = type(load_classifier(tiny["base"], GradeScale.load(tiny["pairs"]), max_length=32, seed=0).base_model)
    forward = layer.forward

    def leaking(self, *args, **given):
        output = forward(self, *args, **given)
        output.last_hidden_state = output.last_hidden_state - output.last_hidden_state.mean(dim=0, keepdim=True)
        return output

    monkeypatch.setattr(layer, "forward", leaking)
    with pytest.raises(ContractError, match="depend on the others of a batch"):
        load_classifier(tiny["base"], GradeScale.load(tiny["pairs"]), max_length=32, seed=0)


def test_the_training_and_the_cosine_of_another_encoder_refuse_it_too(tiny, quick, tmp_path):
    base = mixed_base("fnet", tiny, tmp_path / "base")
    with pytest.raises(ContractError, match="is a fnet, whose vectors"):
        distill(quick(epochs=1), base, tiny["pairs"], tiny["annotations"], tmp_path / "student")
    tokenizer = save_tokenizer(base, tmp_path / "tokenizer", 32)
    with pytest.raises(ContractError, match="is a fnet, whose vectors"):
        Encoder(base, tokenizer, 8, "cpu").cosine(["red kettle"], ["kettle"])
    warm_up = {"pairs": 20, "encoder": f"path:{base}"}
    with pytest.raises(ContractError, match="is a fnet, whose vectors"):
        distill(
            quick(epochs=1, warm_up=warm_up),
            tiny["base"],
            tiny["pairs"],
            tiny["annotations"],
            tmp_path / "warm",
            scored_by=base,
        )


def test_an_encoder_that_cannot_read_so_many_tokens_says_so(tiny, tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16, "feed_forward_size": 64}
    places = {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "is_decoder": False}
    AutoModel.from_config(AutoConfig.for_model("reformer", vocab_size=100, **sizes, **places)).save_pretrained(tmp_path)
    with pytest.raises(
        ContractError, match=r"is a reformer, which cannot read texts of 96 tokens in a batch \(.*axial"
    ):
        load_classifier(tmp_path, GradeScale.load(tiny["pairs"]), max_length=96, seed=0)
