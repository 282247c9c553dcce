"""What users bring: number formats, end tokens, generation configs and prompts longer than the model."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.contracts import ContractError, MetricsLog
from teacher.config import AGPOConfig, WarmStartConfig
from teacher.engines import open_engine
from teacher.engines.base import Sampling
from teacher.engines.config import TransformersConfig
from teacher.engines.transformers_engine import TransformersEngine
from teacher.examples import Example, Problem, drop_too_long
from teacher.model import add_adapters, load_model, number_format, save_model
from teacher.policy import train_policy
from teacher.train import train_teacher
from teacher.warm_start import warm_start

from .test_trainer import TINY


def changed(folder, out, **generation):
    """A copy of a model folder with another generation_config.json."""
    shutil.copytree(folder, out)
    (out / "generation_config.json").write_text(json.dumps(generation))
    return out


def moved(before, after):
    """Share of the weights that differ between two model folders."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    return sum(int((old[name] != new[name]).sum()) for name in old) / sum(tensor.numel() for tensor in old.values())


@pytest.mark.parametrize(
    "steps", [{"agpo": AGPOConfig(steps=0)}, {"warm_start": WarmStartConfig(examples=0)}], ids=["warm start", "agpo"]
)
def test_in_bfloat16_small_updates_reach_nearly_all_weights(decoder, pairs, tmp_path, steps):
    warm = TINY.warm_start.model_copy(update={"learning_rate": 1e-5})
    agpo = TINY.agpo.model_copy(update={"steps": 4, "learning_rate": 1e-6})
    config = TINY.model_copy(update={"dtype": "bfloat16", "warm_start": warm, "agpo": agpo, **steps})
    train_teacher(config, decoder, pairs, tmp_path)
    assert moved(decoder, tmp_path / "model") > 0.95


