"""Rollouts and evaluations by vLLM in the trainer's process: it must always hold the trainer's weights."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from teacher.config import TeacherConfig

from .test_trainer import TINY

SCRIPT = """
import json, sys
from pathlib import Path

import torch

from teacher import policy, train
from teacher.config import TeacherConfig
from teacher.engines.base import Sampling
from teacher.engines.transformers_engine import TransformersEngine

# What the engine says of the tokens it sampled, against the trained module itself, before the step's update; and how far
# the module's own log-probabilities of the last step's tokens have moved since, which is what stale weights would show.
differences, moves, last = [], [], None
original = policy.AGPOTrainer._generate_and_reward

def watched(self, inputs, group_size):
    global last
    output, rewards = original(self, inputs, group_size)
    def logps(of):
        ids = torch.cat([of["prompt_ids"], of["completion_ids"]], dim=1)
        mask = torch.cat([of["prompt_mask"], of["completion_mask"]], dim=1)
        with torch.no_grad():
            return self._get_per_token_logps_and_entropies(self.model, ids, mask, of["completion_ids"].size(1))[0]
    mask = output["completion_mask"].bool()
    differences.append(float((logps(output) - output["sampling_per_token_logps"])[mask].abs().max()))
    if last is not None:
        moves.append(float((logps(last[0]) - last[1])[last[0]["completion_mask"].bool()].abs().max()))
    last = (output, logps(output))
    return output, rewards

policy.AGPOTrainer._generate_and_reward = watched

# Every evaluation's greedy completions are those of the module that is evaluated.
plain_weights, evaluate, evaluations = train.plain_weights, train.evaluate, []

def weights(model):
    global live
    live = model
    return plain_weights(model)

def compared(engine, tokenizer, examples, **options):
    prompts = [tokenizer(example.prompt, add_special_tokens=False)["input_ids"] for example in examples]
    greedy = Sampling(temperature=0.0, max_tokens=8)
    found, expected = (
        [sample.token_ids for (sample,) in by.generate(prompts, greedy)]
        for by in (engine, TransformersEngine(live, tokenizer))
    )
    evaluations.append([type(engine).__name__, found == expected, found])
    return evaluate(engine, tokenizer, examples, **options)

train.plain_weights, train.evaluate = weights, compared
config = TeacherConfig.model_validate_json(sys.argv[1])
train.train_teacher(config, Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
print("FOUND", json.dumps({"differences": differences, "moves": moves, "evaluations": evaluations}))
"""


@pytest.mark.vllm
def test_the_engines_weights_follow_the_trainers(decoder, pairs, tmp_path):
    agpo = TINY.agpo.model_copy(update={"steps": 5, "rollouts": "vllm", "learning_rate": 1e-2})
    evaluation = TINY.evaluation.model_copy(update={"every": 3})
    config: TeacherConfig = TINY.model_copy(update={"agpo": agpo, "evaluation": evaluation})
    words = [config.model_dump_json(), str(decoder), str(pairs), str(tmp_path)]
    # A process of its own: TRL's engine and those of other tests do not share one.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *words],
        check=False,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND ")[1].splitlines()[0])
    assert len(found["differences"]) == 5
    assert max(found["differences"]) <= 1e-5, found
    # The updates are large enough that an engine left behind by one step could not have passed (the first step of the
    # linear warm-up has learning rate 0).
    assert found["moves"][0] == 0.0
    assert min(found["moves"][1:]) > 1e-3, found
    # Before and after the warm start, at step 3 and at the end; of weights that differ.
    assert [(engine, same) for engine, same, _ in found["evaluations"]] == [("VLLMEngine", True)] * 4
    assert len({str(completions) for *_, completions in found["evaluations"]}) > 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["prefix_cache_hit_rate"] <= 1 for line in lines if line["phase"] == "agpo")
