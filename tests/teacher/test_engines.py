"""The engines on a tiny random model: what they promise alone, and that they agree with each other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, AutoTokenizer

from data.contracts import ContractError
from pipeline.settings import load_preset
from teacher.engines import open_engine
from teacher.engines.base import Sampling, prompt_seed
from teacher.engines.config import EngineConfig, ServerConfig, TransformersConfig, VLLMConfig
from teacher.reading import end_tokens
from tests.teacher.families import FAMILIES, Family, make_family

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45, 46, 47, 48], [9], [100, 101, 102, 103, 104]]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("llama-3", tmp_path_factory.mktemp("tiny"), max_position_embeddings=96)


@pytest.fixture(scope="module")
def engine(tiny_model: Path):
    opened = open_engine(TransformersConfig(batch_size=4), tiny_model)
    yield opened
    opened.close()


def assert_greedy_completions_agree(engine, other, prompts):
    greedy = Sampling(n=2, temperature=0.0, max_tokens=16, logprobs=5)
    for ours, theirs in zip(other.generate(prompts, greedy), engine.generate(prompts, greedy), strict=True):
        assert [sample.token_ids for sample in ours] == [sample.token_ids for sample in theirs]
        # random bytes are no text: the engines count broken characters differently
        assert [s.text.replace("\ufffd", "") for s in ours] == [s.text.replace("\ufffd", "") for s in theirs]
        assert [sample.finish_reason for sample in ours] == [sample.finish_reason for sample in theirs]
        for mine, step in zip(ours[0].top_logprobs, theirs[0].top_logprobs, strict=True):
            assert {token: step[token] for token in mine} == pytest.approx(mine, abs=1e-3)


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


def test_greedy_copies_lengths_and_logprobs(engine, tiny_model):
    ends = end_tokens(tiny_model, AutoTokenizer.from_pretrained(tiny_model))
    rows = engine.generate(PROMPTS, Sampling(n=2, temperature=0.0, max_tokens=6, logprobs=3))
    for first, second in rows:
        assert first.token_ids == second.token_ids
        assert (first.finish_reason == "stop") == (first.token_ids[-1] in ends)
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
        ServerConfig()
    with pytest.raises(ValueError, match="http"):
        ServerConfig(urls=("localhost:8000",))
    with pytest.raises(ContractError, match=r"config\.json"):
        open_engine(VLLMConfig(), tmp_path)


def test_a_config_is_one_of_its_kind():
    read = TypeAdapter(EngineConfig).validate_python
    assert read({"max_model_len": 9}) == VLLMConfig(max_model_len=9)  # vLLM unless another kind is named
    assert read({"kind": "transformers", "batch_size": 3}) == TransformersConfig(batch_size=3)
    servers = ServerConfig(urls=("http://a:1/v1",))
    assert read(servers) is servers
    assert read(servers.model_dump(mode="json")) == servers
    with pytest.raises(ValueError, match="'vllm', 'openai', 'transformers'"):
        read({"kind": "vlm"})
    with pytest.raises(ValueError, match="max_num_sequences"):
        read({"kind": "vllm", "max_num_sequences": 3})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"batch_size": 3}, "batch_size has no effect on kind 'vllm': leave it out, or set the kind to transformers"),
        (
            {"kind": "openai", "urls": ["http://a"], "dtype": "auto"},
            "no effect on kind 'openai': .* vllm or transformers",
        ),
        ({"kind": "transformers", "kv_cache_gib": 1}, "kv_cache_gib has no effect on kind 'transformers'"),
    ],
)
def test_a_setting_without_effect_on_the_kind_is_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        TypeAdapter(EngineConfig).validate_python(values)
    recorded = TypeAdapter(EngineConfig).validate_python(values, context="recorded")  # by a release that had one kind
    assert recorded.kind == values.get("kind", "vllm")


@pytest.mark.parametrize("url", ["http://me:hunter2@a:1/v1", "https://hunter2@a/v1", "http://a/v1?api_key=hunter2"])
def test_a_key_in_the_url_of_a_server_is_refused_and_not_repeated(url):
    with pytest.raises(ContractError, match="api_key_env") as refused:
        load_preset("sample", ["annotate.engine.kind=openai", f'annotate.engine.urls=["{url}"]'])
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ContractError, match=r"no login and no `\?…`") as refused:
        load_preset("sample", [f"teacher.agpo.rollout_server={url}"])
    assert "hunter2" not in str(refused.value)


# -- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_stops_at_each_of_its_end_tokens(name, tmp_path):
    folder = make_family(name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = open_engine(TransformersConfig(batch_size=64), folder)
    ends = end_tokens(folder, tokenizer)
    assert ends == set(tokenizer.convert_tokens_to_ids(list(FAMILIES[name].ends)))
    (row,) = engine.generate([tokenizer("Query: red shoes")["input_ids"]], Sampling(n=64, max_tokens=200, seed=5))
    for sample in row:
        assert not ends & set(sample.token_ids[:-1])
        assert (sample.finish_reason == "stop") == (sample.token_ids[-1] in ends)
        assert not any(end in sample.text for end in FAMILIES[name].ends)
    assert {sample.token_ids[-1] for sample in row if sample.finish_reason == "stop"} == ends


def test_an_end_token_that_is_an_ordinary_one_is_no_text(tmp_path):
    folder = make_family("gpt-2", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "Ċ"  # a line break
    tokenizer.save_pretrained(folder)
    engine = open_engine(TransformersConfig(batch_size=64), folder)
    (row,) = engine.generate([tokenizer("red")["input_ids"]], Sampling(n=64, max_tokens=200, seed=5))
    assert any(sample.finish_reason == "stop" for sample in row)
    assert not any("\n" in sample.text for sample in row)


@pytest.mark.vllm
def test_vllm_agrees_with_transformers(engine, tiny_model: Path):
    other = open_engine(VLLMConfig(max_num_seqs=16), tiny_model)
    try:
        assert other.max_model_len == engine.max_model_len == 96
        assert_greedy_completions_agree(other, engine, PROMPTS)
        sampling = Sampling(n=3, temperature=1.0, max_tokens=12, seed=7)
        together = texts(other.generate(PROMPTS, sampling))
        assert together == [texts(other.generate([prompt], sampling))[0] for prompt in PROMPTS]
        further = texts(other.generate(PROMPTS, replace(sampling, n=2, first=1)))
        assert further == [row[1:] for row in together]
        with pytest.raises(ValueError, match="200 tokens"):
            other.generate([[5, 6], [5] * 200], Sampling(max_tokens=4))
        assert texts(other.generate(PROMPTS, sampling)) == together  # and nothing of the refused batch is left
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


def test_further_samples_are_those_of_a_longer_list_and_come_first(engine):
    sampling = Sampling(n=4, max_tokens=6, seed=3)
    expected = texts(engine.generate(PROMPTS, sampling))
    asked = [(0, 2, 0), (1, 2, 0), (2, 4, 0), (0, 1, 2), (3, 2, 2), (0, 1, 3)]  # prompt, n, first
    for place, n, first in asked:
        engine.submit((place, n, first), PROMPTS[place], replace(sampling, n=n, first=first))
    done = []
    while batch := engine.finished():
        done += batch
    assert {tag[2] > 0 for tag, _ in done[:3]} == {True}
    assert {tag for tag, _ in done} == set(asked)
    for (place, n, first), result in done:
        assert texts([result])[0] == expected[place][first : first + n]


class SmallMemory:
    """A model whose memory takes so many rows at a time; what it raises beyond them is `error`."""

    def __init__(self, model, rows, error):
        self._model, self._rows, self._error = model, rows, error
        self.tried = []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, input_ids, **more):
        self.tried.append(len(input_ids))
        if len(input_ids) > self._rows:
            raise self._error
        return self._model(input_ids=input_ids, **more)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("CUDA error: out of memory\nSearch")]
)
def test_a_batch_that_does_not_fit_into_memory_is_halved_for_good(tiny_model, error, caplog):
    engine = open_engine(TransformersConfig(batch_size=8), tiny_model)
    sampling = Sampling(n=4, max_tokens=6, seed=3)
    expected = texts(engine.generate(PROMPTS, sampling))
    small = engine._model = SmallMemory(engine._model, 2, error)
    assert texts(drained(engine, PROMPTS, sampling)) == expected
    assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]
    small.tried = []
    assert texts(engine.generate(PROMPTS, sampling)) == expected
    assert max(small.tried) == 2


def test_a_prompt_that_fits_into_no_memory_fails_alone_and_another_error_is_no_lack_of_it(tiny_model):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a mask of another shape")):
        engine = open_engine(TransformersConfig(batch_size=8), tiny_model)
        engine._model = SmallMemory(engine._model, 0, error)
        assert drained(engine, PROMPTS[:2], Sampling(max_tokens=6)) == [error, error]
        assert engine._batch_size == (1 if isinstance(error, torch.OutOfMemoryError) else 8)


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["phi-3", "gemma-2"])
def test_vllm_stops_at_each_end_token_of_a_family(name, tmp_path):
    folder = make_family(name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = end_tokens(folder, tokenizer)
    engine = open_engine(VLLMConfig(max_num_seqs=64), folder)
    try:
        prompt = tokenizer("Query: red shoes")["input_ids"]
        (row,) = engine.generate([prompt], Sampling(n=64, max_tokens=200, seed=5))
        assert {sample.token_ids[-1] for sample in row if sample.finish_reason == "stop"} == ends
        assert not any(end in sample.text for sample in row for end in FAMILIES[name].ends)
        greedy = Sampling(temperature=0.0, max_tokens=20)
        ours = open_engine(TransformersConfig(), folder).generate([prompt], greedy)
        assert texts(engine.generate([prompt], greedy)) == texts(ours)
        # A completion that vLLM gives up is none: what there is of it must not count as an answer.
        inner = engine._llm.llm_engine
        step = inner.step

        def abort():
            outputs = step()
            for output in outputs:
                output.outputs[0].finish_reason = "abort"
            return outputs

        inner.step = abort
        engine.submit("cut", prompt, Sampling(max_tokens=4))
        ((tag, result),) = engine.finished()
        assert tag == "cut"
        assert isinstance(result, RuntimeError)
        assert "finish_reason 'abort'" in str(result)
    finally:
        engine.close()


@pytest.mark.vllm
def test_an_architecture_with_recurrent_layers_runs_on_vllm(tmp_path):
    mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
    family = Family("falcon_h1", None, (), ("<|end|>",), sizes=mamba | {"head_dim": 32, "initializer_range": 0.02})
    folder = make_family(family, tmp_path)
    engine = open_engine(VLLMConfig(dtype="bfloat16", max_num_seqs=16), folder)
    try:
        many = [[2 + (i + j) % 200 for j in range(60)] for i in range(60)]
        sampled = engine.generate(many, Sampling(n=2, temperature=1.0, max_tokens=4, seed=3))
        assert [len(row) for row in sampled] == [2] * 60
    finally:
        engine.close()
    # The CPU build has no float32 kernel for these layers; its own words, and not a lack of memory, are the reason.
    with pytest.raises(ContractError, match=r"vLLM cannot load .*not implemented for 'Float'; kind `transformers` may"):
        open_engine(VLLMConfig(), folder)


@pytest.mark.vllm
def test_what_vllm_only_logs_is_the_reason_too(tmp_path):
    import importlib.util

    if importlib.util.find_spec("torchvision"):
        pytest.skip("with torchvision the class loads")
    make_family("llama-3", tmp_path)
    text = {"vocab_size": 258, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ContractError, match=r"vLLM cannot load .*torchvision") as caught:
        open_engine(VLLMConfig(), tmp_path)
    assert "memory" not in str(caught.value)
