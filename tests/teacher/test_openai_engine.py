"""The engine over servers: small ones for all that servers do otherwise or wrong, a real vLLM server for what comes back."""

import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data.contracts import ContractError, Unavailable
from teacher.engines import open_engine
from teacher.engines.base import Sampling
from teacher.engines.config import ServerConfig, TransformersConfig
from teacher.reading import end_tokens
from tests.servers import Server
from tests.teacher.families import make_family
from tests.teacher.test_engines import assert_greedy_completions_agree

VLLM_ONLY = {"top_k", "min_p", "repetition_penalty", "return_token_ids", "return_tokens_as_token_ids"}


@pytest.fixture
def serve():
    started: list[Server] = []

    def start(answer: Callable | None = None, **how: Any) -> Server:
        started.append(Server(answer, **how))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return make_family("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def engine_on(folder):
    opened = []

    def open_on(*servers: Server | str, retries: int = 1, model: Path = folder, **more: Any):
        urls = tuple(server if isinstance(server, str) else server.url for server in servers)
        opened.append(open_engine(ServerConfig(urls=urls, retries=retries, **more), model))
        return opened[-1]

    yield open_on
    for engine in opened:
        engine.close()


def unused_url() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}/v1"


PROMPTS = [[100 + i, 5] for i in range(40)]


def firsts(results) -> list[int]:
    return [row[0].token_ids[0] for row in results]


# -- a fleet ----------------------------------------------------------------------------------------------------------


def test_prompts_are_spread_evenly_and_come_back_in_order(serve, engine_on):
    def slowly(body, choices):
        time.sleep(0.005)
        return {"choices": choices}

    one, two = serve(slowly), serve(slowly)
    engine = engine_on(one, two, concurrency=4)
    results = engine.generate(PROMPTS, Sampling(n=2, max_tokens=4, logprobs=2))
    assert firsts(results) == [prompt[0] for prompt in PROMPTS]
    assert [len(row) for row in results] == [2] * len(PROMPTS)
    assert results[0][1].top_logprobs == [{100: -0.5, 3: -1.0}]
    assert engine.max_model_len == 100
    before = len(one.prompts), len(two.prompts)  # the second may have been busy showing what it can do
    assert firsts(engine.generate(PROMPTS, Sampling(max_tokens=4))) == [prompt[0] for prompt in PROMPTS]
    assert min(len(one.prompts) - before[0], len(two.prompts) - before[1]) >= 10


def test_servers_that_never_lived_die_or_are_busy_are_survived(serve, engine_on):
    busy = serve(lambda body, choices: {"choices": choices} if len(busy.bodies) > 3 else (503, {"error": "busy"}))
    engine = engine_on(busy, retries=4, concurrency=1)
    assert firsts(engine.generate(PROMPTS[:3], Sampling(max_tokens=4))) == [100, 101, 102]
    dying = serve(dies_after=5)
    engine = engine_on(unused_url(), dying, serve(), concurrency=4)
    assert firsts(engine.generate(PROMPTS, Sampling(max_tokens=4))) == [prompt[0] for prompt in PROMPTS]
    assert len(dying.prompts) == 5


def test_all_dead_is_one_sentence(serve, engine_on):
    with pytest.raises(Unavailable, match="no server answers any more"):
        engine_on(unused_url(), retries=0)
    engine = engine_on(serve(dies_after=3), retries=0, concurrency=2)
    with pytest.raises(Unavailable, match="no server answers any more"):
        engine.generate(PROMPTS, Sampling(max_tokens=4))


def test_a_server_that_fails_on_all_prompts_is_given_up_and_one_prompt_that_fails_everywhere_is_not(serve, engine_on):
    broken = serve(lambda body, choices: (500, "dead engine") if body["max_tokens"] > 1 else {"choices": choices})
    well = serve(lambda body, choices: (500, "stumbled") if body["prompt"][0] == 113 else {"choices": choices})
    engine = engine_on(broken, well, retries=0, concurrency=2)
    with pytest.raises(RuntimeError, match="failed 3 times, last with: "):
        engine.generate([[113, 5]], Sampling(max_tokens=4))
    with pytest.raises(RuntimeError, match="failed 3 times"):
        engine.generate([*PROMPTS[:5], [113, 5]], Sampling(max_tokens=4))
    rest = [prompt for prompt in PROMPTS if prompt[0] != 113]
    assert firsts(engine.generate(rest, Sampling(max_tokens=4))) == [prompt[0] for prompt in rest]


def test_a_stream_that_was_cancelled_does_not_disturb_the_next(serve, engine_on):
    engine = engine_on(serve(), concurrency=2)
    for prompt in PROMPTS:
        engine.submit("old", prompt, Sampling(max_tokens=4))
    engine.cancel()
    assert engine.finished() == []
    assert firsts(engine.generate(PROMPTS[:3], Sampling(max_tokens=4))) == [100, 101, 102]


