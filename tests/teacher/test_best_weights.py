"""AGPO ends with the weights that did best on split valid, stops when nothing is gained, and resumes to the same."""

import json

import pytest
import torch

from data.contracts import MetricsLog
from teacher.config import CollapseConfig, TeacherConfig
from teacher.examples import Problem
from teacher.model import load_model
from teacher.policy import train_policy
from teacher.train import train_teacher
from tests.teacher.test_trainer import TINY


def config_with(every=1, **agpo) -> TeacherConfig:
    evaluation = TINY.evaluation.model_copy(update={"every": every})
    settings = TINY.agpo.model_copy(update={"keep": "best", "steps": 5, "learning_rate": 1e-3, **agpo})
    return TINY.model_copy(update={"evaluation": evaluation, "agpo": settings})


def trained(config, decoder, out, metrics, dies_at=None):
    """The result, its weights and, by step, those that were evaluated."""
    out.mkdir(exist_ok=True)
    model, tokenizer = load_model(decoder, config)
    log, seen = MetricsLog(out / "metrics.jsonl"), {0: weights(model)}

    def evaluate(live, step):
        seen[step] = weights(live)
        if step == dies_at:
            raise KeyboardInterrupt
        log.write("valid_agpo", step, {"pass@1": metrics[step]})
        return metrics[step]

    problems = [Problem(f"<|user|>{word}<|end|><|assistant|>", word) for word in "abcd"]
    # What is right does not matter here, only that groups are mixed.
    result = train_policy(
        config,
        model,
        tokenizer,
        problems,
        lambda text, gold: len(text) % 2 == 0,
        out / "agpo",
        log,
        evaluate,
        metrics[0],
    )
    return result, weights(model), seen


def weights(model):
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


METRICS = {0: 0.1, 1: 0.2, 2: 0.5, 3: 0.5, 4: 0.4, 5: 0.3}


@pytest.mark.parametrize(
    ("metrics", "settings", "kept", "last"),
    [
        (METRICS, {}, 2, 5),
        (METRICS | {5: 0.6}, {}, 5, 5),
        (METRICS | {0: 0.9}, {}, 0, 5),
        (METRICS, {"keep": "last"}, 5, 5),
        (METRICS | {5: 0.6}, {"patience": 2}, 2, 4),
        (METRICS, {"patience": 1, "keep": "last"}, 3, 3),
    ],
)
def test_the_weights_of_the_best_evaluation_are_kept_and_patience_ends(
    decoder, tmp_path, metrics, settings, kept, last
):
    result, found, seen = trained(config_with(**settings), decoder, tmp_path / "run", metrics)
    steps = [line["step"] for line in MetricsLog(tmp_path / "run" / "metrics.jsonl").read("agpo")]
    assert (result.step, steps[-1]) == (kept, last)
    if kept in seen:
        assert torch.equal(found, seen[kept])
    assert not torch.equal(seen[0], seen[max(seen)])


def test_a_killed_training_keeps_the_same_weights_and_evaluates_nothing_twice(decoder, tmp_path):
    config = config_with(patience=2)
    straight, expected, _ = trained(config, decoder, tmp_path / "straight", METRICS)
    with pytest.raises(KeyboardInterrupt):
        trained(config, decoder, tmp_path / "broken", METRICS, dies_at=4)
    resumed, found, _ = trained(config, decoder, tmp_path / "broken", METRICS)
    assert resumed.step == straight.step == 2
    assert (found - expected).abs().max() <= 1e-6
    lines = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    for phase in ("agpo", "valid_agpo"):
        assert [line["step"] for line in lines if line["phase"] == phase] == [1, 2, 3, 4]


def test_after_a_collapse_the_weights_are_the_best_evaluated_ones_and_the_reason_is_said(decoder, tmp_path):
    # Limits that no training can keep: the second step already counts as entropy falling.
    config = config_with(every=0, keep="last", collapse=CollapseConfig(window=1, min_entropy=1e6))
    result, found, seen = trained(config, decoder, tmp_path, METRICS)
    assert "repeats itself" in result.stopped
    assert [line["step"] for line in MetricsLog(tmp_path / "metrics.jsonl").read("agpo")] == [1, 2]
    assert torch.equal(found, seen[0])  # nothing was evaluated on the way


def test_the_teacher_says_which_step_it_is_of(decoder, pairs, tmp_path):
    result = train_teacher(config_with(every=2, metric="accuracy"), decoder, pairs, tmp_path)
    step = result.figures["agpo/step"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    valid = {line["step"]: line["accuracy"] for line in lines if line["phase"] in ("valid_warm_start", "valid_agpo")}
    assert sorted(valid) == [0, 2, 4, 5]
    assert valid[step] == max(valid.values()) == result.figures["agpo/accuracy"]
