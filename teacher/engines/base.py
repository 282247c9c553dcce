"""The one small interface behind which the engines stand.

A stream of prompts goes through `submit` and `finished`: prompts are put in while others are being completed, so that
the engine is never idle between batches. `generate` is the same for a list. What was left out: tokens as they come, chat
messages, stop strings. A prompt arrives as token ids, so that every engine sees the same tokens, and a completion ends at
one of the model's end tokens or at `max_tokens`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `logprobs` is how many of the likeliest tokens to report, 0 = none.

    A prompt's samples are numbered, and each has its own seed: these are `n` samples from number `first` on.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    logprobs: int = 0
    first: int = 0

    @property
    def copies(self) -> int:
        """Completions to compute: greedy ones are all the same, so one is enough."""
        return 1 if self.temperature == 0 else self.n


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


class Engine(ABC):
    """A loaded model. `max_model_len` is the longest prompt plus completion in tokens. Used by one thread.

    A prompt's completions depend on the prompt and its sampling only, not on what else is in the batch, up to the
    rounding of batched matrix products. A completion that ended in any other way than at an end token or at its longest
    length is no completion: its prompt fails.
    """

    max_model_len: int

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt (token ids), in the order of the prompts: [prompt][sample].

        Raises `ValueError` for a prompt that cannot be completed.
        """
        check_lengths(prompts, self.max_model_len)
        results: list[list[Completion]] = [[] for _ in prompts]
        for place, prompt in enumerate(prompts):
            self.submit(place, prompt, sampling)
        try:
            while done := self.finished():
                for place, result in done:
                    if isinstance(result, Exception):
                        raise result
                    results[place] = result
        finally:
            self.cancel()
        return results

    @abstractmethod
    def submit(self, tag: Any, prompt: list[int], sampling: Sampling) -> None:
        """Take in a prompt (token ids) under a hashable name of the caller's, and return at once.

        Further samples of a prompt (`sampling.first` > 0) go before the prompts that wait for their first.
        """

    @abstractmethod
    def finished(self) -> list[tuple[Any, Result]]:
        """Work until at least one submitted prompt is done; all that are, by their names, in no order.

        A prompt that cannot be completed comes back with its error and harms no other. Empty when nothing is
        submitted. Raises `ContractError` when the engine as a whole cannot go on.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Drop everything that was submitted and has not come back."""

    @abstractmethod
    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""


def check_lengths(prompts: Sequence[list[int]], max_model_len: int) -> None:
    """Raise `ValueError` for a prompt that is empty or leaves no room for a completion."""
    for prompt in prompts:
        if not 0 < len(prompt) < max_model_len:
            raise ValueError(f"a prompt has {len(prompt)} tokens, the model takes 1 to {max_model_len - 1}")


def position_limit(config: Any) -> int:
    """The positions that a transformers config gives a model; a million where it names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1_000_000


def prompt_seed(seed: int, prompt: Sequence[int]) -> int:
    """A 31-bit seed from the run's seed and the prompt itself, so that a prompt's place in a batch does not matter."""
    hashed = hashlib.sha256(f"{seed}:".encode() + array("q", prompt).tobytes())
    return int.from_bytes(hashed.digest()[:4], "big") >> 1
