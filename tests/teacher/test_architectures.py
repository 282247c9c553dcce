"""What single architectures do otherwise: soft caps, balance losses, dropout kept as a number, rotations that change."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from data.contracts import ContractError, MetricsLog
from teacher.checks import check_decoder
from teacher.decoding import cache_limit, decode
from teacher.engines.base import Sampling
from teacher.engines.transformers_engine import TransformersEngine
from teacher.examples import Example, Problem
from teacher.model import load_causal_lm, load_model, save_model, without_dropout
from teacher.policy import train_policy
from teacher.prefix_groups import Group, group_by_prefix
from teacher.shared_prefix import can_share, check_head, token_log_probs
from teacher.warm_start import warm_start
from tests.teacher.test_shared_prefix import MORE, SIZES, model_of, outcome, rollouts
from tests.teacher.test_trainer import TINY

PROMPTS = [[5, 6, 7, 8], [5, 6, 9]]
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LLAMA4 = {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 32}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def saved(decoder, out, family, **changed):
    """A random model of a family, with the tokenizer of `decoder`, as a folder."""
    _, tokenizer = load_model(decoder, TINY)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0} | SIZES | MORE
    if "text_config" in changed:
        config = AutoConfig.for_model(family, **changed | {"text_config": sizes | changed["text_config"]})
    else:
        config = AutoConfig.for_model(family, **sizes | changed)
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


@pytest.mark.parametrize(
    ("family", "sizes"), [("deepseek_v2", LATENT | EXPERTS), ("deepseek_v3", LATENT | EXPERTS), ("minicpm3", LATENT)]
)
def test_latent_attention_whose_values_are_smaller_than_its_keys_shares_prompts(family, sizes, caplog):
    model = model_of(family, **sizes)
    with caplog.at_level(logging.WARNING):
        assert can_share(model, [list(range(2, 60))], 20, 0), caplog.text
    sequences, starts = rollouts()
    alone = [Group((row,), 0) for row in range(len(sequences))]
    shared = group_by_prefix([ids[:start] for ids, start in zip(sequences, starts, strict=True)])
    one, other = (
        outcome(model, lambda groups=groups: token_log_probs(model, sequences, starts, groups, 0))
        for groups in (alone, shared)
    )
    assert (one[0] - other[0]).abs().max() <= 1e-4
    assert (one[2] - other[2]).norm() / one[2].norm() <= 1e-4


@pytest.mark.parametrize(
    ("family", "sizes", "word"),
    [
        ("llama4_text", LLAMA4, "log probabilities differ"),
        ("llama4", {"text_config": LLAMA4, "vision_config": VISION}, "log probabilities differ"),
        ("gemma3", {"text_config": {"sliding_window": 32}, "vision_config": VISION}, "log probabilities differ"),
        ("gemma3", {"text_config": {}, "vision_config": VISION}, None),
    ],
)
def test_models_that_nest_or_name_their_language_model_otherwise_train(decoder, tmp_path, family, sizes, word, caplog):
    model, tokenizer = load_causal_lm(saved(decoder, tmp_path / "base", family, **sizes), "float32")
    check_decoder(model, tokenizer, longest=100)
    tokens = torch.arange(5, 60)[None]
    expected = model.eval()(tokens).logits
    save_model(model, tokenizer, tmp_path / "again")
    again, _ = load_causal_lm(tmp_path / "again", "float32")
    torch.testing.assert_close(again.eval()(tokens).logits, expected)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    with caplog.at_level(logging.WARNING):
        assert can_share(model, [list(range(2, 60))], 20, 0) == (word is None)
    assert word is None or f"its own prompt, as this model cannot share it: {word}" in caplog.text
    found, _ = token_log_probs(model, tokens.tolist(), [1], [Group((0,), 0)], 0)
    torch.testing.assert_close(found, expected[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0])


def test_a_model_whose_head_cannot_be_told_from_the_rest_is_refused(decoder):
    model, tokenizer = load_model(decoder, TINY)
    model.base_model_prefix = "body"
    with pytest.raises(ContractError, match=rf"models of type {model.config.model_type} cannot be trained"):
        check_decoder(model, tokenizer, longest=100)


@pytest.mark.parametrize("family", ["mamba", "openai-gpt"])
def test_why_a_model_cannot_share_is_what_it_said_itself(family, caplog):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4} if family == "openai-gpt" else {}
    with caplog.at_level(logging.WARNING):
        assert not can_share(model_of(family, **sizes), [list(range(2, 60))], 20, 0)
    assert "with a four-dimensional attention mask it fails (" in caplog.text
    assert "that only takes longer, and teacher.agpo.shared_prefix=false leaves out this trial" in caplog.text


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "modernbert-decoder"])
def test_a_layer_between_the_last_hidden_states_and_the_head_is_refused(family):
    model = model_of(family, **({} if family == "modernbert-decoder" else {"is_decoder": True}))
    with pytest.raises(ContractError, match=f"models of type {family} cannot be trained: the loss reads"):
        check_head(model, 0)


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("qwen2", {}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 0.06}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_caps_and_scales_of_logits_are_in_the_loss(family, changed):
    for dtype in (torch.float32, torch.bfloat16):
        check_head(model_of(family, **changed).to(dtype), 0)


def test_a_warm_start_does_not_begin_on_a_model_whose_loss_is_another(decoder, tmp_path):
    _, tokenizer = load_model(decoder, TINY)
    model = model_of("bert", is_decoder=True, vocab_size=len(tokenizer))
    examples = [Example("a", 0, "b"), Example("c", 0, "d")]
    with pytest.raises(ContractError, match="models of type bert cannot be trained"):
        warm_start(TINY, model, tokenizer, examples, tmp_path, MetricsLog(tmp_path / "metrics.jsonl"))