# -- what servers refuse ----------------------------------------------------------------------------------------------


def test_a_refused_prompt_is_not_a_dead_server(serve, engine_on):
    picky = serve(
        lambda body, choices: (400, {"error": "unlucky"}) if body["prompt"][0] == 13 else {"choices": choices}
    )
    engine = engine_on(picky, retries=0)
    with pytest.raises(ValueError, match="unlucky"):
        engine.generate([[100], [13]], Sampling(max_tokens=4))
    with pytest.raises(ValueError, match="120 tokens"):
        engine.generate([[100] * 120], Sampling(max_tokens=4))
    assert firsts(engine.generate([[100]], Sampling(max_tokens=4))) == [100]


@pytest.mark.parametrize(
    ("refuses", "lacks"),
    [
        (VLLM_ONLY, VLLM_ONLY),  # OpenAI's own servers and strict copies of them
        ({"return_token_ids", "return_tokens_as_token_ids"}, {"return_token_ids", "return_tokens_as_token_ids"}),
        ({"seed", "logprobs", "top_p"}, {"seed", "logprobs", "top_p"}),
    ],
)
@pytest.mark.parametrize("status", [400, 422, 500])
def test_fields_that_a_server_does_not_take_are_left_out(serve, engine_on, caplog, refuses, lacks, status):
    strict = serve(
        lambda body, choices: (status, {"error": "extra"}) if refuses & body.keys() else {"choices": choices}
    )
    with caplog.at_level(logging.WARNING):
        engine = engine_on(strict)
    assert len(caplog.messages) == 1
    assert all(name in caplog.text for name in lacks)
    (row,) = engine.generate([[100, 5]], Sampling(n=3, max_tokens=4, logprobs=2))
    assert [sample.text for sample in row] == ["t100"] * 3
    assert not refuses & strict.bodies[-1].keys()
    if "top_p" not in refuses:
        engine.generate([[100, 5]], Sampling(max_tokens=4, top_p=0.5))
        assert strict.bodies[-1]["top_p"] == 0.5


def test_a_server_with_narrow_limits_gets_what_it_takes(serve, engine_on):
    def answer(body, choices):
        return (400, "too many") if body.get("logprobs", 0) > 5 or body.get("n", 1) > 8 else {"choices": choices}

    narrow = serve(answer)
    (row,) = engine_on(narrow).generate([[100, 5]], Sampling(n=20, max_tokens=4, logprobs=12))
    assert len(row) == 20
    assert [body["n"] for body in narrow.bodies[-3:]] == [8, 8, 4]
    assert {body["logprobs"] for body in narrow.bodies[-3:]} == {5}


@pytest.mark.parametrize("ignores", ["returns one", "refuses n", "returns at most four"])
def test_a_server_that_ignores_n_is_asked_n_times_with_other_seeds(serve, engine_on, ignores):
    def answer(body, choices):
        if ignores == "refuses n" and "n" in body:
            return 400, {"error": "n is not supported"}
        return {"choices": choices[: 4 if ignores == "returns at most four" else 1]}

    server = serve(answer)
    (row,) = engine_on(server).generate([[100, 5]], Sampling(n=6, max_tokens=4))
    assert [sample.text for sample in row] == ["t100"] * 6
    asked = [body for body in server.bodies if body["max_tokens"] > 1]
    assert len(asked) == (2 if ignores == "returns at most four" else 6)
    assert len({body["seed"] for body in asked}) == len(asked)
    again = engine_on(server)
    again.generate([[100, 5]], Sampling(n=6, max_tokens=4))
    assert [body["seed"] for body in server.bodies[-len(asked) :]] == [body["seed"] for body in asked]
    again.generate([[100, 5]], Sampling(n=1, max_tokens=4, first=6))
    assert server.bodies[-1]["seed"] == asked[0]["seed"] + 6  # below 2³¹ for this prompt


