"""The one small interface behind which the engines stand, and the config that chooses one.

A stream of prompts goes through `submit` and `finished`: prompts are put in while others are being completed, so that
the engine is never idle between batches. `generate` is the same for a list. What was left out: tokens as they come, chat
messages, stop strings. A prompt arrives as token ids, so that every engine sees the same tokens, and a completion ends at
the model's own end token or at `max_tokens`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from data.contracts import Config, ContractError


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `logprobs` is how many of the likeliest tokens to report, 0 = none."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    logprobs: int = 0


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    `token_ids` includes the end token, `text` has no special tokens. `top_logprobs[t]` maps token id → natural log
    probability under the model itself (before temperature and top-p) for the likeliest tokens at step t and for the
    chosen one; None when none were asked for or the server cannot give them.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    top_logprobs: list[dict[int, float]] | None = None


# What becomes of a prompt: its completions, or why there are none.
Result = list[Completion] | Exception


class Engine(Protocol):
    """A loaded model. `max_model_len` is the longest prompt plus completion in tokens. Used by one thread."""

    @property
    def max_model_len(self) -> int: ...

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt (token ids), in the order of the prompts: [prompt][sample].

        A prompt's completions depend on the prompt and `sampling` only, not on what else is in the batch, up to the
        rounding of batched matrix products. Raises `ValueError` for a prompt that cannot be completed.
        """
        ...

    def submit(self, tag: Any, prompt: list[int], sampling: Sampling) -> None:
        """Take in a prompt (token ids) under a hashable name of the caller's, and return at once."""
        ...

    def finished(self) -> list[tuple[Any, Result]]:
        """Work until at least one submitted prompt is done; all that are, by their names, in no order.

        A prompt that cannot be completed comes back with its error and harms no other. Empty when nothing is
        submitted. Raises `ContractError` when the engine as a whole cannot go on.
        """
        ...

    def cancel(self) -> None:
        """Drop everything that was submitted and has not come back."""
        ...

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""
        ...


def generate_all(engine: Engine, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[Completion]]:
    """`Engine.generate` by way of `submit` and `finished`; raises the first error of a prompt."""
    results: list[list[Completion]] = [[] for _ in prompts]
    for place, prompt in enumerate(prompts):
        engine.submit(place, prompt, sampling)
    try:
        while done := engine.finished():
            for place, result in done:
                if isinstance(result, Exception):
                    raise result
                results[place] = result
    finally:
        engine.cancel()
    return results


class EngineConfig(Config):
    kind: Literal["vllm", "openai", "transformers"] = "vllm"
    """`vllm` in this process, `openai` for servers that speak OpenAI's protocol, `transformers` where vLLM has no build."""
    max_model_len: int = Field(default=0, ge=0, le=10_000_000)
    """Longest prompt plus completion in tokens; 0 takes the model's own limit. A small value saves memory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` is float32 on a CPU and the model's own on a GPU."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM may take."""
    kv_cache_gib: int = Field(default=1, ge=1, le=4096)
    """Memory for vLLM's key-value cache on a CPU, in GiB."""
    max_num_seqs: int = Field(default=256, ge=1, le=65_536)
    """Completions that vLLM decodes at the same time."""
    enforce_eager: bool | None = None
    """Skip graph capture and compilation in vLLM; unset, it is skipped on a CPU and done on a GPU."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of an engine in this process; 0 takes all cores (the annotation job divides them among its engines)."""
    urls: tuple[str, ...] = ()
    """`openai` only: base URLs of the servers, such as `http://gpu-1:8000/v1`; prompts are spread over them evenly."""
    served_model: str = ""
    """`openai` only: the model's name on the servers; empty asks the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """`openai` only: environment variable that holds the servers' key, if they want one."""
    concurrency: int = Field(default=64, ge=1, le=4096)
    """`openai` only: requests in flight at each server."""
    timeout_s: float = Field(default=600.0, gt=0)
    """`openai` only: seconds to wait for one request."""
    retries: int = Field(default=6, ge=0, le=20)
    """`openai` only: how often in a row a server may fail, with growing pauses, before it counts as dead."""
    batch_size: int = Field(default=32, ge=1, le=4096)
    """`transformers` only: sequences decoded at the same time."""

    @field_validator("urls")
    @classmethod
    def _http(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"'{url}' is not a URL; it must start with http:// or https://")
        return tuple(url.rstrip("/") for url in urls)

    @model_validator(mode="after")
    def _urls_for_servers(self) -> Self:
        if self.kind == "openai" and not self.urls:
            raise ValueError("kind 'openai' needs `urls`, at least one server")
        return self


def open_engine(config: EngineConfig, model: Path) -> Engine:
    """Load `model` (a transformers folder) in the engine that `config` names.

    Raises `ContractError` when the engine is not installed or cannot load the model.
    """
    if not (model / "config.json").is_file():
        raise ContractError(f"{model} has no config.json: it is not a model folder")
    if config.kind == "openai":
        from teacher.engines.openai_engine import OpenAIEngine

        return OpenAIEngine(config, model)
    if config.kind == "transformers":
        from teacher.engines.transformers_engine import load_transformers

        return load_transformers(config, model)
    from teacher.engines.vllm_engine import VLLMEngine

    return VLLMEngine(config, model)


def check_lengths(prompts: Sequence[list[int]], max_model_len: int) -> None:
    """Raise `ValueError` for a prompt that is empty or leaves no room for a completion."""
    for prompt in prompts:
        if not 0 < len(prompt) < max_model_len:
            raise ValueError(f"a prompt has {len(prompt)} tokens, the model takes 1 to {max_model_len - 1}")


def prompt_seed(seed: int, prompt: Sequence[int]) -> int:
    """A 31-bit seed from the run's seed and the prompt itself, so that a prompt's place in a batch does not matter."""
    hashed = hashlib.sha256(f"{seed}:".encode() + array("q", prompt).tobytes())
    return int.from_bytes(hashed.digest()[:4], "big") >> 1
