"""Sampling completions from the module that is being trained, with each prompt read once for its whole group.

What `generate` does besides: it reads a prompt once for every completion, and carries finished completions to the end. The
completions are the same for the same random state, since noise is drawn for all of them at every step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def sample_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    ends: Collection[int],
    temperature: float,
    pad: int,
) -> list[list[int]]:
    """One completion for each of `prompts`, equal ones being read once; each with its end token, if it has one.

    `model` is a causal language model whose cache of keys and values is a `DynamicCache`.
    """
    device = model.device
    unique = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: i for i, prompt in enumerate(unique)}
    width = max(map(len, unique))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in unique], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in unique], device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    only_last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **only_last)
    cache, logits = output.past_key_values, output.logits[:, -1]
    group = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
    cache.batch_select_indices(group)
    mask, logits = mask[group], logits[group]

    end_ids = torch.tensor(sorted(ends), device=device)
    completions: list[list[int]] = [[] for _ in prompts]
    live = torch.arange(len(prompts), device=device)  # the rows that have not ended
    for step in range(max_tokens):
        tokens = _sample(logits, temperature, live, len(prompts))
        for row, token in zip(live.tolist(), tokens.tolist(), strict=True):
            completions[row].append(token)
        going = torch.isin(tokens, end_ids, invert=True).nonzero()[:, 0]
        if step + 1 == max_tokens or not len(going):
            break
        if len(going) < len(live):
            cache.batch_select_indices(going)
            mask, live, tokens = mask[going], live[going], tokens[going]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        positions = mask.sum(dim=1, keepdim=True) - 1
        output = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    return completions


def _sample(logits: Tensor, temperature: float, live: Tensor, rows: int) -> Tensor:
    """(live,) tokens, drawn exactly from softmax(logits / temperature): the exponential form of the Gumbel-max trick."""
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    noise = torch.empty(rows, logits.size(-1), device=logits.device).exponential_()
    return (probabilities / noise[live]).argmax(dim=-1)