# -- servers that take text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["refuses", "reads numbers as text", "takes each number for a prompt"])
@pytest.mark.parametrize("name", ["qwen3", "gemma-2"])
def test_a_server_that_takes_text_only_gets_text_with_the_same_tokens(serve, engine_on, tmp_path, how, name):
    model = make_family(name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def answer(body, choices):
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return {"choices": choices, "usage": {"prompt_tokens": len(tokenizer(prompt)["input_ids"])}}
        if how == "refuses":
            return 400, {"error": "prompt must be a string"}
        if how == "reads numbers as text":
            return {"choices": choices, "usage": {"prompt_tokens": len(str(prompt))}}
        return {"choices": choices * len(prompt), "usage": {"prompt_tokens": len(prompt)}}

    server = serve(answer)
    prompt = tokenizer("Größe <|im_start|> 36")["input_ids"]
    engine = engine_on(server, model=model)
    assert engine.generate([prompt], Sampling(n=2, max_tokens=4))[0][0].text == "t7"
    assert tokenizer(server.prompts[-1])["input_ids"] == prompt
    # An end of a text inside, a broken character: no text has these tokens.
    with pytest.raises(ValueError, match="no text has this prompt's tokens"):
        engine.generate([tokenizer("ö")["input_ids"][:-1]], Sampling(max_tokens=4))


def test_a_text_that_the_server_reads_as_other_tokens_is_an_error(serve, engine_on, tokenizer):
    def answer(body, choices):
        if not isinstance(body["prompt"], str):
            return 400, {"error": "prompt must be a string"}
        extra = 1 if "odd" in body["prompt"] else 0
        return {"choices": choices, "usage": {"prompt_tokens": extra + len(tokenizer(body["prompt"])["input_ids"])}}

    engine = engine_on(serve(answer))
    assert engine.generate([tokenizer("even")["input_ids"]], Sampling(max_tokens=4))
    with pytest.raises(ValueError, match="reads 3 tokens of text as 4"):
        engine.generate([tokenizer("odd")["input_ids"]], Sampling(max_tokens=4))


# -- answers that are none --------------------------------------------------------------------------------------------


CUT_OFF = ("abort", None, "content_filter", "error", "tool_calls", "")
NO_CHOICES = (
    {"choices": []},
    {"choices": None},
    {"choices": ["text"]},
    {"choices": {"text": "t", "finish_reason": "stop"}},
    {"error": {"message": "overloaded"}},
    {"object": "error"},
    [],
    "<html>",
    "null",
)


@pytest.mark.parametrize("answer", [*({"choices": [{"text": "t", "finish_reason": r}]} for r in CUT_OFF), *NO_CHOICES])
def test_an_answer_without_a_completion_that_came_to_its_end_is_none_and_harms_no_other(serve, engine_on, answer):
    server = serve(lambda body, choices: answer if body["prompt"][0] == 13 else {"choices": choices})
    engine = engine_on(server)
    for tag, prompt in enumerate([[100], [13], [101]]):
        engine.submit(tag, prompt, Sampling(n=2, max_tokens=4))
    results = {}
    while done := engine.finished():
        results.update(done)
    assert [results[0][0].text, results[2][0].text] == ["t100", "t101"]
    with pytest.raises(ValueError, match="brings no completion to its end"):
        raise results[1]


def test_a_completion_that_was_cut_off_once_is_asked_for_again(serve, engine_on):
    def answer(body, choices):
        first = body["max_tokens"] > 1 and len(server.prompts) == 1
        return {"choices": [choice | ({"finish_reason": "abort"} if first else {}) for choice in choices]}

    server = serve(answer)
    assert firsts(engine_on(server).generate([[100]], Sampling(max_tokens=4))) == [100]
    assert len(server.prompts) == 2


@pytest.mark.parametrize(
    ("theirs", "ours"), [("eos_token", "stop"), ("eos", "stop"), ("end_turn", "stop"), ("max_tokens", "length")]
)
def test_an_end_by_another_name_is_understood(serve, engine_on, theirs, ours):
    server = serve(lambda body, choices: {"choices": [choice | {"finish_reason": theirs} for choice in choices]})
    ((sample,),) = engine_on(server).generate([[100]], Sampling(max_tokens=4))
    assert (sample.text, sample.finish_reason) == ("t100", ours)


@pytest.mark.parametrize("reason", [None, "done"])
def test_a_server_that_never_says_how_a_completion_ended_is_refused_at_the_start(serve, engine_on, reason):
    silent = serve(lambda body, choices: {"choices": [choice | {"finish_reason": reason} for choice in choices]})
    with pytest.raises(ContractError, match=f"cannot complete a short prompt .*finish_reason {reason}"):
        engine_on(silent)


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("why <answer>1</answer><|im_end|>", "stop", "why <answer>1</answer>"),
        ("why <answer>1</answer><|im_end|>\n", "length", "why <answer>1</answer>"),
        ("why <answer>1</answer><|endoftext|><|im_start|>user\nmore", "length", "why <answer>1</answer>"),
        ("why <answer>1</answer>", "stop", "why <answer>1</answer>"),
        ("why <answer>1", "length", "why <answer>1"),  # it ran into its limit, and stays cut off
    ],
)
def test_an_end_token_left_in_the_text_ends_it(serve, engine_on, tokenizer, text, reason, expected):
    def answer(body, choices):
        return {"choices": [{"text": text, "finish_reason": reason, "index": c["index"]} for c in choices]}

    ((sample,),) = engine_on(serve(answer)).generate([[100]], Sampling(max_tokens=40))
    cut_off = not expected.endswith("</answer>")
    assert (sample.text, sample.finish_reason) == (expected, "length" if cut_off else "stop")
    tokens = tokenizer(expected)["input_ids"]
    assert sample.token_ids[: len(tokens)] == tokens
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert [token in ends for token in sample.token_ids[len(tokens) :]] == [True] * (not cut_off)


