"""A server of completions on loopback, for all that servers do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


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
