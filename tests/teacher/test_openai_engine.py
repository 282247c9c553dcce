"""The engine over servers: small ones for all that servers do otherwise or wrong, a real vLLM server for what comes back."""

import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data.contracts import ContractError, Unavailable
from teacher.engines import open_engine
from teacher.engines.base import Sampling
from teacher.engines.config import ServerConfig, TransformersConfig
from teacher.reading import end_tokens
from tests.teacher.families import make_family

VLLM_ONLY = {"top_k", "min_p", "repetition_penalty", "return_token_ids", "return_tokens_as_token_ids"}


class Server:
    """A completions server on loopback. `answer(body, choices)` gives (status, body) or a body in place of the usual.

    As vLLM it takes token ids and answers with the prompt's first token, `n` times; `models` is what it says of its models.
    """

    def __init__(self, answer: Callable | None = None, models: Any = None, dies_after: int | None = None):
        self.answer = answer or (lambda body, choices: {"choices": choices})
        self.models = {"data": [{"id": "fake", "max_model_len": 100}]} if models is None else models
        self.dies_after = dies_after
        self.bodies: list[dict] = []
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def reply(self, value: Any) -> None:
                status, value = value if isinstance(value, tuple) else (200, value)
                body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.reply(fake.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    if fake.dies_after is not None and len(fake.prompts) >= fake.dies_after:
                        self.close_connection = True
                        self.connection.close()  # as a killed process does, in the middle of a request
                        return
                    fake.bodies.append(body)
                    self.reply(fake.answer(body, choices_of(body)))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # closed connections are meant
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def prompts(self) -> list:
        """The prompts that it was sent after it was probed."""
        return [body["prompt"] for body in self.bodies if body["max_tokens"] > 1]

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def choices_of(body: dict) -> list[dict]:
    """What vLLM would say."""
    first = body["prompt"][0] if isinstance(body["prompt"], list) else 7
    choice: dict = {"text": f"t{first}", "finish_reason": "stop"}
    if body.get("return_token_ids"):
        choice["token_ids"] = [first]
    if body.get("logprobs"):
        name = f"token_id:{first}" if body.get("return_tokens_as_token_ids") else "t"
        top = {name: -0.5} | ({"token_id:3": -1.0} if body.get("return_tokens_as_token_ids") else {"u": -1.0})
        choice["logprobs"] = {"tokens": [name], "token_logprobs": [-0.5], "top_logprobs": [top]}
    return [choice | {"index": i} for i in range(body.get("n", 1))]


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


def test_a_dying_server_is_survived(serve, engine_on):
    dying, living = serve(dies_after=5), serve()
    engine = engine_on(dying, living, concurrency=4)
    assert firsts(engine.generate(PROMPTS, Sampling(max_tokens=4))) == [prompt[0] for prompt in PROMPTS]
    assert len(dying.prompts) == 5


def test_a_server_that_never_lived_is_survived(serve, engine_on):
    engine = engine_on(unused_url(), serve())
    assert firsts(engine.generate(PROMPTS, Sampling(max_tokens=4))) == [prompt[0] for prompt in PROMPTS]


def test_a_busy_server_is_tried_again(serve, engine_on):
    busy = serve(lambda body, choices: {"choices": choices} if len(busy.bodies) > 3 else (503, {"error": "busy"}))
    engine = engine_on(busy, retries=4, concurrency=1)
    assert firsts(engine.generate(PROMPTS[:3], Sampling(max_tokens=4))) == [100, 101, 102]


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


@pytest.mark.parametrize("reason", ["abort", None, "content_filter", "error", "tool_calls", ""])
def test_a_completion_that_was_cut_off_is_no_answer(serve, engine_on, reason):
    def answer(body, choices):
        cut = body["prompt"][0] == 13
        return {"choices": [choice | ({"finish_reason": reason} if cut else {}) for choice in choices]}

    server = serve(answer)
    engine = engine_on(server)
    for tag, prompt in enumerate([[100], [13], [101]]):
        engine.submit(tag, prompt, Sampling(n=2, max_tokens=4))
    results = {}
    while done := engine.finished():
        results.update(done)
    assert [results[0][0].text, results[2][0].text] == ["t100", "t101"]
    assert isinstance(results[1], ValueError)
    assert f"finish_reason {reason}" in str(results[1])


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
    "answer",
    [
        {"error": {"message": "overloaded"}},
        {"choices": []},
        {"choices": None},
        {"choices": ["text"]},
        {"choices": {"text": "t", "finish_reason": "stop"}},
        [],
        "<html>",
        {"object": "error"},
        "null",
    ],
)
def test_an_error_in_an_answer_that_looks_well_is_an_error(serve, engine_on, answer):
    server = serve(lambda body, choices: answer if body["prompt"][0] == 13 else {"choices": choices})
    engine = engine_on(server)
    with pytest.raises(ValueError, match=r"brings no completion to its end"):
        engine.generate([[13]], Sampling(max_tokens=4))
    assert firsts(engine.generate([[100]], Sampling(max_tokens=4))) == [100]


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("why <answer>1</answer><|im_end|>", "stop", "why <answer>1</answer>"),
        ("why <answer>1</answer><|im_end|>\n", "length", "why <answer>1</answer>"),
        ("why <answer>1</answer><|endoftext|><|im_start|>user\nmore", "length", "why <answer>1</answer>"),
        ("why <answer>1</answer>", "stop", "why <answer>1</answer>"),
    ],
)
def test_an_end_token_left_in_the_text_ends_it(serve, engine_on, tokenizer, text, reason, expected):
    def answer(body, choices):
        return {"choices": [{"text": text, "finish_reason": reason, "index": c["index"]} for c in choices]}

    ((sample,),) = engine_on(serve(answer)).generate([[100]], Sampling(max_tokens=40))
    assert (sample.text, sample.finish_reason) == (expected, "stop")
    assert sample.token_ids[:-1] == tokenizer(expected)["input_ids"]
    assert sample.token_ids[-1] in tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def test_a_text_that_ran_into_its_limit_stays_cut_off(serve, engine_on, tokenizer):
    server = serve(lambda body, choices: {"choices": [{"text": "why <answer>1", "finish_reason": "length"}]})
    ((sample,),) = engine_on(server).generate([[100]], Sampling(max_tokens=40))
    assert sample.finish_reason == "length"
    assert sample.token_ids == tokenizer("why <answer>1")["input_ids"]


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
        ours = open_engine(TransformersConfig(), model)
        prompts = [[40, 41, 42], [60, 61, 62, 63, 64, 65], [90]]
        greedy = Sampling(n=1, temperature=0.0, max_tokens=16, logprobs=5)
        for (theirs,), (mine,) in zip(engine.generate(prompts, greedy), ours.generate(prompts, greedy), strict=True):
            assert theirs.token_ids == mine.token_ids
            assert theirs.text.replace("\ufffd", "") == mine.text.replace("\ufffd", "")
            assert theirs.finish_reason == mine.finish_reason
            for a, b in zip(theirs.top_logprobs, mine.top_logprobs, strict=True):
                assert {token: a[token] for token in b} == pytest.approx(b, abs=1e-3)
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
