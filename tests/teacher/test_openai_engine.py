"""The engine over servers: a fake one for what goes wrong, a real vLLM server for what comes back."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.contracts import ContractError
from teacher.engines.base import EngineConfig, Sampling, open_engine
from teacher.engines.transformers_engine import load_transformers


class FakeServer:
    """A made-up completions server on loopback: it answers with the prompt's first token, or fails as told."""

    def __init__(self, answers_before_dying: int | None = None, failures_first: int = 0, token_ids: bool = True):
        self.left = answers_before_dying
        self.failures = failures_first
        self.token_ids = token_ids
        self.served: list[int] = []
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def reply(self, status: int, value: object) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "fake", "max_model_len": 50}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    if fake.left is not None and len(fake.served) >= fake.left:
                        self.close_connection = True
                        self.connection.close()  # as a killed process does, in the middle of a request
                        return
                    if fake.failures:
                        fake.failures -= 1
                        self.reply(503, {"error": "busy"})
                        return
                    first = body["prompt"][0]
                    if first == 13:
                        self.reply(400, {"error": "unlucky"})
                        return
                    fake.served.append(first)
                choice = {"text": f"t{first}", "finish_reason": "stop"}
                if fake.token_ids:
                    top = [{f"token_id:{first}": -0.5, "token_id:3": -1.0}]
                    named = {"tokens": [f"token_id:{first}"], "token_logprobs": [-0.5], "top_logprobs": top}
                    choice |= {"token_ids": [first], "logprobs": named}
                self.reply(200, {"choices": [choice | {"index": i} for i in range(body["n"])]})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # closed connections are meant
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def fake():
    started: list[FakeServer] = []

    def start(**how) -> FakeServer:
        started.append(FakeServer(**how))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def engine_on(folder: Path, *servers: FakeServer | str, retries: int = 1, **more):
    urls = tuple(server if isinstance(server, str) else server.url for server in servers)
    return open_engine(EngineConfig(kind="openai", urls=urls, retries=retries, **more), folder)


def unused_url() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}/v1"


SHORT = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [9]]
PROMPTS = [[100 + i, 5] for i in range(40)]


def firsts(results) -> list[int]:
    return [row[0].token_ids[0] for row in results]


def test_prompts_are_spread_evenly_and_come_back_in_order(fake, folder: Path):
    one, two = fake(), fake()
    engine = engine_on(folder, one, two, concurrency=4)
    results = engine.generate(PROMPTS, Sampling(n=2, max_tokens=4, logprobs=2))
    engine.close()
    assert firsts(results) == [prompt[0] for prompt in PROMPTS]
    assert [len(row) for row in results] == [2] * len(PROMPTS)
    assert results[0][1].top_logprobs == [{100: -0.5, 3: -1.0}]
    assert engine.max_model_len == 50
    assert min(len(one.served), len(two.served)) >= 10


def test_a_dying_server_is_survived(fake, folder: Path):
    dying, living = fake(answers_before_dying=5), fake()
    engine = engine_on(folder, dying, living, concurrency=4)
    results = engine.generate(PROMPTS, Sampling(max_tokens=4))
    engine.close()
    assert firsts(results) == [prompt[0] for prompt in PROMPTS]
    assert len(dying.served) == 5


def test_a_server_that_never_lived_is_survived(fake, folder: Path):
    engine = engine_on(folder, unused_url(), fake())
    assert firsts(engine.generate(PROMPTS, Sampling(max_tokens=4))) == [prompt[0] for prompt in PROMPTS]
    engine.close()


def test_a_busy_server_is_tried_again(fake, folder: Path):
    busy = fake(failures_first=3)
    engine = engine_on(folder, busy, retries=4, concurrency=1)
    assert firsts(engine.generate(PROMPTS[:3], Sampling(max_tokens=4))) == [100, 101, 102]
    engine.close()


def test_all_dead_is_one_sentence(fake, folder: Path):
    with pytest.raises(ContractError, match="no server answers any more"):
        engine_on(folder, unused_url(), retries=0)
    engine = engine_on(folder, fake(answers_before_dying=3), retries=0, concurrency=2)
    with pytest.raises(ContractError, match="no server answers any more"):
        engine.generate(PROMPTS, Sampling(max_tokens=4))
    engine.close()


def test_a_refused_prompt_is_not_a_dead_server(fake, folder: Path):
    engine = engine_on(folder, fake(), retries=0)
    with pytest.raises(ValueError, match="unlucky"):
        engine.generate([[100], [13]], Sampling(max_tokens=4))
    with pytest.raises(ValueError, match="60 tokens"):
        engine.generate([[100] * 60], Sampling(max_tokens=4))
    assert firsts(engine.generate([[100]], Sampling(max_tokens=4))) == [100]
    engine.close()


def test_a_wrong_model_name_is_told(fake, folder: Path):
    with pytest.raises(ContractError, match="does not serve 'other'; it has: fake"):
        engine_on(folder, fake(), served_model="other")


@pytest.mark.vllm
def test_a_real_vllm_server_agrees_with_transformers(tmp_path: Path, decoder: Path):
    model = decoder
    url = unused_url()
    port = url.rsplit(":", 1)[1].removesuffix("/v1")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", port]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    log = (tmp_path / "server.log").open("wb")
    server = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | quiet, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{url}/models", timeout=2).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((tmp_path / "server.log").read_text()[-3000:])
                time.sleep(0.5)
        engine = open_engine(EngineConfig(kind="openai", urls=(url,)), model)
        ours = load_transformers(EngineConfig(kind="transformers"), model)
        greedy = Sampling(n=1, temperature=0.0, max_tokens=16, logprobs=5)
        pairs = zip(engine.generate(SHORT, greedy), ours.generate(SHORT, greedy), strict=True)
        for (theirs,), (mine,) in pairs:
            assert theirs.token_ids == mine.token_ids
            assert theirs.text.replace("\ufffd", "") == mine.text.replace("\ufffd", "")
            assert theirs.finish_reason == mine.finish_reason
            for a, b in zip(theirs.top_logprobs, mine.top_logprobs, strict=True):
                assert {token: a[token] for token in b} == pytest.approx(b, abs=1e-3)
        sampled = engine.generate(SHORT, Sampling(n=3, max_tokens=8, seed=5))
        assert sampled == engine.generate(SHORT, Sampling(n=3, max_tokens=8, seed=5))
        assert [len(row) for row in sampled] == [3] * len(SHORT)
        engine.close()
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(10)
        log.close()
