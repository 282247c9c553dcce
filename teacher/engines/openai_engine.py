"""Servers that speak OpenAI's completions protocol (vLLM's and others) as an engine: how a fleet is used.

Prompts travel as token ids, and a vLLM server returns token ids and log probabilities by id. What another server cannot do
is found out by completions of one token: it gets plain text, one sample at a time, or fewer fields; token ids are then made
from its text, and there may be no log probabilities. The `openai` client does the transport and its retries.
What was left out: streaming, and server discovery; the list of URLs is the fleet.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
from transformers import AutoConfig, AutoTokenizer

from data.contracts import ContractError, Unavailable
from teacher.engines.base import Completion, Engine, Result, Sampling, check_lengths, position_limit, prompt_seed
from teacher.engines.config import ServerConfig
from teacher.reading import end_tokens

log = logging.getLogger(__name__)

_PROBE_SECONDS = 10.0
_ATTEMPTS = 3  # at a prompt that brings servers to errors, timeouts or answers without a whole completion
_SERVER_FAILURES = 8  # errors and timeouts of a server in a row, after which it counts as dead
# What servers call it when the model has ended its completion, and when the limit of tokens did.
_ENDED, _CUT_AT_LIMIT = ("stop", "eos", "eos_token", "stop_sequence", "end_turn"), ("length", "max_tokens")
_Failure = (openai.APIConnectionError, openai.APIStatusError)
# What not every server takes, with the values to try, the best one last.
_OPTIONAL: tuple[tuple[str, Any], ...] = (
    # The neutral values keep a model's generation_config.json out of the sampling.
    *(("top_p", 1.0), ("top_k", -1), ("min_p", 0.0), ("repetition_penalty", 1.0)),
    *(("seed", 1), ("n", 2), ("n", 8), ("n", 32), ("logprobs", 5), ("logprobs", 20)),
    *(("return_token_ids", True), ("return_tokens_as_token_ids", True)),
)


@dataclass
class _Server:
    url: str
    client: openai.OpenAI
    probing: threading.Lock = field(default_factory=threading.Lock)
    takes_ids: bool = True
    fields: dict[str, Any] | None = None  # the optional ones that it takes; None before it was probed
    failures: int = 0
    dead: bool = False
    reason: str = ""


@dataclass(eq=False)
class _Request:
    tag: Any
    prompt: list[int]
    sampling: Sampling
    failures: int = 0


class OpenAIEngine(Engine):
    """See `Engine`. Prompts wait in one queue, from which every server takes the next as soon as it has room.

    One that cannot be reached, after `retries` further tries, is dead, and the others get its prompts.
    """

    def __init__(self, config: ServerConfig, model: Path) -> None:
        self._config = config
        self._access = (
            f"urls (most end in /v1), served_model and the key in the environment variable {config.api_key_env}"
        )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._ends = {self._tokenizer.decode([token]): token for token in sorted(end_tokens(model, self._tokenizer))}
        self._lock = threading.Lock()  # of the tokenizer and of the servers' failures
        # Each with its rank, the lowest first; None, of the highest, ends a thread.
        self._todo: queue.PriorityQueue[tuple[int, int, _Request | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._done: queue.SimpleQueue[tuple[_Request, Result | None]] = queue.SimpleQueue()
        self._open: set[_Request] = set()
        self._servers = [_Server(url, self._client(url)) for url in config.urls]
        for server in self._servers:
            try:
                self._name, limit = self._served(server)
                self._probe(server)
                break
            except _Failure as error:
                self._failed(server, error)
        else:
            raise self._unavailable()
        limit = limit or position_limit(AutoConfig.from_pretrained(model))
        self.max_model_len = min(config.max_model_len or limit, limit)
        for server in self._servers:
            for _ in range(config.concurrency):
                threading.Thread(target=self._work, args=(server,), daemon=True).start()

    def _client(self, url: str) -> openai.OpenAI:
        transport = openai.DefaultHttpxClient(
            timeout=openai.Timeout(self._config.timeout_s, connect=_PROBE_SECONDS),
            limits=httpx.Limits(max_connections=self._config.concurrency),
            trust_env=False,  # servers of a fleet are near: a proxy for the internet is not for them
        )
        key = os.environ.get(self._config.api_key_env) or "none"
        return openai.OpenAI(base_url=url, api_key=key, max_retries=self._config.retries, http_client=transport)

    def submit(self, tag: Any, prompt: list[int], sampling: Sampling) -> None:
        self._open.add(request := _Request(tag, prompt, sampling))
        self._enqueue(request)

    def finished(self) -> list[tuple[Any, Result]]:
        done: list[tuple[Any, Result]] = []
        while self._open and not (done and self._done.empty()):
            if all(server.dead for server in self._servers):
                raise self._unavailable()
            request, result = self._done.get()
            if request not in self._open or result is None:
                continue  # it was cancelled, or waits for another server
            if isinstance(result, ContractError):
                raise result
            self._open.remove(request)
            done.append((request.tag, result))
        return done

    def cancel(self) -> None:
        """See `Engine.cancel`; requests that are on their way end unheard."""
        self._open = set()

    def close(self) -> None:
        """Close the connections; the servers stay."""
        self.cancel()
        for server in self._servers:
            for _ in range(self._config.concurrency):
                self._enqueue(None)
            server.client.close()

    def _enqueue(self, request: _Request | None) -> None:
        rank = 2 if request is None else 0 if request.sampling.first else 1
        self._todo.put((rank, next(self._numbers), request))

    def _work(self, server: _Server) -> None:
        """One of a server's threads: one request after the other, until the engine is closed or the server is dead."""
        while (request := self._todo.get()[2]) is not None:
            if server.dead:
                self._enqueue(request)
                return
            if request not in self._open:
                continue
            result: Result | None
            try:
                result = self._complete(server, request.prompt, request.sampling)
                server.failures = 0
            except _Failure as error:
                result = self._failed(server, error, request)
                if result is None:
                    self._enqueue(request)
            except Exception as error:
                result = error
            self._done.put((request, result))

    def _failed(self, server: _Server, error: Exception, request: _Request | None = None) -> Exception | None:
        """Note a failure that outlived the client's retries. The request's error, or None if it may be the server's."""
        unreachable = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
        with self._lock:
            server.failures += 1
            server.reason = _text(error)
            if not server.dead and (unreachable or server.failures >= _SERVER_FAILURES):
                server.dead = True
                log.warning("server %s is given up: %s", server.url, server.reason)
        if request is not None and not unreachable:
            request.failures += 1
            if request.failures >= _ATTEMPTS:
                return RuntimeError(f"the prompt failed {request.failures} times, last with: {_text(error)}")
        return None

    def _unavailable(self) -> Unavailable:
        reasons = "; ".join(f"{server.url}: {server.reason}" for server in self._servers)
        return Unavailable(f"no server answers any more ({reasons}); start one and run this again")

    def _complete(self, server: _Server, prompt: list[int], sampling: Sampling) -> list[Completion]:
        check_lengths([prompt], self.max_model_len)
        optional = self._probe(server)
        shown = prompt if server.takes_ids else self._as_text(prompt)
        room = self.max_model_len - len(prompt)
        always = {"temperature": sampling.temperature, "max_tokens": min(sampling.max_tokens, room)}
        always |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
        samples: list[Completion] = []
        while (left := sampling.copies - len(samples)) > 0:  # a server may give fewer than it is asked for
            count, number = min(left, optional.get("n", 1)), sampling.first + len(samples)
            values = {
                "seed": (prompt_seed(sampling.seed, prompt) + number) % 2**31,
                "n": count,
                "logprobs": min(sampling.logprobs, optional.get("logprobs", 0)) or None,
            }
            answer = self._answer(server, shown, {name: values.get(name, optional[name]) for name in optional} | always)
            if not server.takes_ids and _tokens_read(answer) not in (None, len(prompt), len(prompt) * count):
                raise _Refused(f"the server reads {len(prompt)} tokens of text as {_tokens_read(answer)}")
            samples += [self._completion(choice) for choice in answer["choices"]]
        return samples[: sampling.copies] * (sampling.n // sampling.copies)

    def _completion(self, choice: dict[str, Any]) -> Completion:
        text: str = choice.get("text") or ""
        # An end token that the server left in the text ends the completion there.
        places = [(text.find(end), end) for end in self._ends if end.strip() and end in text]
        place, end = min(places, default=(None, ""))
        text, finished = text[:place], bool(end) or choice["finish_reason"] in _ENDED
        token_ids: list[int] | None = choice.get("token_ids")
        logprobs = _by_token(choice.get("logprobs")) if token_ids else None
        if token_ids is None:
            with self._lock:
                token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            token_ids += [self._ends.get(end, next(iter(self._ends.values())))] * finished
        return Completion(text, token_ids, "stop" if finished else "length", logprobs)

    def _as_text(self, prompt: list[int]) -> str:
        """The text that a server turns into these very tokens; raises `_Refused` when there is none."""
        with self._lock:
            text = self._tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            # Most tokenizers put the beginning-of-text token there themselves.
            for candidate in (text, text.removeprefix(self._tokenizer.bos_token or "")):
                if self._tokenizer(candidate)["input_ids"] == prompt:
                    return candidate
        raise _Refused("the server takes prompts as text only, and no text has this prompt's tokens")

    def _answer(self, server: _Server, prompt: Any, fields: dict[str, Any], **options: Any) -> dict[str, Any]:
        """The server's answer, its `choices` in order; raises `_Refused` for one that does not bring them to an end."""
        body = {"model": self._name, "prompt": prompt} | fields
        for _ in range(_ATTEMPTS):
            answer = self._json(server, "/completions", body, **options)
            choices = answer.get("choices") if isinstance(answer, dict) else None
            if not (choices and isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)):
                choices = []
            # Cut off by the server (abort, content_filter, null): what there is of it must not count as an answer.
            ends = [choice.get("finish_reason") for choice in choices] or [f"of {answer!s:.200}"]
            if choices and all(end in (*_ENDED, *_CUT_AT_LIMIT) for end in ends):
                return answer | {"choices": sorted(choices, key=lambda choice: choice.get("index") or 0)}
        raise _Refused(f"the server brings no completion to its end: finish_reason {ends[0]}, {_ATTEMPTS} times")

    def _json(self, server: _Server, path: str, body: Any = None, **options: Any) -> Any:
        """What the server says; raises `_Refused` when it does not take the request."""
        ask = server.client.get if body is None else partial(server.client.post, body=body)
        try:
            return ask(path, cast_to=httpx.Response, options=options).json()
        except openai.APIStatusError as error:
            if error.status_code >= 500 or error.status_code in (408, 409, 429):
                raise
            raise _Refused(f"the server refuses the request ({_text(error)})") from error
        except ValueError as error:
            return f"no JSON ({error})"

    def _served(self, server: _Server) -> tuple[str, int]:
        """The model's name on the server and its limit in tokens, 0 where the server does not say."""
        name = self._config.served_model
        try:
            answer = self._json(server, "/models", timeout=_PROBE_SECONDS)
        except _Refused as error:
            answer = str(error)
        entries = answer.get("data") if isinstance(answer, dict) else answer
        limits: dict[Any, Any] = {e.get("id"): e.get("max_model_len") for e in entries or () if isinstance(e, dict)}
        listed = ", ".join(map(str, limits)) or f"no model ({answer!s:.200})"
        if not name and len(limits) != 1:
            raise ContractError(f"{server.url}/models lists {listed}: set served_model, and check {self._access}")
        if limits and name not in ("", *limits):
            raise ContractError(f"the server does not serve '{name}'; it has: {listed}")
        name = name or next(iter(limits))
        return name, int(limits.get(name) or 0)

    def _probe(self, server: _Server) -> dict[str, Any]:
        """The optional fields that the server takes; found out before its first prompt, and said in one line of the log."""
        reasons: list[str] = []

        def ask(prompt: Any, fields: dict[str, Any], **options: Any) -> dict[str, Any]:
            try:
                return self._answer(server, prompt, {"max_tokens": 1, "temperature": 1.0} | fields, **options)
            except (_Refused, openai.InternalServerError) as error:
                if getattr(error, "status_code", 500) > 501:
                    raise  # busy, or starting
                reasons.append(_text(error))
                return {}

        with server.probing:
            if server.fields is not None:
                return server.fields
            ids: list[int] = self._tokenizer("Query: red shoes")["input_ids"]
            answer = ask(ids, {})
            server.takes_ids = len(answer.get("choices", ())) == 1 and _tokens_read(answer) in (None, len(ids))
            prompt = ids if server.takes_ids else self._as_text(ids)
            fields = {name: value for name, value in _OPTIONAL if ask(prompt, {name: value}, max_retries=0)}
            answer = ask(prompt, fields)
            if not answer:
                raise ContractError(
                    f"{server.url} cannot complete a short prompt ({reasons[-1]}); check {self._access}"
                )
            lacks = ["prompts as token ids"] * (not server.takes_ids)
            lacks += [name for name in dict(_OPTIONAL) if name not in fields]
            first, count = answer["choices"][0], len(answer["choices"])
            if count < fields.get("n", 1):
                fields["n"] = count
                lacks.append(f"n above {count}")
            if not (first.get("token_ids") and _by_token(first.get("logprobs"))):
                fields.pop("logprobs", None)
                lacks.append("log probabilities by token id (grade probabilities will be shares of votes)")
            if lacks:
                log.warning("server %s lacks: %s", server.url, ", ".join(lacks))
            server.fields = fields
            return fields


class _Refused(ValueError):
    """The server does not complete this prompt, or not in this way."""


def _text(error: Exception) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}: {error.response.text[:300]}"
    return f"{error} {error.__cause__ or ''}".strip()


def _tokens_read(answer: dict[str, Any]) -> int | None:
    """How many tokens the server took the prompt for, where it says so."""
    return (answer.get("usage") or {}).get("prompt_tokens")


def _by_token(logprobs: dict[str, Any] | None) -> list[dict[int, float]] | None:
    """vLLM's `token_id:123` names as ids; None when the server names tokens by their text, which is ambiguous."""
    if not logprobs or not logprobs.get("top_logprobs"):
        return None
    columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
    steps = [{chosen: own} | (top or {}) for chosen, own, top in zip(*columns, strict=True)]
    if not all(name.startswith("token_id:") for step in steps for name in step):
        return None
    return [{int(name.removeprefix("token_id:")): value for name, value in step.items()} for step in steps]
