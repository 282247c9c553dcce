from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from data.contracts import GradeScale
from student.dataset import read_examples, tokenize
from student.model import load_classifier
from student.packing import first_fit, pack
from student.reader import Reader, predict_logits
from student.scorer import load_tokenizer

from .conftest import FAMILIES, PADDED, make_base


@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_pairs_are_read_as_padded_ones_and_so_are_their_gradients(kind, tiny, tmp_path, caplog):
    """Of a family that cannot read packed pairs the log says so, and its batches are padded."""
    scale = GradeScale.load(tiny["pairs"])
    model = load_classifier(make_base(kind, tiny, tmp_path), scale, max_length=32, seed=0)
    rows = read_examples(tiny["pairs"], scale, "test")
    tokens = tokenize(load_tokenizer(tmp_path / "tokenizer.json", 32), rows.queries, rows.ads, 0)
    assert len(set(tokens.lengths)) > 2

    def logits_and_gradient(reader):
        model.zero_grad()
        logits, vectors = reader(tokens, np.arange(24))
        logits.logsumexp(dim=1).sum().backward()
        return logits.detach(), vectors.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed, padded = Reader(model, "cpu"), Reader(model, "cpu")
    padded.packs = False
    with caplog.at_level(logging.INFO):
        found, expected = logits_and_gradient(packed), logits_and_gradient(padded)
    assert packed.packs == (kind not in PADDED)
    assert ("batches are padded" in caplog.text) == (kind in PADDED)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)
    for a, b in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(predict_logits(packed, tokens, 7), predict_logits(padded, tokens, 48), atol=1e-5)


def test_a_sliding_window_is_noticed_though_the_first_pairs_are_short(tiny, tmp_path):
    encoder = AutoModel.from_config(
        AutoConfig.for_model(
            "modernbert", vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, local_attention=8, global_attn_every_n_layers=2, max_position_embeddings=128,
            pad_token_id=0,
        )
    )  # fmt: skip
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    encoder.save_pretrained(tmp_path / "base")
    model = load_classifier(tmp_path / "base", GradeScale.load(tiny["pairs"]), max_length=64, seed=0)
    tokenizer = load_tokenizer(tiny["base"] / "tokenizer.json", 64)
    title = read_examples(tiny["pairs"], GradeScale.load(tiny["pairs"]), "test").ads[0]
    short, mixed = (
        tokenize(tokenizer, ["red"] * 12, ["a"] * 8 + [long] * 4, 0) for long in ("b", " ".join([title] * 20))
    )
    reader, padded = Reader(model, "cpu"), Reader(model, "cpu")
    padded.packs = False
    assert reader.can_pack(short)
    with torch.inference_mode():
        found = reader(mixed, np.arange(12))[0]
        torch.testing.assert_close(found, padded(mixed, np.arange(12))[0], atol=1e-5, rtol=0)
    assert not reader.packs


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_every_pair_is_in_one_row_and_no_row_is_too_long(lengths):
    rows = first_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 64
    assert sum(total <= 32 for total in filled) <= 1  # two half-empty rows would have been one


def test_positions_and_segments_begin_anew_with_each_pair(tiny):
    tokenizer = load_tokenizer(tiny["base"] / "tokenizer.json", 32)
    tokens = tokenize(tokenizer, ["red kettle", "sofa", "blue tent"], ["kettle", "red sofa", "blue tent " * 9], 0)
    packed = pack(tokens, np.arange(3), width=20, first_position=2)
    assert packed.input_ids.shape[1] == tokens.lengths.max()
    for i in range(3):
        at = packed.pair[packed.row[i]] == packed.slot[i]
        assert packed.input_ids[packed.row[i]][at].tolist() == tokens.ids[i]
        assert packed.token_type_ids[packed.row[i]][at].tolist() == tokens.type_ids[i]
        assert packed.position_ids[packed.row[i]][at].tolist() == list(range(2, 2 + len(tokens.ids[i])))
        assert packed.start[packed.row[i], packed.slot[i]] == np.flatnonzero(at)[0]
    assert ((packed.input_ids == 0) == (packed.pair == -1)).all()
