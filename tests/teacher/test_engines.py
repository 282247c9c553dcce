"""The engines on a tiny random model: what they promise alone, and that they agree with each other."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.contracts import ContractError
from teacher.engines.base import EngineConfig, Sampling, open_engine, prompt_seed

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45, 46, 47, 48], [9], [100, 101, 102, 103, 104]]


def make_tiny_model(folder: Path) -> Path:
    """A random Llama over single bytes; one of its tokens ends a completion."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|pad|>": 0, "<|end|>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,  # or all tokens would be about as likely, and greedy choices a matter of rounding
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(tiny_model: Path):
    opened = open_engine(EngineConfig(kind="transformers", batch_size=4), tiny_model)
    yield opened
    opened.close()


def texts(results):
    return [[sample.token_ids for sample in row] for row in results]


def test_sampling_does_not_depend_on_the_batch(engine):
    sampling = Sampling(n=3, temperature=1.0, top_p=0.9, max_tokens=12, seed=7)
    together = texts(engine.generate(PROMPTS, sampling))
    alone = [texts(engine.generate([prompt], sampling))[0] for prompt in reversed(PROMPTS)]
    assert together == alone[::-1]
    assert len({tuple(ids) for ids in together[0]}) > 1
    other = texts(engine.generate(PROMPTS, Sampling(n=3, temperature=1.0, top_p=0.9, max_tokens=12, seed=8)))
    assert together != other


def test_sampling_follows_the_models_distribution(engine):
    prompt = [5, 6, 7]
    first = engine.generate([prompt], Sampling(n=400, max_tokens=1, seed=1, logprobs=20))[0]
    top = max(first[0].top_logprobs[0].items(), key=lambda item: item[1])
    share = sum(sample.token_ids[0] == top[0] for sample in first) / 400
    expected = torch.tensor(top[1]).exp().item()
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


def test_top_p_keeps_only_the_likeliest(engine):
    samples = engine.generate([[5, 6, 7]], Sampling(n=50, temperature=1.0, top_p=1e-6, max_tokens=4, seed=1))[0]
    greedy = engine.generate([[5, 6, 7]], Sampling(n=1, temperature=0.0, max_tokens=4))[0][0]
    assert all(sample.token_ids == greedy.token_ids for sample in samples)


def test_greedy_copies_lengths_and_logprobs(engine):
    rows = engine.generate(PROMPTS, Sampling(n=2, temperature=0.0, max_tokens=6, logprobs=3))
    for first, second in rows:
        assert first.token_ids == second.token_ids
        assert (first.finish_reason == "stop") == (first.token_ids[-1] == 1)
        assert len(first.top_logprobs) == len(first.token_ids) <= 6
        for token, step in zip(first.token_ids, first.top_logprobs, strict=True):
            assert max(step, key=step.get) == token
            assert sum(torch.tensor(list(step.values())).exp()) <= 1.0 + 1e-6


def test_prompt_that_leaves_no_room_is_refused(engine):
    with pytest.raises(ValueError, match="96 tokens"):
        engine.generate([[5] * 96], Sampling(max_tokens=4))
    (near,) = engine.generate([[5] * 94], Sampling(temperature=0.0, max_tokens=50))
    assert len(near[0].token_ids) <= 2


def test_seed_depends_on_prompt_and_run():
    assert prompt_seed(1, [1, 2]) == prompt_seed(1, [1, 2])
    assert len({prompt_seed(s, p) for s in (0, 1) for p in ([1], [2], [1, 2])}) == 6


def test_config_refuses_what_cannot_work(tmp_path: Path):
    with pytest.raises(ValueError, match="needs `urls`"):
        EngineConfig(kind="openai")
    with pytest.raises(ValueError, match="http"):
        EngineConfig(kind="openai", urls=("localhost:8000",))
    with pytest.raises(ContractError, match=r"config\.json"):
        open_engine(EngineConfig(), tmp_path)


@pytest.mark.vllm
def test_vllm_agrees_with_transformers(engine, tiny_model: Path):
    other = open_engine(EngineConfig(kind="vllm", max_num_seqs=16), tiny_model)
    try:
        assert other.max_model_len == engine.max_model_len == 96
        greedy = Sampling(n=2, temperature=0.0, max_tokens=16, logprobs=5)
        for ours, theirs in zip(engine.generate(PROMPTS, greedy), other.generate(PROMPTS, greedy), strict=True):
            assert [sample.token_ids for sample in ours] == [sample.token_ids for sample in theirs]
            # random bytes are no text: the engines count broken characters differently
            assert [s.text.replace("\ufffd", "") for s in ours] == [s.text.replace("\ufffd", "") for s in theirs]
            assert [sample.finish_reason for sample in ours] == [sample.finish_reason for sample in theirs]
            for mine, step in zip(ours[0].top_logprobs, theirs[0].top_logprobs, strict=True):
                assert mine == pytest.approx(step, abs=1e-3)
        sampling = Sampling(n=3, temperature=1.0, max_tokens=12, seed=7)
        together = texts(other.generate(PROMPTS, sampling))
        assert together == [texts(other.generate([prompt], sampling))[0] for prompt in PROMPTS]
        with pytest.raises(ValueError, match="200 tokens"):
            other.generate([[5, 6], [5] * 200], Sampling(max_tokens=4))
        assert len(other.generate(PROMPTS, greedy)) == len(PROMPTS)  # and nothing of the refused batch is left
        # More prompt tokens than one engine step takes: no prompt may be split, or its seeded generator is lost.
        many = [[2 + (i + j) % 200 for j in range(60)] for i in range(120)]
        sampled = other.generate(many, Sampling(n=2, temperature=1.0, max_tokens=4, seed=3))
        assert [len(row) for row in sampled] == [2] * 120
        *good, bad = drained(other, [*PROMPTS, [5] * 96], sampling)
        assert texts(good) == together
        assert isinstance(bad, ValueError)
        # A step that fails takes all prompts in flight with it; each is tried again alone.
        inner = other._llm.llm_engine
        step = inner.step
        inner.step = lambda: step() if len(other._running) == 1 else 1 / 0
        assert texts(drained(other, PROMPTS, sampling)) == together
        inner.step = lambda: 1 / 0
        assert [type(result) for result in drained(other, PROMPTS, sampling)] == [ZeroDivisionError] * 4
        inner.step = step
        assert texts(other.generate(PROMPTS, sampling)) == together
    finally:
        other.close()


def drained(engine, prompts, sampling):
    """What a stream brings: prompts are put in while others are being completed."""
    waiting, results = list(enumerate(prompts)), {}
    for tag, prompt in waiting[:2]:
        engine.submit(tag, prompt, sampling)
    waiting = waiting[2:]
    while done := engine.finished():
        results.update(done)
        if waiting:
            engine.submit(*waiting.pop(0), sampling)
    return [results[place] for place in range(len(prompts))]


def test_a_stream_gives_what_a_list_gives_and_a_bad_prompt_harms_no_other(engine):
    sampling = Sampling(n=2, max_tokens=6, seed=3)
    *good, bad = drained(engine, [*PROMPTS, [5] * 96], sampling)
    assert texts(good) == texts(engine.generate(PROMPTS, sampling))
    assert isinstance(bad, ValueError)
    engine.submit("dropped", PROMPTS[0], sampling)
    engine.cancel()
    assert engine.finished() == []
