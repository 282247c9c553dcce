"""The GPU package's commands on the CPU, with a tiny model: what is packed here works there, and comes back in time."""

import json
import subprocess
import sys
import tarfile
import time

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.gpu.merge import main as merge
from benchmarks.gpu.pack import pack
from benchmarks.gpu.policies import train
from benchmarks.gpu.report import report
from data.contracts import ANNOTATIONS, PAIRS, ContractError, read_json
from pipeline.settings import choose
from teacher.model import add_adapters, load_causal_lm, weights_fingerprint
from teacher.prompt import load_prompt
from teacher.scratch import make_decoder
from tests.teacher.conftest import write_pairs

RECIPE = """
[teacher]
model = "scratch:tiny"
dtype = "float32"
gradient_checkpointing = false
max_completion_tokens = 16
[teacher.prompt]
guideline = "Grade the ad."
definitions = false
[teacher.warm_start]
examples = 32
epochs = 1
batch_size = 16
learning_rate = 1e-3
[teacher.agpo]
steps = 2
prompts_per_step = 2
group_size = 4
rollouts = "transformers"
[teacher.evaluation]
examples = 8
samples = 2
base = false
test = false
[annotate]
n = 2
limit = 40
max_in_flight = 32
[annotate.engine]
kind = "transformers"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders `pairs`, `model` and `there`, which is what the GPU machine has of the parcels."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "pairs").mkdir()
    pairs = write_pairs(folder / "pairs", rows=120)
    table = pq.read_table(pairs / "pairs")
    pool = [
        {**row, "pair_id": f"p{row['pair_id']}", "split": "pool"}
        for row in table.to_pylist()
        if row["split"] == "train"
    ]
    pq.write_table(type(table).from_pylist(pool, schema=PAIRS), pairs / "pairs" / "pool.parquet")
    make_decoder(pairs, folder / "model", "tiny", 0)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def run(place, seconds):
    words = ["--out", place / "out", "--seconds", seconds, "--every", 1, "--config", place / "recipe.toml"]
    command = [sys.executable, "-m", "benchmarks.gpu", "run", place / "there", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.e2e
def test_packed_trained_annotated_and_measured(place, capsys):
    pack(place / "there", place / "pairs", str(place / "model"), 200_000, wheels=False)
    assert len(list((place / "there").glob("parcel-*"))) > 1
    with pytest.raises(ContractError, match="holds parcels already"):
        pack(place / "there", place / "pairs", str(place / "model"), 200_000, wheels=False)

    began = time.monotonic()
    assert "run it again" in run(place, 13)  # killed in the middle
    assert time.monotonic() - began < 13

    assert "all phases are done" in run(place, 500)
    out = place / "out"
    phases = read_json(out / "summary.json")["phases"]
    assert not [name for name, result in phases.items() if "error" in result]
    # The two trainers were measured on the same work.
    assert phases["step_ours"]["completions"] == phases["step_stock"]["completions"]
    assert 2 <= phases["agpo"]["steps"] <= phases["plan"]["steps"]
    assert phases["agpo"]["warm_start/pass@1"] == phases["warm_start"]["warm_start/pass@1"]
    assert phases["annotate_pool"]["pool"]["annotated"] == phases["annotate_pool"]["pool"]["pairs"] == 40
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"warm_start", "agpo", "grpo"} == {line["part"] for line in lines}
    files = list(out.iterdir())
    assert len(files) <= 8  # as many as come back from a call
    tables = {file.stem.split("-")[1]: pq.read_table(file) for file in files if file.suffix == ".parquet"}
    assert set(tables) == {"warm_start", "agpo", "grpo"}
    assert all(table.schema.equals(ANNOTATIONS) for table in tables.values())
    assert all(len(set(table["pair_id"].to_pylist())) == len(table) for table in tables.values())

    report(out, place / "pairs")
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(measured["teachers"]) == {"warm_start", "agpo", "grpo"}
    assert 0 <= measured["teachers"]["agpo"]["pass@1"] <= 1
    difference, teachers = measured["differences"]["agpo - grpo"], measured["teachers"]
    assert {"roc_auc", "macro_f1", "quadratic_kappa", "accuracy", "pass@1"} <= set(difference)
    for name, part in {"roc_auc": "value", "macro_f1": "value", "pass@1": None}.items():
        values = [teachers[teacher][name] for teacher in ("agpo", "grpo")]
        a, b = values if part is None else [value[part] for value in values]
        assert difference[name]["difference"] == pytest.approx(a - b, abs=2e-4)
        assert difference[name]["low"] <= difference[name]["difference"] <= difference[name]["high"]


@pytest.mark.e2e
def test_both_policies_are_trained_side_by_side_and_measured(place, monkeypatch, capsys):
    there, out = place / "both", place / "both-out"
    pack(there, place / "pairs", str(place / "model"), 10**8, wheels=False)
    capsys.readouterr()
    arguments = ["--config", str(place / "recipe.toml"), "--test-pairs", "12"]
    assert not train(there, out, time.time() + 500, arguments, shards=2, steps=2, evaluation=100)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == {"measured": ["warm_start", "agpo", "grpo"], "stopped": [], "checkpoint": 0}
    with tarfile.open(out / "all.tgz") as archive:
        archive.extractall(place / "home", filter="data")
    report(place / "home", place / "pairs")
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(measured["teachers"]) == {"warm_start", "agpo", "grpo"}
    assert measured["test_pairs"] == 12
    for name in ("agpo", "grpo"):
        lines = [json.loads(line) for line in (place / "home" / name / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["phase"] == "agpo"] == [1, 2]

    # A policy that was stopped: its last checkpoint becomes a teacher.
    warm, training = there / "warm" / "warm_start" / "model", place / "stopped"
    config = choose("single-gpu", place / "recipe.toml").teacher
    adapted = add_adapters(load_causal_lm(warm, "float32")[0], config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(training / "checkpoints" / "agpo" / "checkpoint-3")
    monkeypatch.setattr(sys, "argv", ["merge", str(warm), str(training), "3"])
    merge()
    assert load_prompt(training / "model").version == load_prompt(warm).version
    fingerprints = [read_json(folder / "teacher.json")["fingerprint"] for folder in (warm, training / "model")]
    assert fingerprints == [weights_fingerprint(folder) for folder in (warm, training / "model")]
    assert fingerprints[0] != fingerprints[1]
    tokens = torch.tensor([[5, 6, 7]])
    expected = adapted.eval()(tokens).logits
    merged = load_causal_lm(training / "model", "float32")[0].eval()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_parcel_that_was_not_sent_is_named(tmp_path):
    for number in (1, 3):
        (tmp_path / f"parcel-{number}-of-3").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "run", tmp_path, "--out", tmp_path / "out", "--seconds", "60"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "lacks parcel-2-of-3" in done.stderr
