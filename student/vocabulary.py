"""Training the vectors of the tokens that occur, and no others.

A word that is in no pair has a gradient of zero, and yet an optimiser step reads and writes its vector, its gradient and
Adam's two moments. They are half of a MiniLM's weights, and nine tenths of a small multilingual encoder's. So while an
encoder is trained its embedding holds the tokens that occur only. These change as they would have; the others keep their
vectors, which weight decay would have shrunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Array = np.ndarray


class _Occurring(nn.Module):
    """The rows `ids` (N,), ascending, of an embedding, by the token ids of the whole vocabulary."""

    def __init__(self, whole: nn.Embedding, ids: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole.weight.detach()[ids])
        place = torch.full((whole.num_embeddings,), -1, device=ids.device)
        place[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("place", place, persistent=False)
        padding = whole.padding_idx
        self.padding_idx = None if padding is None or place[padding] < 0 else int(place[padding])

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors of token ids, which must be among those that occur."""
        return nn.functional.embedding(self.place[ids], self.weight, self.padding_idx)


@contextmanager
def occurring_tokens(model: PreTrainedModel, ids: Array) -> Iterator[None]:
    """Inside, `model` reads the token ids `ids` (N,) only, and has no other rows in its input embedding if that is plain.

    Afterwards the embedding is whole again, with the trained rows in their places; so it is after an error.
    """
    whole = model.get_input_embeddings()
    if type(whole) is not nn.Embedding:  # a subclass may do more than look up, as Gemma's, which scales
        yield
        return
    kept = torch.from_numpy(np.unique(ids)).to(whole.weight.device)
    part = _Occurring(whole, kept)
    model.set_input_embeddings(part)
    try:
        yield
    finally:
        with torch.no_grad():
            whole.weight[kept] = part.weight
        model.set_input_embeddings(whole)
