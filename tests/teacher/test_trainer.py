"""The trainer on a tiny model: our advantages reach TRL's loss, and a killed training continues."""

import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from typing import get_args

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from safetensors.torch import load_file

from data.contracts import ContractError, MetricsLog
from teacher.advantages import ESTIMATORS, group_statistics
from teacher.config import AGPOConfig, EvaluationConfig, PromptConfig, TeacherConfig, WarmStartConfig
from teacher.distributed import launch
from teacher.model import load_model
from teacher.policy import estimator
from teacher.train import train_teacher
from teacher.trainer import AGPOTrainer
from teacher.trl_parts import GRPOConfig, GRPOTrainer

from .conftest import write_pairs

TINY = TeacherConfig(
    model="scratch:tiny",
    prompt=PromptConfig(guideline="Grade.", definitions=False),
    warm_start=WarmStartConfig(examples=16, epochs=2, batch_size=8, loss_on_prompt=True),
    agpo=AGPOConfig(steps=4, group_size=4, prompts_per_step=2, checkpoint_every=2, keep="last"),
    evaluation=EvaluationConfig(examples=4, every=0, samples=2, test=False),
    max_completion_tokens=12,
)


def trl_arguments(out, **options):
    """For a trainer of ours on the CPU, in groups of four, leaving nothing behind."""
    return GRPOConfig(
        output_dir=str(out),
        num_generations=4,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        **options,
    )


def test_trls_private_surface_is_where_we_override_it():
    expected = {
        "_tokenize_prompts": ["self", "prompts"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_get_per_token_logps_and_entropies": [
            *("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
            *("batch_size", "compute_entropy", "compute_aux_loss"),
        ],
        "_compute_loss": ["self", "model", "inputs"],
    }
    for name, parameters in expected.items():
        found = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
        assert found[: len(parameters)] == parameters


def test_group_statistics_by_hand():
    rewards = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [float("nan"), 1.0]])
    advantages = torch.tensor([[0.0, 0.0], [-1.0, -1.0], [0.5, -1.5], [0.0, 0.0]])
    found = group_statistics(rewards, advantages)
    assert found["accuracy"] == pytest.approx(4 / 7)
    assert found["groups/all_right"] == 0.5
    assert found["groups/all_wrong"] == 0.25
    assert found["groups/mixed"] == 0.25
    assert found["advantage/positive"] == pytest.approx(0.5 / 8)
    assert found["advantage/negative"] == pytest.approx(-3.5 / 8)