# -- lists of models --------------------------------------------------------------------------------------------------

ENTRY = {"id": "fake", "max_model_len": 100}


@pytest.mark.parametrize(
    ("models", "limit"),
    [
        ([ENTRY], 100),
        ({"data": [{"id": "fake", "max_model_len": None}]}, 1024),  # of the folder's config
        ({"data": [{"id": "fake"}, None, "x"]}, 1024),
    ],
)
def test_lists_of_models_of_other_shapes_are_read(serve, engine_on, models, limit):
    server = serve(models=models)
    engine = engine_on(server)
    assert engine.max_model_len == limit
    assert server.bodies[0]["model"] == "fake"


@pytest.mark.parametrize("models", [(404, "no"), {"data": None}, "null", "none", {"error": "no"}, {"data": {}}, []])
def test_without_a_list_of_models_the_name_must_be_given(serve, engine_on, models):
    server = serve(models=models)
    with pytest.raises(ContractError, match="set served_model"):
        engine_on(server)
    engine_on(server, served_model="mine")
    assert server.bodies[0]["model"] == "mine"


def test_which_of_several_models_is_the_users_choice(serve, engine_on):
    server = serve(models={"data": [{"id": "base"}, {"id": "teacher", "max_model_len": 50}]})
    with pytest.raises(ContractError, match="lists base, teacher: set served_model"):
        engine_on(server)
    assert engine_on(server, served_model="teacher").max_model_len == 50
    with pytest.raises(ContractError, match="does not serve 'other'; it has: base, teacher"):
        engine_on(server, served_model="other")


@pytest.mark.parametrize(("status", "hint"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "served_model")])
def test_a_key_or_a_name_that_is_refused_is_said(serve, engine_on, status, hint):
    with pytest.raises(ContractError, match=f"cannot complete a short prompt .*{status}.*{hint}"):
        engine_on(serve(lambda body, choices: (status, {"error": "no"})))
    with pytest.raises(ContractError, match=f"{status}.*set served_model, and check .*{hint}"):
        engine_on(serve(models=(status, {"error": "no"})))


# -- the real one -----------------------------------------------------------------------------------------------------


def documented_command(model: Path, port: str) -> tuple[dict[str, str], list[str]]:
    """The environment and the command of docs/operations.md for machines without a GPU, on this model and port."""
    text = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n([^`]*api_server[^`]*)```", text)
    words = shlex.split(block.replace("\\\n", " "))
    environment = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    command = [sys.executable, *words[len(environment) + 1 :]]
    for option, value in (("--model", str(model)), ("--port", port)):
        command[command.index(option) + 1] = value
    return environment, command


@pytest.mark.vllm
def test_a_real_vllm_server_started_as_documented_agrees_with_transformers(tmp_path: Path, engine_on):
    model = make_family("phi-3", tmp_path / "model")
    url = unused_url()
    environment, command = documented_command(model, url.rsplit(":", 1)[1].removesuffix("/v1"))
    quiet = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "passive", "VLLM_NO_USAGE_STATS": "1"}
    log = (tmp_path / "server.log").open("wb")
    server = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | quiet | environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"{url}/models", timeout=2).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((tmp_path / "server.log").read_text()[-3000:])
                time.sleep(0.5)
        engine = engine_on(url, model=model)
        prompts = [[40, 41, 42], [60, 61, 62, 63, 64, 65], [90]]
        assert_greedy_completions_agree(engine, open_engine(TransformersConfig(), model), prompts)
        # Seeds, and more prompt tokens than the server takes in one step.
        many = [[9 + (i + j) % 200 for j in range(300)] for i in range(40)]
        sampled = engine.generate(many, Sampling(n=3, max_tokens=8, seed=5))
        assert sampled == engine.generate(many, Sampling(n=3, max_tokens=8, seed=5))
        assert [len(row) for row in sampled] == [3] * len(many)
        ends = end_tokens(model, AutoTokenizer.from_pretrained(model))
        (row,) = engine.generate(prompts[:1], Sampling(n=64, max_tokens=200, seed=5))
        assert {sample.token_ids[-1] for sample in row if sample.finish_reason == "stop"} == ends
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(10)
        log.close()
