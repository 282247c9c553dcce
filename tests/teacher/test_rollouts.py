"""Rollouts and evaluations by vLLM in the trainer's process: it must always hold the trainer's weights."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from data.contracts import MetricsLog

from .test_trainer import TINY

SCRIPT = """
import json, sys
from pathlib import Path

from teacher import train
from teacher.config import TeacherConfig
from teacher.engines.base import Sampling
from teacher.engines.transformers_engine import TransformersEngine

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
train.train_teacher(config, *map(Path, sys.argv[2:]))
print("FOUND", json.dumps(evaluations))
"""


@pytest.mark.vllm
def test_the_engines_weights_follow_the_trainers(decoder, pairs, tmp_path):
    agpo = TINY.agpo.model_copy(update={"steps": 5, "rollouts": "vllm", "learning_rate": 1e-2})
    evaluation = TINY.evaluation.model_copy(update={"every": 3})
    config = TINY.model_copy(update={"agpo": agpo, "evaluation": evaluation})
    # A process of its own: TRL's engine and those of other tests do not share one.
    words = [config.model_dump_json(), str(decoder), str(pairs), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # What the engine says of the tokens it sampled, against the trained module itself before the step's update.
    steps = MetricsLog(tmp_path / "metrics.jsonl").read("agpo")
    assert len(steps) == 5
    assert max(step["sampling/sampling_logp_difference/max"] for step in steps) <= 1e-5
    assert all(0 <= step["prefix_cache_hit_rate"] <= 1 for step in steps)
    # The updates are so large that an engine left behind could not have passed.
    old, new = (load_file(folder / "model.safetensors") for folder in (decoder, tmp_path / "model"))
    assert max(float((new[name] - old[name]).abs().max()) for name in old) > 1e-2
    # Before and after the warm start, at step 3 and at the end; of weights that differ.
    evaluations = json.loads(done.stdout.split("FOUND ")[1].splitlines()[0])
    assert [(engine, same) for engine, same, _ in evaluations] == [("VLLMEngine", True)] * 4
    assert len({str(completions) for *_, completions in evaluations}) > 1
