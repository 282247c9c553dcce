"""Servers that speak OpenAI's completions protocol (`vllm serve`) as an engine: how a fleet is used.

Prompts travel as token ids. A vLLM server returns token ids and log probabilities by id; from a server that cannot,
token ids are recomputed from the text and there are no log probabilities.
What was left out: streaming, and server discovery; the list of URLs is the fleet.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from data.contracts import ContractError, Unavailable
from teacher.engines.base import (
    Completion,
    EngineConfig,
    Result,
    Sampling,
    check_lengths,
    generate_all,
    prompt_seed,
)

log = logging.getLogger(__name__)

_PROBE_SECONDS = 10.0
_LONGEST_PAUSE = 30.0
# Failures of one prompt, on whatever server, after which the prompt is given up rather than the servers.
_PROMPT_ATTEMPTS = 8


class _Server:
    """One URL and how it fares. All fields are guarded by the fleet's condition."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.in_flight = 0
        self.sent = 0
        self.failures = 0  # in a row; calls that were in flight together count as one
        self.down_since = 0.0
        self.down_until = 0.0
        self.dead = False
        self.reason = ""


class OpenAIEngine:
    """See `Engine`. Each prompt is one request, sent to the server with the fewest requests in flight.

    A server that fails gets growing pauses and counts as dead after `retries` further failures in a row; its prompts go
    to the others. When all are dead, `Unavailable`.
    """

    def __init__(self, config: EngineConfig, model: Path) -> None:
        self._config = config
        self._folder = model
        self._tokenizer: Any = None
        self._servers = [_Server(url) for url in config.urls]
        self._changed = threading.Condition()
        key = os.environ.get(config.api_key_env, "")
        workers = config.concurrency * len(config.urls)
        self._client = httpx.Client(
            timeout=httpx.Timeout(config.timeout_s, connect=_PROBE_SECONDS),
            limits=httpx.Limits(max_connections=workers, max_keepalive_connections=workers),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=False,  # servers of a fleet are near: a proxy for the internet is not for them
        )
        try:
            self._name, limit = self._served(self._call(self._models, "the list of models"))
        except BaseException:
            self._client.close()
            raise
        own = config.max_model_len or limit
        self.max_model_len: int = min(own, limit)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="engine")
        self._running: dict[Future[list[Completion]], Any] = {}
        self._done: queue.SimpleQueue[Future[list[Completion]]] = queue.SimpleQueue()

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """See `Engine.generate`."""
        check_lengths(prompts, self.max_model_len)
        return generate_all(self, prompts, sampling)

    def submit(self, tag: Any, prompt: list[int], sampling: Sampling) -> None:
        """See `Engine.submit`; a prompt waits here until a server has room for it."""
        future = self._pool.submit(self._one, prompt, sampling)
        self._running[future] = tag
        future.add_done_callback(self._done.put)

    def finished(self) -> list[tuple[Any, Result]]:
        """See `Engine.finished`."""
        done: list[tuple[Any, Result]] = []
        while self._running and not (done and self._done.empty()):
            future = self._done.get()
            if future not in self._running:
                continue  # of a stream that was cancelled
            error = future.exception()
            if isinstance(error, ContractError) or (error is not None and not isinstance(error, Exception)):
                raise error
            tag = self._running.pop(future)
            done.append((tag, future.result() if error is None else error))
        return done

    def cancel(self) -> None:
        """See `Engine.cancel`; requests that are on their way end unheard."""
        running, self._running = self._running, {}
        for future in running:
            future.cancel()

    def close(self) -> None:
        """Close the connections; the servers stay."""
        self.cancel()
        self._client.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, prompt: list[int], sampling: Sampling) -> list[Completion]:
        check_lengths([prompt], self.max_model_len)
        copies = 1 if sampling.temperature == 0 else sampling.n
        body: dict[str, Any] = {
            "model": self._name,
            "prompt": list(prompt),
            "n": copies,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": min(sampling.max_tokens, self.max_model_len - len(prompt)),
            "seed": prompt_seed(sampling.seed, prompt),
            # vLLM's own. The neutral values keep a model's generation_config.json out of the sampling.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if sampling.logprobs:
            body["logprobs"] = sampling.logprobs
        answer = self._call(
            lambda server: self._read(self._client.post(f"{server.url}/completions", json=body)), "a completion"
        )
        choices = sorted(answer.get("choices", []), key=lambda choice: choice.get("index", 0))
        if len(choices) != copies:
            raise RuntimeError(f"the server returned {len(choices)} completions, {copies} were asked for")
        return [self._completion(choice) for choice in choices] * (sampling.n // copies)

    def _completion(self, choice: dict[str, Any]) -> Completion:
        text = choice.get("text") or ""
        returned: list[int] | None = choice.get("token_ids")
        return Completion(
            text=text,
            token_ids=self._tokens(text) if returned is None else returned,
            finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
            top_logprobs=None if returned is None else _by_token(choice.get("logprobs")),
        )

    def _tokens(self, text: str) -> list[int]:
        with self._changed:  # threads share it, and it is loaded once
            if self._tokenizer is None:
                from transformers import AutoTokenizer

                self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _served(self, answer: dict[str, Any]) -> tuple[str, int]:
        """The model's name on the servers and its limit in tokens (from the folder, where the server does not say)."""
        listed = {entry.get("id", ""): entry for entry in answer.get("data", [])}
        name = self._config.served_model or next(iter(listed), "")
        if not name or (listed and name not in listed):
            raise ContractError(f"the server does not serve '{name}'; it has: {', '.join(listed) or 'nothing'}")
        limit = listed.get(name, {}).get("max_model_len")
        if not limit:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(self._folder).get_text_config()
            limit = getattr(config, "max_position_embeddings", None) or 1_000_000
        return name, int(limit)

    def _models(self, server: _Server) -> dict[str, Any]:
        return self._read(self._client.get(f"{server.url}/models", timeout=_PROBE_SECONDS))

    # -- the fleet ----------------------------------------------------------------------------------------------------

    def _call(self, request: Any, what: str) -> Any:
        """`request(server)` on one server after the other until one answers."""
        attempts = 0
        while True:
            server = self._pick()
            started = time.monotonic()
            try:
                answer = request(server)
            except (httpx.TransportError, _Unwell) as error:
                self._failed(server, started, error)
                attempts += 1
                # Servers that are still alive after so many failures of one prompt are not the cause.
                if attempts >= _PROMPT_ATTEMPTS and any(other.failures == 0 for other in self._servers):
                    raise RuntimeError(f"{what} failed {attempts} times, last with: {_text(error)}") from error
            except BaseException:
                self._release(server, well=False)
                raise
            else:
                self._release(server, well=True)
                return answer

    def _pick(self) -> _Server:
        with self._changed:
            while True:
                alive = [server for server in self._servers if not server.dead]
                if not alive:
                    reasons = "; ".join(f"{server.url}: {server.reason}" for server in self._servers)
                    raise Unavailable(f"no server answers any more ({reasons}); start one and run this again")
                now = time.monotonic()
                ready = [s for s in alive if s.down_until <= now and s.in_flight < self._config.concurrency]
                if ready:
                    server = min(ready, key=lambda s: (s.in_flight, s.sent))
                    server.in_flight += 1
                    server.sent += 1
                    return server
                pauses = [s.down_until - now for s in alive if s.down_until > now]
                self._changed.wait(min(pauses) if len(pauses) == len(alive) else min([*pauses, 1.0]))

    def _release(self, server: _Server, well: bool) -> None:
        with self._changed:
            server.in_flight -= 1
            if well:
                server.failures, server.down_until, server.dead = 0, 0.0, False
            self._changed.notify_all()

    def _failed(self, server: _Server, started: float, error: Exception) -> None:
        with self._changed:
            server.in_flight -= 1
            # What was sent before the server went down says nothing new.
            if started >= server.down_since:
                server.failures += 1
                server.reason = _text(error)
                server.dead = server.failures > self._config.retries
                pause = min(0.5 * 2 ** (server.failures - 1), _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
                server.down_since = time.monotonic()
                server.down_until = server.down_since + pause
                state = "given up" if server.dead else f"paused for {pause:.1f} s"
                log.warning("server %s failed (%s): %s", server.url, server.reason, state)
            self._changed.notify_all()

    def _read(self, response: httpx.Response) -> Any:
        """The JSON of a response. Raises `_Unwell` when another try may help, and what fits when it cannot."""
        status = response.status_code
        if status == 429 or status >= 500:
            raise _Unwell(f"HTTP {status}: {response.text[:200]}")
        if status in (401, 403):
            raise ContractError(
                f"{response.url} refuses the key (HTTP {status}); set the environment variable {self._config.api_key_env}"
            )
        if status == 404:
            raise ContractError(f"{response.url} does not exist (HTTP 404: {response.text[:200]}); check urls")
        if status >= 400:
            raise ValueError(f"the server refuses the prompt (HTTP {status}): {response.text[:300]}")
        try:
            return response.json()
        except ValueError as error:
            raise _Unwell("the answer is not JSON") from error


class _Unwell(Exception):
    """The server answered, and not with what was asked for; another try may help."""


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _by_token(logprobs: dict[str, Any] | None) -> list[dict[int, float]] | None:
    """vLLM's `token_id:123` names as ids; None when the server names tokens by their text, which is ambiguous."""
    if not logprobs or not logprobs.get("top_logprobs"):
        return None
    steps = []
    for chosen, own, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        named = {chosen: own} | (top or {})
        if not all(name.startswith("token_id:") for name in named):
            return None
        steps.append({int(name.removeprefix("token_id:")): value for name, value in named.items()})
    return steps
