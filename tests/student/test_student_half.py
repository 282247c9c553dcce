"""Gradients in bfloat16 on a CPU: near those in float32, and added up in float32."""

import numpy as np
import pytest
import torch

from data.contracts import ContractError, GradeScale, MetricsLog
from student import checkpoint
from student.dataset import read_examples, tokenize
from student.fit import fit
from student.half import HalfReader, gains
from student.model import load_classifier
from student.reader import Reader
from student.scorer import load_tokenizer
from student.setup import Setup

from .conftest import FAMILIES, make_base


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_are_near_those_in_float32(kind, tiny, tmp_path):
    scale = GradeScale.load(tiny["pairs"])
    model = load_classifier(make_base(kind, tiny, tmp_path), scale, max_length=32, seed=0)
    rows = read_examples(tiny["pairs"], scale, "test")
    tokens = tokenize(load_tokenizer(tmp_path / "tokenizer.json", 32), rows.queries, rows.ads, 0)
    whole = Reader(model, "cpu")
    half = HalfReader(whole)

    def logits_and_gradient(read, after=lambda: None):
        model.zero_grad()
        logits, vectors = read(tokens, np.arange(24))
        (logits.float().logsumexp(dim=1).sum() + vectors.float()[:, 0].sum()).backward()
        after()
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return logits.detach().float(), torch.cat([g.flatten() for g in gradient])

    half.refresh()
    expected, found = logits_and_gradient(whole), logits_and_gradient(half, half.hand_over)
    assert half.copy.packs == whole.packs
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(found[0], expected[0], atol=0.03, rtol=0)
    assert torch.nn.functional.cosine_similarity(found[1], expected[1], dim=0) > 0.99


def training(quick, tiny, tmp_path, name, **changed):
    scale = GradeScale.load(tiny["pairs"])
    config = quick(epochs=2, patience=2, **changed)
    tokenizer = load_tokenizer(tiny["base"] / "tokenizer.json", config.max_length)
    setup = Setup(config, tiny["base"], tokenizer, scale, "cpu")
    rows, valid = (read_examples(tiny["pairs"], scale, split) for split in ("train", "valid"))
    folder = tmp_path / name
    fitted = fit(setup, rows, valid, folder=folder, metrics=MetricsLog(tmp_path / f"{name}.jsonl"), phase="student")
    return torch.cat([p.detach().flatten() for p in fitted.reader.model.parameters()])


def test_updates_that_bfloat16_cannot_tell_apart_are_learned(tiny, quick, tmp_path):
    start = training(quick, tiny, tmp_path, "start", precision="bf16", learning_rate=1e-12)
    moved = {p: training(quick, tiny, tmp_path, p, precision=p, learning_rate=1e-6) - start for p in ("fp32", "bf16")}
    assert 0 < moved["bf16"].abs().max() < 1e-4
    assert torch.nn.functional.cosine_similarity(moved["bf16"], moved["fp32"], dim=0) > 0.9


def test_a_killed_training_in_bfloat16_ends_as_an_uninterrupted_one(tiny, quick, tmp_path, monkeypatch):
    whole = training(quick, tiny, tmp_path, "whole", precision="bf16")
    real = checkpoint.save

    def killed(folder, progress, *state):
        real(folder, progress, *state)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        training(quick, tiny, tmp_path, "cut", precision="bf16")
    monkeypatch.setattr(checkpoint, "save", real)
    assert torch.equal(training(quick, tiny, tmp_path, "cut", precision="bf16"), whole)


@pytest.mark.parametrize(
    ("width", "units", "expected"),
    [(384, "amx_bf16", True), (384, "avx512_bf16", True), (384, "avx512_f", False), (32, "amx_bf16", False)],
)
def test_auto_takes_it_where_it_is_faster(width, units, expected, tiny, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, units: True})
    model = load_classifier(tiny["base"], GradeScale.load(tiny["pairs"]), max_length=32, seed=0)
    model.config.hidden_size = width
    assert gains(Reader(model, "cpu")) == expected


def test_a_student_that_does_not_fit_into_memory_is_one_sentence(tiny, quick, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("student.objective.Objective.backward", full)
    with pytest.raises(ContractError, match=r"2\.00 GiB.*halve student\.batch_size"):
        training(quick, tiny, tmp_path, "full")