@pytest.mark.parametrize(
    ("asked", "stored", "units", "expected"),
    [
        ("auto", "bfloat16", "amx_bf16", "bfloat16"),
        ("auto", "bfloat16", "avx512_bf16", "bfloat16"),
        ("auto", "float16", "amx_bf16", "bfloat16"),
        ("auto", "bfloat16", "avx512_f", "float32"),  # a CPU without the units is slower at it
        ("auto", "float32", "amx_bf16", "float32"),  # nothing is lost unasked
        ("auto", "float64", "avx512_bf16", "float32"),
        ("float32", "bfloat16", "amx_bf16", "float32"),
        ("bfloat16", "float32", "avx512_f", "bfloat16"),
    ],
)
def test_auto_takes_the_number_format_that_costs_nothing(
    asked, stored, units, expected, decoder, tmp_path, monkeypatch
):
    base = changed(decoder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": stored}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, units: True})
    assert number_format(asked, base) == expected


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "no such"}'])
def test_a_folder_without_a_model_is_one_sentence_in_every_number_format(text, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    if text:
        (tmp_path / "config.json").write_text(text)
    for dtype in ("auto", "float32"):
        with pytest.raises(ContractError, match=r"is not a model folder|cannot be loaded as a causal language model"):
            open_engine(TransformersConfig(dtype=dtype), tmp_path)
        with pytest.raises(ContractError, match="cannot be loaded as a causal language model"):
            train_teacher(TINY.model_copy(update={"dtype": dtype}), tmp_path, pairs, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"model_type": "deepseek", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}},
            r"code out of its own folder \(`auto_map`.*never run; choose a model of a type that transformers itself has",
        ),
        ({"model_type": "mistral3"}, "as a decoder of text; choose another model"),
        ({"model_type": "llava"}, "as a decoder of text; choose another model"),
        ({"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["full_attention"] * 2}, "num_hidden_layers"),
        ({"model_type": "qwen3", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
    ],
)
def test_why_a_model_cannot_be_loaded_is_one_sentence_with_a_remedy(decoder, tmp_path, values, told):
    base = changed(decoder, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(values))
    with pytest.raises(ContractError, match=told) as caught:
        load_model(base, TINY)
    assert "trust_remote_code" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_what_a_process_left_that_was_killed_while_it_saved_goes(decoder, tmp_path):
    model, tokenizer = load_model(decoder, TINY)
    for name in ("agpo_done.123.tmp", "agpo_done.456.tmp", "warm_start_done.123.tmp"):
        (tmp_path / name).mkdir()
    save_model(model, tokenizer, tmp_path / "agpo_done")
    assert {path.name for path in tmp_path.iterdir()} == {"agpo_done", "warm_start_done.123.tmp"}


def test_lora_trains_in_float32_over_a_bfloat16_base_and_saves_as_the_base_was(decoder, pairs, tmp_path):
    # A generation config like this one can be read, but transformers refuses to save it: training would end at a checkpoint.
    base = changed(decoder, tmp_path / "base", do_sample=False, temperature=0.5, eos_token_id=1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.config.save_pretrained(base)
    (base / "model.safetensors").unlink()
    model.generation_config.temperature = None
    model.save_pretrained(tmp_path / "half")
    shutil.copy(tmp_path / "half" / "model.safetensors", base)
    agpo = TINY.agpo.model_copy(update={"steps": 2, "learning_rate": 1e-2, "mask_truncated": True, "kl": 0.01})
    changed_settings = {"dtype": "bfloat16", "lora_rank": 4, "gradient_checkpointing": True, "agpo": agpo}
    config = TINY.model_copy(update=changed_settings)
    adapted = add_adapters(load_model(base, config)[0], config)
    assert {(p.requires_grad, p.dtype) for p in adapted.parameters()} == {
        (True, torch.float32),
        (False, torch.bfloat16),
    }
    (tmp_path / "out").mkdir()
    train_teacher(config, base, pairs, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert set(saved) == set(load_file(base / "model.safetensors"))  # merged: no adapter is left
    assert moved(base, tmp_path / "out" / "model") > 0.01
    assert "kl" in MetricsLog(tmp_path / "out" / "metrics.jsonl").read("agpo")[-1]


def test_every_end_token_of_the_generation_config_finishes_a_completion(decoder, tmp_path):
    ends = list(range(1, 400))
    base = changed(decoder, tmp_path / "base", eos_token_id=ends)
    model, tokenizer = load_model(base, TINY)
    config = TINY.model_copy(update={"agpo": TINY.agpo.model_copy(update={"steps": 1, "mask_truncated": True})})
    log = MetricsLog(tmp_path / "metrics.jsonl")
    problems = [Problem("<|user|>a<|end|><|assistant|>", None)] * 2
    train_policy(config, model, tokenizer, problems, lambda *_: True, tmp_path / "out", log, lambda *_: 0.0, 0.0)
    (step,) = log.read("agpo")
    assert step["accuracy"] == 1 - step["truncated"] == 1 - step["completions/clipped_ratio"] > 0.8
    # The checkpoint and the teacher say it too, so that evaluation and annotation stop there.
    assert set(model.generation_config.eos_token_id) == set(ends)


def test_padding_with_the_end_token_still_teaches_where_to_end(decoder, tmp_path):
    model, tokenizer = load_model(decoder, TINY)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = ["<|user|>a<|end|><|assistant|>", "<|user|>one two three four<|end|><|assistant|>"]
    examples = [Example(prompts[0], 0, "no"), Example(prompts[1], 1, "yes, it is what the query says")] * 4
    warm = WarmStartConfig(examples=8, min_steps=60, batch_size=8, learning_rate=5e-3)
    config = TINY.model_copy(update={"warm_start": warm})
    warm_start(config, model, tokenizer, examples, tmp_path, MetricsLog(tmp_path / "metrics.jsonl"))
    engine = TransformersEngine(model, tokenizer)
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    completions = engine.generate(ids, Sampling(n=1, temperature=0.0, top_p=1.0, max_tokens=30, seed=0, logprobs=0))
    assert [completion.finish_reason for (completion,) in completions] == ["stop", "stop"]


def test_examples_longer_than_the_model_are_counted_and_left_out(decoder, caplog):
    _, tokenizer = load_model(decoder, TINY)
    short, long = Example("a", 0, "b"), Example("word " * 200, 0, "b")
    with caplog.at_level(logging.WARNING):
        assert drop_too_long([short, long, short], tokenizer, 100, 12) == [short, short]
        assert drop_too_long([short, long], tokenizer, None, 12) == [short, long]
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "1 of 3 examples are left out as too long"
    ]
    with pytest.raises(ContractError, match=r"every prompt is too long.*max_text_chars"):
        drop_too_long([long], tokenizer, 100, 12)
