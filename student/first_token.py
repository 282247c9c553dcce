"""Leave out of the last layer what nobody reads: a classifier looks at the first token of each pair only.

The other tokens' queries, attention, and feed-forward in the last layer go nowhere, and are a seventh of all the work of a
six-layer encoder. The weights, and their names, stay as transformers made them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Encoders whose layers are built as BERT's and whose classifier reads the first token.
FAMILIES = frozenset({"bert", "camembert", "electra", "ernie", "roberta", "xlm-roberta"})


def first_token_only(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with plain attention, whose last layer computes each row's first token; of an unknown family, all tokens."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    if model.config.model_type in FAMILIES:
        attention = model.base_model.encoder.layer[-1].attention
        attention.forward = partial(attend_from, attention, None)
    return model


@contextmanager
def computing(model: PreTrainedModel, tokens: Tensor) -> Iterator[None]:
    """Inside, the last layer of `model`, which is of `FAMILIES`, computes these tokens (R, P) of each row only."""
    attention = model.base_model.encoder.layer[-1].attention
    attention.forward = partial(attend_from, attention, tokens)
    try:
        yield
    finally:
        del attention.forward


def attend_from(
    attention: nn.Module,
    tokens: Tensor | None,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Vectors (R, P, D) of some tokens, from hidden states (R, W, D), with the weights of `attention`.

    Parameters: tokens (R, P), None means the first; attention_mask (R, 1, W or 1, W) is added to the scores.
    """
    inner, size = attention.self, attention.self.attention_head_size
    if tokens is None:
        readers, mask = hidden_states[:, :1], None if attention_mask is None else attention_mask[:, :, :1]
    else:
        row = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
        readers = hidden_states[row, tokens]
        mask = None if attention_mask is None else attention_mask[row, 0, tokens].unsqueeze(1)

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, size).transpose(1, 2)

    query, key, value = inner.query(readers), inner.key(hidden_states), inner.value(hidden_states)
    scores = heads(query) @ heads(key).transpose(2, 3) * size**-0.5
    if mask is not None:
        scores = scores + mask
    shares = inner.dropout(torch.softmax(scores, dim=-1))
    context = (shares @ heads(value)).transpose(1, 2).reshape(readers.shape)
    return attention.output(context, readers), None
