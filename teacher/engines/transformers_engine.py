"""A transformers module as an engine: slower than vLLM, and it runs wherever torch does.

Every completion has a random stream of its own, so that it does not depend on the batch it happens to be in.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.contracts import ContractError, out_of_memory
from teacher.decoding import cache_limit, decode, draw
from teacher.engines.base import Completion, Engine, Result, Sampling, check_lengths, position_limit, prompt_seed
from teacher.engines.config import TransformersConfig
from teacher.model import load_causal_lm, number_format

log = logging.getLogger(__name__)

MAX_LOGPROBS = 20  # vLLM's limit, so that a setting that works on one engine works on all


class TransformersEngine(Engine):
    """Batched generation with a model and tokenizer that `teacher.model` has loaded; the model stays the caller's.

    Its mode (train or eval) is put back after every call.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 32, max_model_len: int = 0) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        own = min(position_limit(model.config), cache_limit(model.config))
        self.max_model_len = min(max_model_len or own, own)
        self._ends = frozenset(model.generation_config.eos_token_id)
        self._queue: list[tuple[Any, list[int], Sampling]] = []

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[Completion]]:
        return self._generate([(prompt, sampling) for prompt in prompts])

    def _generate(self, requests: Sequence[tuple[list[int], Sampling]]) -> list[list[Completion]]:
        """[request][sample], of requests whose samplings are alike (see `_alike`)."""
        check_lengths([prompt for prompt, _ in requests], self.max_model_len)
        # Like lengths together, the longest first: memory runs out at once or never.
        places = sorted(range(len(requests)), key=lambda place: -len(requests[place][0]))
        work = [(place, number) for place in places for number in range(requests[place][1].copies)]
        results: list[list[Completion]] = [[] for _ in requests]
        training = self._model.training
        self._model.eval()
        try:
            done = 0
            while done < len(work):
                batch = work[done : done + self._batch_size]
                completions = self._fitting([(*requests[place], number) for place, number in batch])
                if completions is None:
                    continue
                for (place, _), completion in zip(batch, completions, strict=True):
                    results[place].append(completion)
                done += len(batch)
        finally:
            self._model.train(training)
        return [row * (sampling.n // sampling.copies) for row, (_, sampling) in zip(results, requests, strict=True)]

    def submit(self, tag: Any, prompt: list[int], sampling: Sampling) -> None:
        self._queue.append((tag, prompt, sampling))

    def finished(self) -> list[tuple[Any, Result]]:
        """See `Engine.finished`: the next full batch, as this engine cannot take in more meanwhile."""
        if not self._queue:
            return []
        self._queue.sort(key=lambda request: request[2].first == 0)
        alike = itertools.takewhile(lambda request: _alike(request[2]) == _alike(self._queue[0][2]), self._queue)
        sizes = itertools.accumulate(sampling.copies for _, _, sampling in alike)
        count = sum(1 for _ in itertools.takewhile(lambda size: size <= self._batch_size, sizes))
        batch = self._queue[: max(1, count)]
        self._queue = self._queue[len(batch) :]
        return self._completed(batch)

    def _completed(self, batch: list[tuple[Any, list[int], Sampling]]) -> list[tuple[Any, Result]]:
        """A batch; when it fails each of its prompts alone, so that only the culprit is lost."""
        try:
            results = self._generate([(prompt, sampling) for _, prompt, sampling in batch])
        except ContractError:  # no prompt's fault
            raise
        except Exception as error:
            if len(batch) == 1:
                return [(batch[0][0], error)]
            return [result for request in batch for result in self._completed([request])]
        return [(tag, result) for (tag, _, _), result in zip(batch, results, strict=True)]

    def cancel(self) -> None:
        self._queue = []

    def close(self) -> None:
        """Let the model go; one that the caller still holds stays loaded."""
        self._model = None

    def _fitting(self, batch: list[tuple[list[int], Sampling, int]]) -> list[Completion] | None:
        """The completions of a batch; None if they do not fit into memory: from now on, half as many are tried at a time."""
        try:
            return self._batch(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not out_of_memory(error):
                raise
        # Only here is what the failed batch had in memory free.
        torch.cuda.empty_cache()
        self._batch_size = len(batch) // 2
        log.warning("%d sequences at a time do not fit into memory: on with %d", len(batch), self._batch_size)
        return None

    def _batch(self, batch: list[tuple[list[int], Sampling, int]]) -> list[Completion]:
        prompts, sampling = [prompt for prompt, _, _ in batch], batch[0][1]
        seeds = [prompt_seed(asked.seed, prompt) + asked.first + number for prompt, asked, number in batch]
        sampler = _Sampler(sampling, seeds, self._model.device)
        limits = [min(sampling.max_tokens, self.max_model_len - len(prompt)) for prompt in prompts]
        sampled = decode(
            self._model, prompts, limits, ends=self._ends, pad=self._tokenizer.pad_token_id, choose=sampler
        )
        return [self._completion(tokens, sampler.top_logprobs[row]) for row, tokens in enumerate(sampled)]

    def _completion(self, tokens: list[int], top_logprobs: list[dict[int, float]] | None) -> Completion:
        stopped = tokens[-1] in self._ends
        # An end token may be an ordinary one, and is no text either way.
        text = tokens[:-1] if stopped else tokens
        return Completion(
            text=self._tokenizer.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            token_ids=tokens,
            finish_reason="stop" if stopped else "length",
            top_logprobs=top_logprobs[: len(tokens)] if top_logprobs else None,
        )


class _Sampler:
    """Chooses each row's next token with that row's own random numbers, and keeps log probabilities of the likeliest."""

    def __init__(self, sampling: Sampling, seeds: list[int], device: torch.device) -> None:
        self._sampling = sampling
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = [torch.rand(sampling.max_tokens, generator=each, dtype=torch.float64) for each in generators]
        self._steps = iter(torch.stack(drawn, dim=1).to(device))  # for each step (rows,)
        self.top_logprobs: list[list[dict[int, float]]] = [[] for _ in seeds]

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The next tokens (len(rows),) from `logits` (len(rows), vocabulary); raises `RuntimeError` where they are NaN."""
        dtype, logits = logits.dtype, logits.float()
        asked, temperature = self._sampling, self._sampling.temperature
        probabilities = torch.softmax(logits / temperature if temperature != 1 else logits, -1) if temperature else None
        chosen = logits.argmax(-1) if probabilities is None else self._sample(probabilities, rows)
        leading = logits.gather(-1, chosen[:, None])[:, 0] if probabilities is None else probabilities[:, 0]
        if leading.isnan().any():  # one NaN makes the whole row's probabilities NaN, and is its argmax
            raise RuntimeError(f"the model computes NaN in {dtype}: take another dtype, or see to its weights")
        if asked.logprobs:
            top = logits.topk(min(asked.logprobs, MAX_LOGPROBS, logits.size(-1)), -1)
            if probabilities is not None and temperature == 1:  # the likeliest token's is at hand, and never small
                total = top.values[:, :1] - probabilities.gather(-1, top.indices[:, :1]).log()
            else:
                total = logits.logsumexp(-1, keepdim=True)
            picked = (logits.gather(-1, chosen[:, None]) - total)[:, 0]
            values = (rows, chosen, picked, top.indices, top.values - total)
            for row, token, logprob, tokens, logprobs in zip(*(each.tolist() for each in values), strict=True):
                self.top_logprobs[row].append({token: logprob} | dict(zip(tokens, logprobs, strict=True)))
        return chosen

    def _sample(self, probabilities: Tensor, rows: Tensor) -> Tensor:
        if self._sampling.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            # A token stays while those before it have not reached top_p.
            ordered[ordered.cumsum(-1) - ordered >= self._sampling.top_p] = 0.0
            probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
        return draw(probabilities, next(self._steps)[rows])


def load_transformers(config: TransformersConfig, folder: Path) -> TransformersEngine:
    """The engine over a model folder; raises `ContractError` when the folder cannot be loaded."""
    if config.threads:
        torch.set_num_threads(config.threads)
    dtype = config.dtype if torch.cuda.is_available() else number_format(config.dtype, folder)
    return TransformersEngine(*load_causal_lm(folder, dtype), config.batch_size, config.max_model_len)


def _alike(sampling: Sampling) -> Sampling:
    """What requests of one batch have in common: all but which samples they ask for."""
    return replace(sampling, n=1, first=0)
