"""Running the cross-encoder over batches of pairs, packed where its architecture can be."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.contracts import first_line, out_of_memory
from student.dataset import Tokens
from student.first_token import FAMILIES, computing
from student.model import first_position, input_names
from student.packing import ROW_TOKENS, pack
from student.scorer import batches_by_length

logger = logging.getLogger(__name__)
Array = np.ndarray
_TOLERANCE = 1e-4


class Reader:
    """A classifier on its device.

    The longest pairs decide whether pairs are packed: the logits must be those of padded rows. A sliding window, for one,
    makes a difference only to long ones.
    """

    def __init__(self, model: PreTrainedModel, device: str) -> None:
        self.model, self.device, self.inputs = model, device, input_names(model)
        self.first_position = first_position(model)
        self.short = model.config.model_type in FAMILIES
        self.packs: bool | None = None
        self.tried = 0  # tokens of the longest pair that was tried

    def __call__(self, tokens: Tokens, pairs: Array, width: int = ROW_TOKENS) -> tuple[Tensor, Tensor]:
        """Logits (B, K) of these pairs, and the last hidden state of each one's first token (B, D)."""
        return self._packed(tokens, pairs, width) if self.can_pack(tokens) else self._padded(tokens, pairs)

    def can_pack(self, tokens: Tokens) -> bool:
        """Whether pairs are packed; tried with the longest of `tokens` unless as long ones were before."""
        longest = int(tokens.lengths.max())
        if self.packs is None or (self.packs and longest > self.tried):
            self.tried = longest
            self.packs = self._can_pack(tokens, np.argsort(-tokens.lengths, kind="stable")[:8])
        return self.packs

    def _can_pack(self, tokens: Tokens, pairs: Array) -> bool:
        training, reason = self.model.training, ""
        self.model.eval()
        try:
            # Without autocast, whose rounding is larger than the tolerance.
            with torch.inference_mode(), torch.autocast(self.device, enabled=False):
                difference = self._packed(tokens, pairs, 1000)[0] - self._padded(tokens, pairs)[0]
            if not float(difference.abs().max()) <= _TOLERANCE:
                reason = f"its logits move by {float(difference.abs().max()):.1e}"
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
            if out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
        self.model.train(training)
        if reason:
            kind = self.model.config.model_type
            logger.info("student: batches are padded, since a %s cannot read packed pairs (%s)", kind, reason)
        return not reason

    def _padded(self, tokens: Tokens, pairs: Array) -> tuple[Tensor, Tensor]:
        batch = tokens.batch(pairs)
        given = {name: torch.from_numpy(batch[name]).to(self.device) for name in self.inputs}
        vectors: list[Tensor] = []
        hook = self.model.base_model.register_forward_hook(
            lambda *call: vectors.append(call[2].last_hidden_state[:, 0])
        )
        try:
            return self.model(**given).logits, vectors[0]
        finally:
            hook.remove()

    def _packed(self, tokens: Tokens, pairs: Array, width: int) -> tuple[Tensor, Tensor]:
        packed = pack(tokens, pairs, width, self.first_position)
        at = {name: torch.from_numpy(array).to(self.device) for name, array in vars(packed).items()}
        apart = (at["pair"].unsqueeze(1) != at["pair"].unsqueeze(2)).unsqueeze(1)
        dtype = self.model.dtype
        mask = torch.zeros(apart.shape, dtype=dtype, device=self.device).masked_fill_(apart, torch.finfo(dtype).min)
        vectors: list[Tensor] = []

        def first_tokens(base: nn.Module, _: Any, output: Any) -> Any:
            """The encoder's output (R, W or P, D) as that of one row with one token for each pair."""
            place = at["slot"] if self.short else at["start"][at["row"], at["slot"]]
            output.last_hidden_state = output.last_hidden_state[at["row"], place].unsqueeze(1)
            vectors.append(output.last_hidden_state[:, 0])
            if isinstance(getattr(base, "pooler", None), nn.Linear):  # ALBERT
                output.pooler_output = base.pooler_activation(base.pooler(vectors[0]))
            elif getattr(base, "pooler", None) is not None:
                output.pooler_output = base.pooler(output.last_hidden_state)
            return output

        given = {name: at[name] for name in (*self.inputs, "position_ids") if name != "attention_mask"}
        hook = self.model.base_model.register_forward_hook(first_tokens)
        try:
            with computing(self.model, at["start"]) if self.short else nullcontext():
                return self.model(**given, attention_mask=mask).logits, vectors[0]
        finally:
            hook.remove()


def predict_logits(reader: Reader, tokens: Tokens, batch_size: int) -> Array:
    """Logits float64 (N, K), in the order of the rows."""
    model = reader.model
    training = model.training
    model.eval()
    logits = np.zeros((len(tokens.ids), model.config.num_labels))
    with torch.inference_mode():
        for rows in batches_by_length(tokens.lengths, batch_size):
            # Pairs of one length: a row of its own for each is narrowest.
            logits[rows] = reader(tokens, rows, width=1)[0].double().cpu().numpy()
    model.train(training)
    return logits
