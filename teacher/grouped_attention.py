"""Attention of one new token where several heads share keys and values (grouped queries, arXiv 2305.13245).

transformers copies keys and values once for every head that shares them before it calls torch, if there is a mask. While
decoding that is most of the memory that a step moves: six times what is in the cache with Qwen2.5's 1.5B. Here the heads of
a group are the queries of one head, which is the same sum without a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def install() -> None:
    """Let transformers use it in this process, unless something else stands in the place of its own sdpa attention."""
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, of `query` (rows, heads, tokens, size) and a mask (rows, 1, tokens, keys).

    `key` and `value` are (rows, heads / group, keys, size); returns (rows, tokens, heads, size) and no weights.
    """
    group = getattr(module, "num_key_value_groups", 1)
    of_heads = attention_mask is not None and attention_mask.size(1) != 1
    if group == 1 or query.size(2) != 1 or dropout or of_heads or more.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    grouped = query.view(query.size(0), key.size(1), group, query.size(3))
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(query.size(0), 1, query.size(1), value.size(3)), None
