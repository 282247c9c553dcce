"""Decoding with a transformers module: what prompts begin with is read once, and finished sequences leave the batch.

What `generate` does instead: it reads a prompt for every one of its completions, and carries finished completions to the
end. Rows are padded on the left, as for `generate`, so that a model cannot tell the difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from data.contracts import ContractError
from teacher import grouped_attention
from teacher.prefix_groups import common_prefix
from teacher.shared_prefix import causal_lm

Choose = Callable[[Tensor, Tensor], Tensor]
"""From logits (rows, vocabulary), and which completion each row is, to the next tokens (rows,)."""

_ROOM = 32  # tokens by which the cache grows at a time
_BLOCK = 512  # outcomes, about the root of a vocabulary


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    ends: Collection[int],
    pad: int,
    choose: Choose,
) -> list[list[int]]:
    """One completion for each of `prompts`, of at most `limits` tokens (≥ 1), with its token of `ends` if it has one.

    What all prompts begin with is read once, and so are equal prompts. `choose` is also asked for rows whose completion has
    ended, until they are so many that removing them from the cache is worth its copy.

    Raises:
        ContractError: `model` keeps its state in another way than in a `Cache`, or a completion may become longer than
            `cache_limit`.
    """
    grouped_attention.install()
    most, longest = cache_limit(causal_lm(model).config), max(map(sum, zip(map(len, prompts), limits, strict=True)))
    if longest > most:
        raise ContractError(f"{longest} tokens, and beyond {most} this model's keys rotate otherwise; sample with vLLM")
    unique = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: i for i, prompt in enumerate(unique)}
    group = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=model.device)
    reader = _Reader(model, pad)
    logits = reader.read(unique)[group]
    reader.select(group)
    completions: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=model.device)  # the completion of each row
    ended = [False] * len(prompts)
    for length in range(1, max(limits) + 1):
        tokens = choose(logits, rows)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            if not ended[row]:
                completions[row].append(token)
                ended[row] = token in ends or length == limits[row]
        going = [i for i, row in enumerate(rows.tolist()) if not ended[row]]
        if not going:
            break
        # A row beyond its limit may be beyond the model's positions too.
        if len(going) <= 0.75 * len(rows) or length >= min(limits[row] for row in rows.tolist()):
            keep = torch.tensor(going, device=model.device)
            reader.select(keep)
            rows, tokens = rows[keep], tokens[keep]
        logits = reader.step(tokens)
    return completions


def cache_limit(config: Any) -> int:
    """How many tokens of a sequence a cache can hold that began with fewer; a million where nothing limits it.

    Beyond their original limit models with longrope (Phi-3, arXiv 2402.13753) rotate all keys otherwise, those too that
    were read before.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    own = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return int(own) if own and rope.get("rope_type") == "longrope" else 1_000_000


