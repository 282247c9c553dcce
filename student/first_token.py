"""Leave out of the last layer what nobody reads: a classifier looks at the first token only.

The other tokens' queries, attention, and feed-forward in the last layer go nowhere, and are a seventh of all the work of a
six-layer encoder. Only for the export: the trained model stays as transformers made it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Encoders whose layers are built as BERT's and whose classifier reads the first token.
FAMILIES = frozenset({"bert", "camembert", "electra", "ernie", "roberta", "xlm-roberta"})


def first_token_only(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with plain attention, whose last layer computes the first token; of an unknown family, all tokens."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    if model.config.model_type in FAMILIES:
        last = model.base_model.encoder.layer[-1]
        last.attention = _FirstTokenAttention(last.attention)
    return model


class _FirstTokenAttention(nn.Module):
    """Attention of the first token to all tokens, with the weights of `attention`."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner, self.output = attention.self, attention.output

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **unused: object
    ) -> tuple[Tensor, None]:
        """Vectors (B, 1, D) from hidden states (B, S, D); the mask (B, 1, S or 1, S) is added to the scores."""
        first, size = hidden_states[:, :1], self.inner.attention_head_size

        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], -1, size).transpose(1, 2)

        query, key, value = self.inner.query(first), self.inner.key(hidden_states), self.inner.value(hidden_states)
        scores = heads(query) @ heads(key).transpose(2, 3) * size**-0.5
        if attention_mask is not None:
            scores = scores + attention_mask[:, :, :1]
        context = (torch.softmax(scores, dim=-1) @ heads(value)).transpose(1, 2).reshape(first.shape)
        return self.output(context, first), None
