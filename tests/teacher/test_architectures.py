"""What single architectures do otherwise: soft caps, balance losses, dropout kept as a number, rotations that change."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.contracts import ContractError, MetricsLog
from teacher.decoding import cache_limit, decode
from teacher.engines.base import Sampling
from teacher.engines.transformers_engine import TransformersEngine
from teacher.examples import Problem
from teacher.model import load_causal_lm, load_model, without_dropout
from teacher.policy import train_policy
from tests.teacher.test_shared_prefix import MORE, SIZES, model_of
from tests.teacher.test_trainer import TINY

PROMPTS = [[5, 6, 7, 8], [5, 6, 9]]


def saved(decoder, out, family, **changed):
    """A random model of a family, with the tokenizer of `decoder`, as a folder."""
    _, tokenizer = load_model(decoder, TINY)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes | SIZES | MORE | changed)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def greedily(model, prompts, limits):
    return decode(model, prompts, limits, ends=set(), pad=0, choose=lambda logits, rows: logits.argmax(-1))


@pytest.mark.parametrize("cap", [5.0, None])
def test_a_soft_cap_of_attention_is_kept(decoder, tmp_path, cap):
    folder = saved(decoder, tmp_path / "base", "gemma2", attn_logit_softcapping=cap)
    model, _ = load_causal_lm(folder, "float32")
    right = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = torch.arange(5, 60)[None]
    torch.testing.assert_close(model.eval()(tokens).logits, right.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (model.config._attn_implementation == "eager") == bool(cap)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_that_was_saved_with_its_balance_loss_samples(decoder, tmp_path, family):
    folder = saved(decoder, tmp_path / "base", family, output_router_logits=True)
    model, _ = load_causal_lm(folder, "float32")
    model.eval()
    together = greedily(model, PROMPTS, [6, 6])
    assert together == [greedily(model, [prompt], [6])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "phimoe"])
def test_agpo_trains_mixtures_of_experts_with_shared_prompts(decoder, tmp_path, family, caplog):
    model, tokenizer = load_causal_lm(saved(decoder, tmp_path / "base", family), "float32")
    model.generation_config.eos_token_id = list(range(1, 60))
    config = TINY.model_copy(update={"agpo": TINY.agpo.model_copy(update={"steps": 1})})
    log = MetricsLog(tmp_path / "metrics.jsonl")
    problems = [Problem("<|user|>a<|end|><|assistant|>", None)] * 2
    judge = lambda text, _: len(text) % 2 == 0  # noqa: E731
    with caplog.at_level(logging.WARNING):
        train_policy(config, model, tokenizer, problems, judge, tmp_path / "out", log, lambda *_: 0.0, 0.0)
    assert len(log.read("agpo")) == 1
    assert "with its own prompt" not in caplog.text


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("qwen2", {"attention_dropout": 0.5}),
        ("starcoder2", {"residual_dropout": 0.5}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
    ],
)
def test_dropout_is_off_wherever_a_model_keeps_it(family, changed):
    model = model_of(family, **changed)
    tokens = torch.arange(5, 30)[None]
    expected = model(tokens).logits
    model.train()
    assert not torch.allclose(model(tokens).logits, expected)
    without_dropout(model)
    torch.testing.assert_close(model(tokens).logits, expected)


def longrope():
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 32, **factors}
    return model_of("phi3", rope_parameters=rope, original_max_position_embeddings=32)


def test_a_cache_does_not_grow_beyond_where_keys_rotate_otherwise(decoder):
    model, (_, tokenizer) = longrope(), load_model(decoder, TINY)
    prompt = list(range(5, 25))
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert greedily(model, [prompt], [12]) == [expected[0, 20:].tolist()]
    with pytest.raises(ContractError, match="33 tokens, and beyond 32"):
        greedily(model, [prompt], [13])
    model.generation_config.eos_token_id = [1]
    engine = TransformersEngine(model, tokenizer)
    assert engine.max_model_len == 32
    with pytest.raises(ValueError, match="1 to 31"):
        engine.generate([list(range(5, 37))], Sampling(max_tokens=2))
    assert cache_limit(model_of("qwen2").config) > 10**5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_whose_logits_are_nan_fails_and_no_other(decoder, temperature):
    model, tokenizer = load_model(decoder, TINY)
    engine = TransformersEngine(model, tokenizer)
    overflow = lambda module, ids, output: output.masked_fill((ids[0] == 7)[..., None], torch.nan)  # noqa: E731
    model.get_input_embeddings().register_forward_hook(overflow)
    for tag, prompt in enumerate([[5, 6, 7], [5, 6, 8]]):
        engine.submit(tag, prompt, Sampling(temperature=temperature, max_tokens=3, logprobs=2))
    done = {}
    while batch := engine.finished():
        done |= dict(batch)
    assert "NaN in torch.float32" in str(done[0])
    assert isinstance(done[1], list)


def test_an_engine_that_cannot_go_on_at_all_says_so_once(decoder, monkeypatch):
    def refuse(*arguments, **more):
        raise ContractError("this model keeps no cache")

    model, tokenizer = load_model(decoder, TINY)
    engine = TransformersEngine(model, tokenizer)
    monkeypatch.setattr("teacher.engines.transformers_engine.decode", refuse)
    for tag in range(3):
        engine.submit(tag, [5, 6, tag + 7], Sampling(max_tokens=3))
    with pytest.raises(ContractError, match="keeps no cache"):
        engine.finished()
