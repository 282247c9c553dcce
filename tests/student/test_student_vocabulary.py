"""Only the vectors of the tokens that occur are trained, and they are trained as ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.contracts import GradeScale, MetricsLog
from student.dataset import read_examples, tokenize
from student.fit import fit
from student.model import load_classifier
from student.reader import Reader
from student.scorer import load_tokenizer
from student.setup import Setup
from student.vocabulary import occurring_tokens

from .conftest import FAMILIES, make_base


@pytest.mark.parametrize("kind", FAMILIES)
def test_steps_over_the_occurring_tokens_are_those_over_the_whole_vocabulary(kind, tiny, tmp_path):
    scale, base = GradeScale.load(tiny["pairs"]), make_base(kind, tiny, tmp_path)
    rows = read_examples(tiny["pairs"], scale, "test").take(np.arange(12))
    tokens = tokenize(load_tokenizer(tmp_path / "tokenizer.json", 32), rows.queries, rows.ads, 0)

    def trained(ids):
        model = load_classifier(base, scale, max_length=32, seed=0)
        before = model.get_input_embeddings().weight.detach().clone()
        reader = Reader(model, "cpu")
        with occurring_tokens(model, ids):
            optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
            for _ in range(3):
                logits, _ = reader(tokens, np.arange(len(rows)))
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(logits, torch.from_numpy(rows.grade)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
        return model.state_dict(), before

    occurring = tokens.occurring()
    part, before = trained(occurring)
    whole, _ = trained(np.arange(len(before)))
    assert part.keys() == whole.keys()
    for name, weights in whole.items():
        torch.testing.assert_close(part[name], weights, atol=1e-6, rtol=1e-5)
    name = next(name for name, weights in part.items() if weights.shape == before.shape)
    changed = (part[name] != before).any(dim=1).nonzero()[:, 0].tolist()
    assert len(changed) > 5
    assert set(changed) <= set(occurring.tolist())
    assert len(occurring) < len(before)


def test_an_interrupted_training_leaves_the_embedding_whole(tiny):
    model = load_classifier(tiny["base"], GradeScale.load(tiny["pairs"]), max_length=32, seed=0)
    whole = model.get_input_embeddings()

    def interrupted():
        with occurring_tokens(model, np.array([3, 5, 5])):
            assert model.get_input_embeddings().weight.shape[0] == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.get_input_embeddings() is whole


def test_the_words_of_no_pair_keep_their_vectors(tiny, quick, tmp_path):
    scale = GradeScale.load(tiny["pairs"])
    config = quick(epochs=1)
    tokenizer = load_tokenizer(tiny["base"] / "tokenizer.json", config.max_length)
    setup = Setup(config, tiny["base"], tokenizer, scale, "cpu")
    train, valid = (read_examples(tiny["pairs"], scale, split).take(np.arange(6)) for split in ("train", "valid"))
    before = setup.reader().model.get_input_embeddings().weight.detach().clone()
    fitted = fit(
        setup,
        train,
        valid,
        folder=tmp_path / "checkpoints",
        metrics=MetricsLog(tmp_path / "metrics.jsonl"),
        phase="student",
    )
    after = fitted.reader.model.get_input_embeddings().weight
    read = setup.tokens(fitted.reader.model, train.joined(valid)).occurring()
    other = np.setdiff1d(np.arange(len(before)), read)
    assert len(other) > 5
    assert (after[other] == before[other]).all()
    assert (after[read] != before[read]).any()
    assert np.isfinite(setup.logits(fitted.reader, read_examples(tiny["pairs"], scale, "test"))).all()
