"""Training in bfloat16 on a CPU: a copy of the model computes the gradients, and the model itself, in float32, learns.

All of the copy is in bfloat16, not only its products as under autocast: half of a small encoder's time goes into moving
numbers, and converting weights at each step costs what the faster products save. The updates of a usual learning rate are
smaller than what bfloat16 can tell apart, so they are added up in float32.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from student.dataset import Tokens
from student.reader import Reader

Array = np.ndarray
_HIDDEN = 256  # narrower encoders gain nothing


class HalfReader:
    """Reads with a copy in bfloat16 of the model of `reader`, and hands its gradients over to that model."""

    def __init__(self, reader: Reader) -> None:
        self.whole = reader
        model = copy.deepcopy(reader.model).to(torch.bfloat16)
        model.set_attn_implementation("eager")  # the fused one's backward pass is slow in bfloat16
        self.copy = Reader(model, reader.device)
        self.halves, self.wholes = list(model.parameters()), list(reader.model.parameters())

    def __call__(self, tokens: Tokens, pairs: Array) -> tuple[Tensor, Tensor]:
        """See `Reader`; with the model's weights as they were at the last `refresh`."""
        self.copy.packs, self.copy.tried = self.whole.can_pack(tokens), self.whole.tried
        return self.copy(tokens, pairs)

    def refresh(self) -> None:
        """Take the model's weights."""
        with torch.no_grad():
            torch._foreach_copy_(self.halves, self.wholes)

    def hand_over(self) -> None:
        """Give the model the gradients, which the copy then has no more."""
        for half, whole in zip(self.halves, self.wholes, strict=True):
            whole.grad = None if half.grad is None else half.grad.float()
            half.grad = None


def gains(reader: Reader) -> bool:
    """Whether training in bfloat16 is faster on this CPU: it needs AMX or AVX512-BF16, and matrices of some size."""
    units = torch.cpu.get_capabilities()
    wide = getattr(reader.model.config, "hidden_size", 0) >= _HIDDEN
    return wide and any(units.get(name) for name in ("amx_bf16", "avx512_bf16"))
