"""What a student must beat: BM25 over words, and the cosine of the encoder it started from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from data.contracts import words
from student.dataset import Tokens
from student.model import check_batches, pad_token_id, quiet_transformers
from student.scorer import batches_by_length

Array = np.ndarray


class Bm25:
    """BM25 (Robertson and Zaragoza 2009) with idf ln(1 + (N − n + ½)/(n + ½)) and mean length from the distinct ads."""

    def __init__(self, ads: Sequence[str], k1: float = 1.2, b: float = 0.75) -> None:
        self.k1, self.b = k1, b
        distinct = set(ads)
        document_count: Counter[str] = Counter()
        total = 0
        for ad in distinct:
            terms = words(ad)
            total += len(terms)
            document_count.update(set(terms))
        self.mean_length = total / max(len(distinct), 1)
        self.idf = {w: math.log(1 + (len(distinct) - n + 0.5) / (n + 0.5)) for w, n in document_count.items()}
        self.unseen_idf = math.log(1 + (len(distinct) + 0.5) / 0.5)

    def score(self, query: str, ad: str) -> float:
        """BM25 of an ad for a query; 0 without a common word."""
        terms = words(ad)
        frequency = Counter(terms)
        # An ad without a word has length 0, as has a corpus of such ads.
        norm = self.k1 * (1 - self.b + self.b * len(terms) / max(self.mean_length, 1e-9))
        return sum(
            self.idf.get(w, self.unseen_idf) * frequency[w] * (self.k1 + 1) / (frequency[w] + norm)
            for w in words(query)
            if frequency[w]
        )

    def best(self, query: str) -> float:
        """The score's limit for this query, at which every word of it is endlessly repeated."""
        return sum(self.idf.get(w, self.unseen_idf) * (self.k1 + 1) for w in words(query))

    def scores(self, queries: Collection[str], ads: Collection[str], *, relative: bool = False) -> Array:
        """Scores (N,) of N pairs. `relative` divides by the query's limit, so that long and short queries compare."""
        raw = np.array([self.score(q, a) for q, a in zip(queries, ads, strict=True)])
        if not relative:
            return raw
        return raw / np.maximum([self.best(q) for q in queries], 1e-9)


def overlap(queries: Collection[str], ads: Collection[str]) -> Array:
    """Share (N,) of each query's distinct words that its ad contains."""
    shares = []
    for query, ad in zip(queries, ads, strict=True):
        asked = set(words(query))
        shares.append(len(asked & set(words(ad))) / len(asked) if asked else 0.0)
    return np.array(shares)


@dataclass(frozen=True)
class Encoder:
    """The encoder in folder `base` as it was given, which makes a vector of each text by itself."""

    base: Path
    tokenizer: Tokenizer
    batch_size: int
    device: str

    def cosine(self, queries: Collection[str], ads: Collection[str]) -> Array:
        """Cosine (N,) of the vectors of query and ad."""
        left, right = self.sides(queries, ads)
        return (left * right).sum(axis=1).astype(np.float64)

    def sides(self, queries: Collection[str], ads: Collection[str]) -> tuple[Array, Array]:
        """Vectors float32 (N, D) of the queries, and those of the ads; equal texts are encoded once."""
        texts = list(dict.fromkeys([*queries, *ads]))
        vectors, place = self.vectors(texts), {text: i for i, text in enumerate(texts)}
        return vectors[[place[text] for text in queries]], vectors[[place[text] for text in ads]]

    def vectors(self, texts: list[str]) -> Array:
        """Mean-pooled token vectors float32 (N, D) of length 1."""
        from transformers import AutoModel

        with quiet_transformers():
            model = AutoModel.from_pretrained(self.base, dtype=torch.float32, use_safetensors=True)
        if self.tokenizer.truncation:
            check_batches(model.eval(), self.base, self.tokenizer.truncation["max_length"])
        model = model.to(self.device).eval()
        encodings = self.tokenizer.encode_batch(texts)
        tokens = Tokens([e.ids for e in encodings], [e.type_ids for e in encodings], pad_token_id(model.config))
        vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
        with torch.inference_mode():
            for rows in batches_by_length(tokens.lengths, self.batch_size):
                batch = tokens.batch(rows)
                mask = torch.from_numpy(batch["attention_mask"]).to(self.device)
                ids = torch.from_numpy(batch["input_ids"]).to(self.device)
                hidden = model(ids, attention_mask=mask).last_hidden_state
                mean = (hidden * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
                vectors[rows] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return vectors