def test_the_loss_gets_our_advantages(decoder, tmp_path):
    model, tokenizer = load_model(decoder, TINY)
    seen, used = [], []

    def marked(rewards):
        seen.append(rewards.clone())
        return torch.arange(rewards.numel(), dtype=torch.float32).view_as(rewards) - 3.0

    class Spy(AGPOTrainer):
        def _compute_loss(self, model, inputs):
            used.extend(inputs["advantages"].tolist())
            return super()._compute_loss(model, inputs)

    trainer = Spy(
        model=model,
        args=trl_arguments(tmp_path, per_device_train_batch_size=8, max_completion_length=6, max_steps=1),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "<|user|>a<|end|><|assistant|>"}] * 4),
        reward_funcs=lambda completions, **_: [1.0 if i % 2 else -1.0 for i in range(len(completions))],
        advantages=marked,
    )
    trainer.train()
    assert seen[0].shape == (2, 4)
    assert set(seen[0].flatten().tolist()) == {-1.0, 1.0}
    assert sorted(used) == [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    assert list(trainer._logs["advantages"]) == [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.fixture(scope="module")
def undisturbed(decoder, pairs, tmp_path_factory):
    """The folder and the result of one training."""
    out = tmp_path_factory.mktemp("undisturbed")
    return out, train_teacher(TINY, decoder, pairs, out)


def steps_of(out):
    return MetricsLog(out / "metrics.jsonl").read("agpo")


def assert_same_weights(one, other):
    expected, found = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) <= 1e-6


def test_train_teacher_leaves_a_complete_folder(undisturbed):
    out, result = undisturbed
    names = ("model.safetensors", "tokenizer.json", "scale.json", "teacher.json", "model_card.md", "metrics.json")
    assert all((out / "model" / name).stat().st_size for name in names)
    assert not (out / "checkpoints").exists()
    assert [line["step"] for line in steps_of(out)] == [1, 2, 3, 4]
    assert {"accuracy", "entropy", "parse_rate", "groups/mixed"} <= set(steps_of(out)[-1])
    assert json.loads((out / "model" / "teacher.json").read_text())["fingerprint"] == result.fingerprint
    assert {"base/accuracy", "warm_start/accuracy", "agpo/accuracy"} <= set(result.figures)


@pytest.mark.parametrize(
    ("steps", "setting"), [(0, "teacher.warm_start.batch_size"), (1, "teacher.agpo.micro_batch_tokens")]
)
def test_a_step_that_does_not_fit_into_memory_names_the_setting(decoder, pairs, tmp_path, monkeypatch, steps, setting):
    def full(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    warm = TINY.warm_start.model_copy(update={"examples": 0 if steps else 8})
    config = TINY.model_copy(update={"warm_start": warm, "agpo": TINY.agpo.model_copy(update={"steps": steps})})
    monkeypatch.setattr("transformers.Trainer.training_step", full)
    monkeypatch.setattr("teacher.trainer.AGPOTrainer.training_step", full)
    with pytest.raises(ContractError, match=f"memory is not enough.*2.00 GiB.*halve {setting}"):
        train_teacher(config, decoder, pairs, tmp_path)


def test_few_examples_get_more_passes_and_unreadable_answers_are_said_early(decoder, pairs, tmp_path, caplog):
    warm = WarmStartConfig(examples=4, epochs=1, batch_size=8, min_steps=3)
    config = TINY.model_copy(update={"warm_start": warm, "agpo": TINY.agpo.model_copy(update={"steps": 1})})
    with caplog.at_level(logging.WARNING):
        train_teacher(config, decoder, pairs, tmp_path)
    assert MetricsLog(tmp_path / "metrics.jsonl").read("warm_start")[-1]["step"] == 3
    assert "0 % of the answers after the warm start can be read" in caplog.text


def test_killed_and_resumed_gives_the_weights_of_an_undisturbed_training(undisturbed, decoder, pairs, tmp_path):
    straight, broken = undisturbed[0], tmp_path
    # A real kill −9 in a process of its own, at AGPO's third step: after the checkpoint of step 2.
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from data.contracts import MetricsLog
        from teacher.config import TeacherConfig
        from teacher.train import train_teacher

        write = MetricsLog.write

        def die(self, phase, step, values):
            write(self, phase, step, values)
            if (phase, step) == ("agpo", 3):
                os.kill(os.getpid(), signal.SIGKILL)

        MetricsLog.write = die

        config = TeacherConfig.model_validate_json({TINY.model_dump_json()!r})
        train_teacher(config, Path({str(decoder)!r}), Path({str(pairs)!r}), Path({str(broken)!r}))
    """)
    killed = subprocess.run([sys.executable, "-c", script], check=False, env=dict(os.environ), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    train_teacher(TINY, decoder, pairs, broken)
    assert_same_weights(straight, broken)
    assert [line["step"] for line in steps_of(broken)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("phase", "step"), [("warm_start", 20), ("agpo", 4)])
def test_a_kill_inside_a_checkpoint_goes_on_from_the_whole_one(undisturbed, decoder, pairs, tmp_path, phase, step):
    straight, broken = undisturbed[0], tmp_path
    longer = TINY.warm_start.model_copy(update={"min_steps": 24})  # a checkpoint every ten steps
    config = TINY if phase == "agpo" else TINY.model_copy(update={"warm_start": longer})
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        import transformers
        from teacher.config import TeacherConfig
        from teacher.train import train_teacher

        written = transformers.Trainer._save_optimizer_and_scheduler

        def die(self, folder):  # the checkpoint has its weights, and nothing else yet
            if folder.endswith("{phase}/checkpoint-{step}"):
                os.kill(os.getpid(), signal.SIGKILL)
            return written(self, folder)

        transformers.Trainer._save_optimizer_and_scheduler = die
        config = TeacherConfig.model_validate_json({config.model_dump_json()!r})
        train_teacher(config, Path({str(decoder)!r}), Path({str(pairs)!r}), Path({str(broken)!r}))
    """)
    killed = subprocess.run([sys.executable, "-c", script], check=False, env=dict(os.environ), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    half = broken / "checkpoints" / phase / f"checkpoint-{step}"
    assert half.exists()
    assert not (half / "trainer_state.json").exists()
    train_teacher(config, decoder, pairs, broken)
    steps = [line["step"] for line in MetricsLog(broken / "metrics.jsonl").read(phase)]
    assert steps == sorted(set(steps))
    assert steps[-1] >= step
    if phase == "agpo":
        assert_same_weights(straight, broken)


@pytest.mark.parametrize("agpo", [{}, {"max_sampled_tokens": 150}, {"patience": 1, "keep": "last"}])
def test_a_kill_after_the_last_step_trains_no_further(decoder, pairs, tmp_path, monkeypatch, agpo):
    evaluation = TINY.evaluation.model_copy(update={"every": 1})
    config = TINY.model_copy(update={"agpo": TINY.agpo.model_copy(update=agpo), "evaluation": evaluation})
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    straight = train_teacher(config, decoder, pairs, tmp_path / "straight")

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("teacher.train._Training.save", killed)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(config, decoder, pairs, tmp_path / "broken")
    resumed = train_teacher(config, decoder, pairs, tmp_path / "broken")
    assert resumed.figures == straight.figures
    assert_same_weights(tmp_path / "straight", tmp_path / "broken")
    assert len(steps_of(tmp_path / "broken")) == len(steps_of(tmp_path / "straight"))


@pytest.mark.parametrize("killed", [False, True])
def test_kl_is_against_the_warm_start(decoder, pairs, tmp_path, monkeypatch, killed):
    agpo = TINY.agpo.model_copy(update={"kl": 0.1, "steps": 2, "learning_rate": 1e-9})
    config = TINY.model_copy(update={"agpo": agpo})
    if killed:

        def die(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("teacher.train.train_policy", die)
            with pytest.raises(KeyboardInterrupt):
                train_teacher(config, decoder, pairs, tmp_path)
    train_teacher(config, decoder, pairs, tmp_path)
    assert [step["kl"] for step in steps_of(tmp_path)] == pytest.approx([0, 0], abs=1e-6)


def test_a_split_that_is_missed_at_the_end_is_missed_at_the_beginning(decoder, tmp_path):
    (tmp_path / "pairs").mkdir()
    folder = write_pairs(tmp_path / "pairs")
    table = pq.read_table(file := folder / "pairs" / "part.parquet")
    pq.write_table(table.filter(pc.not_equal(table["split"], "test")), file)
    tested = TINY.evaluation.model_copy(update={"test": True})
    with pytest.raises(ContractError, match=r"'test' has no labelled pair; .*or set teacher\.evaluation\.test = false"):
        train_teacher(TINY.model_copy(update={"evaluation": tested}), decoder, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_estimator_of_the_config_exists_and_gets_the_rewards_it_takes():
    names = get_args(AGPOConfig.model_fields["estimator"].annotation)
    assert set(names) == set(ESTIMATORS)
    signs = torch.tensor([[1.0, -1.0, -1.0, float("nan")]])
    for name in names:
        made = estimator(AGPOConfig(estimator=name))(signs)
        takes = signs if name == "agpo" else (signs + 1) / 2
        assert torch.equal(made, ESTIMATORS[name](takes))


def test_dynamic_sampling_replaces_groups_that_teach_nothing(decoder, tmp_path):
    """A third of the prompts is always right, a third always wrong: only mixed groups reach the loss."""
    model, tokenizer = load_model(decoder, TINY)
    kinds = {"<|user|>a<|end|><|assistant|>": "right", "<|user|>b b<|end|><|assistant|>": "wrong"}
    mixed = "<|user|>c c c<|end|><|assistant|>"
    calls, batches = [], []

    def score(prompts, completions, **_):
        calls.append(len(prompts))
        return [
            {"right": 1.0, "wrong": -1.0}.get(kinds.get(prompt), 1.0 if i % 2 else -1.0)
            for i, prompt in enumerate(prompts)
        ]

    class Spy(AGPOTrainer):
        def _compute_loss(self, model, inputs):
            batches.append({name: value.clone() for name, value in inputs.items()})
            return super()._compute_loss(model, inputs)

    def train(rounds):
        calls.clear()
        batches.clear()
        trainer = Spy(
            model=model,
            args=trl_arguments(tmp_path, per_device_train_batch_size=12, max_completion_length=5, max_steps=2, seed=3),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in [*kinds, mixed] * 4]),
            reward_funcs=score,
            advantages=estimator(AGPOConfig()),
            dynamic_sampling=rounds,
        )
        trainer.train()
        return trainer

    train(0)
    assert calls == [12, 12]
    trainer = train(40)
    assert len(calls) > 2
    for batch in batches:
        prompts = [
            tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        assert set(prompts) == {mixed}
        assert (batch["advantages"] != 0).all()
        assert batch["completion_ids"].shape == batch["completion_mask"].shape
        assert (batch["completion_mask"].sum(dim=1) >= 1).all()
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert trainer.state.log_history[0]["dynamic_sampling/kept_uniform"] == 0.0
    # when nothing is mixed, the rounds end and the groups stay
    mixed = "none"
    trainer = train(1)
    assert calls == [12, 12, 12, 12]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"top_p": 0.9}, "whole distribution"),
        ({"top_k": 20}, "whole distribution"),
        ({"generation_batches": 3, "checkpoint_every": 4}, "checkpoint_every"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(changed, word):
    with pytest.raises(ValidationError, match=word):
        AGPOConfig(**changed)
    with pytest.raises(ValidationError, match=r"completions .* cannot be shared among 3 processes"):
        TeacherConfig(processes=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is refused without a GPU")
def test_a_rollout_server_is_refused_without_a_gpu(decoder, pairs, tmp_path):
    config = TINY.model_copy(update={"agpo": TINY.agpo.model_copy(update={"rollouts": "vllm-server"})})
    with pytest.raises(ContractError, match="needs a CUDA GPU"):
        train_teacher(config, decoder, pairs, tmp_path)


def test_a_failed_process_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="2 processes failed with exit code 1"):
        launch("no.such.module", 2, {}, tmp_path)