def sample_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    ends: Collection[int],
    temperature: float,
    pad: int,
) -> list[list[int]]:
    """One completion for each of `prompts`, sampled from torch's random state.

    A number is drawn for all completions at every step, so that those that have ended do not change the others.
    """

    def choose(logits: Tensor, rows: Tensor) -> Tensor:
        numbers = torch.rand(len(prompts), dtype=torch.float64, device=logits.device)
        return draw(torch.softmax(logits.float() / temperature, dim=-1), numbers[rows])

    return decode(model, prompts, [max_tokens] * len(prompts), ends=ends, pad=pad, choose=choose)


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """By inversion the outcomes (rows,) of distributions (rows, outcomes), not all 0, for `numbers` (rows,) in [0, 1).

    One number for a row, where noise for every outcome would be most of a large batch's time; and first a block of outcomes,
    then one of them, as the running sum over a whole vocabulary would be half of what is left.
    """
    outcomes = probabilities.size(-1)
    even = outcomes - outcomes % _BLOCK
    sums = [
        probabilities[:, :even].unflatten(-1, (even // _BLOCK, _BLOCK)).sum(-1),
        probabilities[:, even:].sum(-1, keepdim=True),
    ]
    block, rest = _inverted(torch.cat(sums, dim=-1).double(), numbers)
    places = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=block.device)
    inside = probabilities.gather(-1, places.clamp(max=outcomes - 1)).double() * (places < outcomes)
    # Where a model gives NaN there is nothing to draw, and the place must still be one of its vocabulary.
    return (block * _BLOCK + _inverted(inside, rest)[0]).clamp(max=outcomes - 1)


def _inverted(weights: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `weights` (rows, n) each number falls on, and where on it, in [0, 1]; never one of weight 0."""
    cumulative = weights.cumsum(-1)
    drawn = numbers[:, None] * cumulative[:, -1:]
    last = weights.size(-1) - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)  # if rounding leads behind it
    place = torch.searchsorted(cumulative, drawn, right=True).minimum(last)
    weight = weights.gather(-1, place)
    return place[:, 0], ((drawn - cumulative.gather(-1, place)) / weight + 1)[:, 0].clamp(0, 1)


class _Reader:
    """A model, its cache of keys and values (or other states), and the attention mask (rows, tokens) over it."""

    def __init__(self, model: Any, pad: int) -> None:
        self._model, self._pad = model, pad
        accepted = inspect.signature(causal_lm(model).forward).parameters
        self._cache_name = "past_key_values" if "past_key_values" in accepted else "cache_params"
        self._takes_positions = "position_ids" in accepted
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            # As a tensor, which copies what it picks. A slice would not, and on CPUs the head, multiplied with what is not
            # in one piece, is read once for every row (float32: 8 times the time), or copied (bfloat16: 500 times).
            self._options["logits_to_keep"] = torch.tensor([-1], device=model.device)
        self._cache: Any = None
        self._mask: Tensor

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The logits (prompts, vocabulary) after each prompt."""
        width, device = max(map(len, prompts)), self._model.device
        ids = torch.tensor([[self._pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        shared = min(common_prefix([list(prompt) for prompt in prompts]), min(map(len, prompts)) - 1)
        if len(prompts) > 1 and shared:
            self._mask = torch.ones(1, shared, dtype=torch.long, device=device)
            self._forward(torch.tensor([prompts[0][:shared]], device=device))
            if all(type(layer) is DynamicLayer for layer in self._layers()):
                # A row reads its last tokens, as many as the longest has beyond the prefix; what comes before them is a
                # beginning of the prefix, and ends where they begin.
                columns = torch.arange(shared, device=device) - (width - mask.sum(dim=1, keepdim=True))
                for layer in self._layers():
                    layer.keys, layer.values = (
                        states[0][:, columns.clamp(min=0)].transpose(0, 1) for states in (layer.keys, layer.values)
                    )
            else:  # it does not keep every token, so that a beginning of the prefix cannot be had from it
                self._cache, shared = None, 0
        else:
            shared = 0
        self._mask = mask
        logits = self._forward(ids[:, shared:])
        self._cache.layers = [
            _GrowingLayer(layer) if type(layer) is DynamicLayer else layer for layer in self._layers()
        ]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """The logits (rows, vocabulary) after one more token (rows,) of each row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(tokens[:, None])

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, of which one may be there several times."""
        self._cache.reorder_cache(rows)
        self._mask = self._mask[rows]

    def _layers(self) -> list[Any]:
        return self._cache.layers

    def _forward(self, ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": self._mask}
        if self._takes_positions:
            inputs["position_ids"] = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.size(1) :]
        if self._cache is not None:
            inputs[self._cache_name] = self._cache
            if self._cache_name == "cache_params":  # such a state has no padding in it
                del inputs["attention_mask"]
        output = self._model(**inputs, **self._options)
        self._cache = getattr(output, self._cache_name, None)
        if not isinstance(self._cache, Cache):
            kind = causal_lm(self._model).config.model_type
            raise ContractError(f"models of type {kind} keep no cache that can be continued here; sample with vLLM")
        return output.logits[:, -1]


class _GrowingLayer(DynamicLayer):
    """A layer's keys and values with room behind them, so that one token more does not copy all the others."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._rooms: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *unused: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer.update`; all of shape (rows, heads, tokens, size)."""
        used, total = self.keys.size(2), self.keys.size(2) + key_states.size(2)
        if not self._rooms or self._rooms[0].size(2) < total:
            self._rooms = [
                torch.cat([states, states.new_empty(*states.shape[:2], _ROOM, states.size(3))], dim=2)
                for states in (self.keys, self.values)
            ]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, used:total] = states
        self.keys, self.values = (room[:, :, :total] for room in self._rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows."""
        super().reorder_cache(beam_idx)
        self._rooms = []
