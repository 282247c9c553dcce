"""What all trainings of one student share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from data.contracts import GradeScale
from student.baselines import Encoder
from student.config import StudentConfig
from student.dataset import Examples, Tokens, tokenize
from student.model import load_classifier, pad_token_id
from student.reader import Reader, predict_logits

Array = np.ndarray


@dataclass(frozen=True)
class Setup:
    """Settings, encoder (`base` is its folder), tokenizer, scale and device, and what follows from them.

    `scored_by` is the folder of the encoder that scores the pairs of the warm-up; None means the one in `base`.
    """

    config: StudentConfig
    base: Path
    tokenizer: Tokenizer
    scale: GradeScale
    device: str
    scored_by: Path | None = None

    def encoder(self) -> Encoder:
        """The encoder that the student starts from, by itself."""
        return Encoder(self.base, self.tokenizer, self.config.eval_batch_size, self.device)

    def reader(self) -> Reader:
        """The untrained student, on the device."""
        config = self.config
        model = load_classifier(self.base, self.scale, max_length=config.max_length, seed=config.seed)
        return Reader(model.to(self.device), self.device)

    def for_as_many_steps(self, rows: int, chosen: int) -> Setup:
        """The setup under which `chosen` rows get as many optimiser steps, and as much patience, as `rows` do here; in 100
        passes at most.

        A student of few human labels would else be stopped before it has learned them, and lose for that alone.
        """
        times = max(1, round(rows / max(chosen, 1)))
        more = {name: min(100, times * getattr(self.config, name)) for name in ("epochs", "patience")}
        return replace(self, config=self.config.model_copy(update=more)) if times > 1 else self

    def tokens(self, model: PreTrainedModel, rows: Examples) -> Tokens:
        """What `model` reads of these pairs."""
        return tokenize(self.tokenizer, rows.queries, rows.ads, pad_token_id(model.config))

    def logits(self, reader: Reader, rows: Examples) -> Array:
        """Logits float64 (N, K) of these pairs."""
        return predict_logits(reader, self.tokens(reader.model, rows), self.config.eval_batch_size)

    def relevant(self, rows: Examples) -> Array:
        """Whether each pair's human grade counts as relevant, bool (N,)."""
        return rows.grade >= self.scale.relevant_from

    def p_relevant(self, probs: Array) -> Array:
        """Probability (N,) of a grade that counts as relevant, from those of all grades (N, K)."""
        return probs[:, self.scale.relevant_from :].sum(axis=1)
