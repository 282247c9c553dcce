"""The estimator experiment's arithmetic and table, on results made by hand; and one real, tiny run of a method."""

import json
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import estimator_run, estimators


def write(folder, method, seed, right, samples=4):
    path = estimator_run.result_file(folder, method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = {
        "samples": samples,
        "greedy": float(np.mean(np.array(right) > 1)),
        "right": right,
        "distinct": [min(r, 2) for r in right],
        "parse_rate": 1.0,
        "entropy": 0.5,
        "tokens": 10.0,
    }
    path.write_text(
        json.dumps({"method": method, "seed": seed, "test": drawn, "valid": drawn, "sampled_tokens": 100.0})
    )


def test_summary_and_table_by_hand(tmp_path):
    for seed in (0, 1):
        write(tmp_path, "base", seed, [1, 1, 1, 1])
        write(tmp_path, "warm_start", seed, [1, 1, 2, 0])
        write(tmp_path, "grpo", seed, [4, 4, 0, 0])
        write(tmp_path, "agpo", seed, [2, 2, 2, 2])
    found = estimators.summarise(tmp_path, ["base", "warm_start", "grpo", "agpo"], [0, 1])
    assert found["methods"]["base"]["pass"][1] == [0.25, 0.25, 0.25]
    assert found["methods"]["base"]["pass"][4] == [1.0, 1.0, 1.0]
    mean, low, high = found["methods"]["grpo"]["pass"][4]
    assert mean == 0.5
    assert low < mean < high
    assert found["methods"]["grpo"]["greedy"] == [0.5, 0.0]
    assert found["differences"]["agpo - base, pass@4"] == [0.0, 0.0, 0.0]
    assert found["differences"]["grpo - base, pass@4"][0] == -0.5
    assert found["differences"]["agpo - grpo, pass@1"][0] == 0.0
    text = estimators.table(found)
    assert "| agpo | 1.000 ± 0.000 | 0.500 [0.500, 0.500]" in text
    estimators.plot(found, tmp_path / "passk.png")
    assert (tmp_path / "passk.png").stat().st_size > 5000


def test_ablation_names_have_files_of_their_own(tmp_path):
    names = {estimator_run.result_file(tmp_path, method, 0).name for method in estimators.ABLATION}
    assert len(names) == len(estimators.ABLATION)
    for method in estimators.ABLATION:
        # R = -1 gets 32 of 64 right, the others none; delta makes no difference
        write(tmp_path, method, 0, [32, 32] if method.endswith("=-1") else [0, 0], samples=64)
    found = estimators.ablation(tmp_path, 0)
    assert set(found["cells"]) == set(estimators.ABLATION)
    assert found["effects"]["R -1 - R 0, pass@1"] == [0.5, 0.5, 0.5]
    assert found["effects"]["delta 2 - delta 0.5, pass@16"] == [0.0, 0.0, 0.0]


@pytest.fixture
def tiny_countdown(monkeypatch):
    """The countdown task cut to seconds: same code, fewer problems and steps."""
    whole = estimator_run._countdown

    def cut(options):
        task = whole(options)
        agpo = task.config.agpo.model_copy(update={"steps": 4, "prompts_per_step": 2, "max_sampled_tokens": 400})
        config = task.config.model_copy(update={"agpo": agpo})
        from benchmarks.countdown import make_model

        return estimator_run.Task(
            base=lambda seed, out: make_model(out, seed, hidden=16, layers=1),
            warm=lambda tokenizer: task.warm(tokenizer)[:32],
            train=lambda tokenizer: task.train(tokenizer)[:20],
            valid=lambda tokenizer: task.valid(tokenizer)[:2],
            test=lambda tokenizer: task.test(tokenizer)[:3],
            judge=task.judge,
            config=config,
            samples={"valid": 2, "test": 4},
        )

    monkeypatch.setattr(estimator_run, "_countdown", cut)


@pytest.mark.e2e
def test_a_method_is_trained_within_the_budget_sampled_and_kept(tmp_path, tiny_countdown):
    options = Namespace(task="countdown", out=tmp_path)
    for method in ("base", "warm_start", "grpo", "agpo:delta=0.5,negative=-0.1"):
        estimator_run.run_method(options, method, 1)
    folder = tmp_path / "countdown"
    grpo = json.loads(estimator_run.result_file(folder, "grpo", 1).read_text())
    assert len(grpo["test"]["right"]) == 3
    assert grpo["test"]["samples"] == 4
    # 16 completions a step of at most 19 tokens: the budget, not the number of steps, ends it
    assert 2 <= grpo["steps"] < 4
    assert 400 <= grpo["sampled_tokens"] < 400 + 16 * 19
    assert "test" not in json.loads(estimator_run.result_file(folder, "agpo:delta=0.5,negative=-0.1", 1).read_text())
    before = estimator_run.result_file(folder, "grpo", 1).stat().st_mtime_ns
    estimator_run.run_method(options, "grpo", 1)
    assert estimator_run.result_file(folder, "grpo", 1).stat().st_mtime_ns == before
