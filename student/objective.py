"""What the student learns by: the loss of a batch, put together from `student.losses` as the settings say."""

from __future__ import annotations

import numpy as np
import torch

from data.contracts import ContractError
from student.config import StudentConfig
from student.dataset import Examples, Tokens, with_reasons
from student.half import HalfReader, gains
from student.losses import (
    blended_target,
    class_weights,
    lambda_loss,
    listnet,
    margin_mse,
    mixed_cross_entropy,
    reasoning_contrast,
    squared_emd,
)
from student.model import longest_text
from student.reader import Reader
from student.setup import Setup

Array = np.ndarray


def objective_name(config: StudentConfig) -> str:
    """The objective in words, for the model card."""
    parts = {
        "margin-MSE": config.margin_weight,
        "ListNet": config.listnet_weight,
        "LambdaLoss": config.lambda_weight,
        "squared EMD": config.ordinal_weight,
        "reasoning contrast": config.contrastive_weight,
    }
    return " + ".join(["soft cross-entropy", *(f"{weight:g} × {name}" for name, weight in parts.items() if weight)])


class Objective:
    """The loss of a batch of row numbers; holds the labels of all rows on the device, see `Examples`."""

    def __init__(self, setup: Setup, reader: Reader, rows: Examples) -> None:
        """Raises `ContractError` when reasons are to be read and the encoder has too few positions for them."""
        self.config, self.reader, self.device = setup.config, reader, setup.device
        self.tokens = setup.tokens(reader.model, rows)
        self.query_number = torch.from_numpy(np.unique(rows.query_id, return_inverse=True)[1]).to(self.device)
        self.gold, self.soft, self.mix, self.weight = (
            torch.from_numpy(a).float().to(self.device) for a in (rows.gold, rows.soft, rows.mix, rows.weight)
        )
        self.target = blended_target(self.gold, self.soft, self.mix)
        self.class_weight = class_weights(self.target, self.weight, self.config.class_balance)
        self.bf16 = half_precision(self.config, reader)
        self._half: HalfReader | None = None
        self.reasoned: Tokens | None = None
        self.has_reason = rows.reasons != ""
        if self.config.contrastive_weight > 0 and any(rows.reasons):
            self.reasoned = with_reasons(self.tokens, setup.tokenizer, rows.reasons, self.config.reason_length)
            positions, longest = longest_text(reader.model), self.reasoned.lengths.max()
            if positions is not None and longest > positions:
                raise ContractError(
                    f"query, ad and reason have up to {longest} tokens, but the encoder has {positions} positions; "
                    "lower student.reason_length or student.max_length"
                )

    def token_ids(self) -> Array:
        """The token ids that occur in the rows, ascending."""
        own = self.tokens.occurring()
        return own if self.reasoned is None else np.union1d(own, self.reasoned.occurring())

    def backward(self, batch: Array) -> torch.Tensor:
        """The loss, a scalar, whose gradient the model gets in place of the one it had."""
        if not self.bf16 or self.device == "cuda":
            self.reader.model.zero_grad()
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16):
                loss = self._of(batch, self.reader)
            loss.backward()
        else:
            self._half = self._half or HalfReader(self.reader)
            self._half.refresh()
            loss = self._of(batch, self._half)
            loss.backward()
            self._half.hand_over()
        return loss.detach()

    def _of(self, batch: Array, read: Reader | HalfReader) -> torch.Tensor:
        logits, vectors = read(self.tokens, batch)
        loss = self._loss(logits, batch)
        at = np.flatnonzero(self.has_reason[batch])
        if self.reasoned is None or not len(at):
            return loss
        with_reason = batch[at]
        logits, reasoned = read(self.reasoned, with_reason)
        contrast = reasoning_contrast(
            vectors[torch.from_numpy(at).to(self.device)].float(),
            reasoned.float(),
            self.weight[torch.from_numpy(with_reason).to(self.device)],
            self.config.contrastive_temperature,
        )
        # The reasoned view learns the labels too: it has to be the better of the two to be worth following.
        return loss + self.config.contrastive_weight * (contrast + self._loss(logits, with_reason))

    def _loss(self, logits: torch.Tensor, batch: Array) -> torch.Tensor:
        rows = torch.from_numpy(batch).to(self.device)
        logits, target, weight = logits.float(), self.target[rows], self.weight[rows]
        loss = mixed_cross_entropy(
            logits,
            self.gold[rows],
            self.soft[rows],
            self.mix[rows],
            weight,
            temperature=self.config.distill_temperature,
            class_weight=self.class_weight,
        )
        ranking = (margin_mse, self.config.margin_weight), (listnet, self.config.listnet_weight)
        for of_queries, share in (*ranking, (lambda_loss, self.config.lambda_weight)):
            if share > 0:
                loss = loss + share * of_queries(logits, target, self.query_number[rows], weight)
        if self.config.ordinal_weight > 0:
            loss = loss + self.config.ordinal_weight * squared_emd(logits, target, weight)
        return loss


def half_precision(config: StudentConfig, reader: Reader) -> bool:
    """Whether the gradients are computed in bf16; by default where that is faster."""
    if config.precision != "auto":
        return config.precision == "bf16"
    return torch.cuda.is_bf16_supported() if reader.device == "cuda" else gains(reader)
