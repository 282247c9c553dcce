"""From the pairs and annotations tables to token rows, and from token rows to batches.

Which label a row may teach is decided here and nowhere else: split `train` gives human grades, split `pool` gives
annotations only (its withheld human grades are not even read), and splits `valid` and `test` are never learned from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from tokenizers import Tokenizer

from data.contracts import ANNOTATIONS, PAIRS, ContractError, GradeScale, read_table
from student.config import StudentConfig
from student.ratings import rating_targets
from student.scorer import ad_text, pad, query_text

Array = np.ndarray


@dataclass(frozen=True)
class Examples:
    """N pairs of one purpose. Every sequence and array has N rows.

    `grade` is the human grade, −1 where there is none; `gold` (N, K) what it teaches, 0 where there is none (see
    `student.ratings`); `soft` (N, K) the teacher's distribution, 0 where there is none;
    `mix` the share of the human grade in the row's loss; `weight` the row's weight; `query_id` numbers the normalised
    queries; `reasons` are the teacher's, empty where there is none or none is wanted.
    """

    pair_ids: list[str]
    queries: list[str]
    ads: list[str]
    sources: list[str]
    reasons: list[str]
    query_id: Array
    grade: Array
    gold: Array
    soft: Array
    mix: Array
    weight: Array

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def n_gold(self) -> int:
        """Rows that teach a human grade."""
        return int((self.grade >= 0).sum())

    @property
    def n_annotated(self) -> int:
        """Rows that teach an annotation."""
        return int((self.soft.sum(axis=1) > 0).sum())

    def take(self, rows: Array) -> Examples:
        """The examples at these row numbers, in this order."""
        return Examples(
            pair_ids=[self.pair_ids[i] for i in rows],
            queries=[self.queries[i] for i in rows],
            ads=[self.ads[i] for i in rows],
            sources=[self.sources[i] for i in rows],
            reasons=[self.reasons[i] for i in rows],
            query_id=self.query_id[rows],
            grade=self.grade[rows],
            gold=self.gold[rows],
            soft=self.soft[rows],
            mix=self.mix[rows],
            weight=self.weight[rows],
        )

    @classmethod
    def concatenate(cls, a: Examples, b: Examples) -> Examples:
        """The rows of `a`, then those of `b`, with their queries numbered together."""
        queries = a.queries + b.queries
        numbers: dict[str, int] = {}
        return cls(
            pair_ids=a.pair_ids + b.pair_ids,
            queries=queries,
            ads=a.ads + b.ads,
            sources=a.sources + b.sources,
            reasons=a.reasons + b.reasons,
            query_id=np.array([numbers.setdefault(normalised(q), len(numbers)) for q in queries], dtype=np.int64),
            grade=np.concatenate([a.grade, b.grade]),
            gold=np.concatenate([a.gold, b.gold]),
            soft=np.concatenate([a.soft, b.soft]),
            mix=np.concatenate([a.mix, b.mix]),
            weight=np.concatenate([a.weight, b.weight]),
        )

    def gold_only(self) -> Examples:
        """The rows with a human grade, without what the teacher said of them."""
        kept = self.take(np.flatnonzero(self.grade >= 0))
        ones = np.ones(len(kept))
        nothing = {"soft": np.zeros_like(kept.soft), "reasons": [""] * len(kept)}
        return Examples(**{**kept.__dict__, **nothing, "mix": ones, "weight": ones})

    def digest(self) -> str:
        """Fingerprint of all that training sees, whatever the order of the rows in the files."""
        hashed = hashlib.sha256()
        for i in sorted(range(len(self)), key=self.pair_ids.__getitem__):
            numbers = [float(self.mix[i]), float(self.weight[i]), *map(float, self.gold[i]), *map(float, self.soft[i])]
            hashed.update(repr((self.pair_ids[i], int(self.grade[i]), numbers)).encode())
            hashed.update(self.reasons[i].encode("utf-8", "replace"))
        return hashed.hexdigest()[:16]


@dataclass(frozen=True)
class Tokens:
    """Token rows of N pairs, unpadded."""

    ids: list[list[int]]
    type_ids: list[list[int]]
    pad_id: int

    @property
    def lengths(self) -> Array:
        """Tokens of each row, (N,)."""
        return np.array([len(row) for row in self.ids], dtype=np.int64)

    def batch(self, rows: Sequence[int] | Array) -> dict[str, Array]:
        """Model inputs of these rows, each int64 (len(rows), longest row)."""
        ids = [self.ids[i] for i in rows]
        return {
            "input_ids": pad(ids, self.pad_id),
            "attention_mask": pad([[1] * len(row) for row in ids]),
            "token_type_ids": pad([self.type_ids[i] for i in rows]),
        }


def tokenize(tokenizer: Tokenizer, queries: Sequence[str], ads: Sequence[str], pad_id: int) -> Tokens:
    """Encode each query with its ad, once for the whole training."""
    encodings = tokenizer.encode_batch(list(zip(queries, ads, strict=True)))
    return Tokens([e.ids for e in encodings], [e.type_ids for e in encodings], pad_id)


def with_reasons(tokens: Tokens, tokenizer: Tokenizer, reasons: Sequence[str], length: int) -> Tokens:
    """The rows with up to `length` tokens of their reason and an end token added to the second segment.

    A row without a reason stays as it is. `tokens` come from `tokenize`, so that query and ad are cut alike in both.
    """
    limit = tokenizer.truncation
    tokenizer.no_truncation()
    encodings = tokenizer.encode_batch([query_text(reason) for reason in reasons], add_special_tokens=False)
    if limit is not None:
        tokenizer.enable_truncation(**limit)
    ids, type_ids = [], []
    for row, types, reason in zip(tokens.ids, tokens.type_ids, encodings, strict=True):
        added = [*reason.ids[:length], row[-1]] if reason.ids else []  # every encoder's pair ends in its end token
        ids.append(row + added)
        type_ids.append(types + [types[-1]] * len(added))
    return Tokens(ids, type_ids, tokens.pad_id)


def read_examples(pairs: Path, scale: GradeScale, split: str, *, ratings: bool = False) -> Examples:
    """The rows of one split that have a human grade (mix 1, weight 1); not for `pool`, whose grades are withheld.

    With `ratings` a rating between two grades teaches both, see `rating_targets`; without, a row teaches its grade.
    Raises `ContractError` when a grade is not on the scale.
    """
    if split == "pool":
        raise ValueError("the human grades of split 'pool' are withheld from the student")
    table = read_table(pairs / "pairs", PAIRS, where=(pads.field("split") == split) & pads.field("grade").is_valid())
    n = table.num_rows
    grade = table.column("grade").to_numpy().astype(np.int64)
    if n and (grade.min() < 0 or grade.max() >= scale.size):
        raise ContractError(
            f"{pairs / 'pairs'}: split '{split}' has grade {grade.max()}, but scale.json has {scale.size} grades; "
            "prepare the data again"
        )
    rating = table.column("grade_raw").to_numpy() if ratings else np.full(n, np.nan)
    gold = rating_targets(grade, rating.astype(np.float64), scale.size)
    return _examples(table, grade, gold, np.zeros((n, scale.size)), np.ones(n), np.ones(n))


def read_training(pairs: Path, annotations: Path | None, scale: GradeScale, config: StudentConfig) -> Examples:
    """What the student learns from: graded rows of `train`, and annotated rows of `train` and `pool`.

    `annotations` may be None or empty (human grades alone); `train` may be empty or without grades (annotations alone).
    Raises `ContractError` when neither gives a row, or when the annotations are of another scale.
    """
    columns = [name for name in PAIRS.names if name not in ("grade", "grade_raw")]
    gold = read_examples(pairs, scale, "train", ratings=config.soft_gold)
    taught = _read_annotations(annotations, scale, config)
    in_training = pads.field("split").isin(["train", "pool"])
    annotated = read_table(
        pairs / "pairs",
        PAIRS,
        columns=columns,
        where=in_training & pads.field("pair_id").isin(pa.array(taught, pa.string())),
    )
    # A graded row with an annotation teaches both; it comes with `gold`, so it leaves `annotated`.
    annotated = annotated.filter(pc.invert(pc.is_in(annotated.column("pair_id"), pa.array(gold.pair_ids, pa.string()))))

    both = np.array([pair_id in taught for pair_id in gold.pair_ids], dtype=bool)
    for i in np.flatnonzero(both):
        gold.soft[i] = taught[gold.pair_ids[i]].probs
        gold.reasons[i] = taught[gold.pair_ids[i]].reasoning
    gold.mix[both] = config.gold_mix
    gold.weight[:] = config.gold_weight

    ids = annotated.column("pair_id").to_pylist()
    n = len(ids)
    soft = np.array([taught[i].probs for i in ids]).reshape(n, scale.size)
    weight = np.array([taught[i].agreement for i in ids]) ** config.agreement_power
    extra = _examples(annotated, np.full(n, -1), np.zeros_like(soft), soft, np.zeros(n), weight)
    extra.reasons[:] = [taught[i].reasoning for i in ids]
    joined = Examples.concatenate(gold, extra)
    if not len(joined) or not joined.weight.sum() > 0:
        raise ContractError(
            "the student has nothing to learn from: no graded rows in split 'train' and no usable annotations; "
            "add labelled rows, or run the annotate stage on split 'pool'"
        )
    return joined


def length_grouped(lengths: Array, batch_size: int, rng: np.random.Generator, chunk: int = 16) -> list[Array]:
    """Batches of row numbers in random order, each of rows of like length out of `chunk` batches drawn at random.

    The more are sorted together, the less is padding, and the less a batch is like the whole: length goes with the label.
    """
    order = rng.permutation(len(lengths))
    batches: list[Array] = []
    for start in range(0, len(order), batch_size * chunk):
        part = order[start : start + batch_size * chunk]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def query_grouped(query_id: Array, batch_size: int, rng: np.random.Generator) -> list[Array]:
    """Batches of row numbers in which the rows of one query stand together, queries in random order."""
    place = rng.permutation(int(query_id.max()) + 1)
    order = rng.permutation(len(query_id))
    order = order[np.argsort(place[query_id[order]], kind="stable")]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def normalised(query: str) -> str:
    """The query up to case and spacing: rows with the same one are resampled and ranked together."""
    return " ".join(query.casefold().split())


def _examples(table: pa.Table, grade: Array, gold: Array, soft: Array, mix: Array, weight: Array) -> Examples:
    raw_queries = table.column("query").to_pylist()
    numbers: dict[str, int] = {}
    query_id = np.array([numbers.setdefault(normalised(q), len(numbers)) for q in raw_queries], dtype=np.int64)
    ads = [ad_text(title, text, attributes) for title, text, attributes in _ad_columns(table)]
    return Examples(
        pair_ids=table.column("pair_id").to_pylist(),
        queries=[query_text(q) for q in raw_queries],
        ads=ads,
        sources=table.column("source").to_pylist(),
        reasons=[""] * len(ads),
        query_id=query_id,
        grade=grade.astype(np.int64),
        gold=gold,
        soft=soft,
        mix=mix,
        weight=weight,
    )


def _ad_columns(table: pa.Table) -> Iterator[tuple]:
    return zip(*(table.column(name).to_pylist() for name in ("ad_title", "ad_text", "attributes")), strict=True)


class Annotated(NamedTuple):
    """What an annotation teaches: grade probabilities (K,), agreement in [0, 1], and the reason if it was asked for."""

    probs: list[float]
    agreement: float
    reasoning: str


def read_annotated(
    annotations: Path | None, annotation_key: str = "", *, reasons: bool = False
) -> tuple[str, dict[str, Annotated]]:
    """The key learned from, and pair_id → annotation of its rows with status ok.

    With an empty `annotation_key` it is the key written last. Raises `ContractError` for a key that is not there.
    """
    if annotations is None or not annotations.exists():
        return "", {}
    columns = ["pair_id", "annotation_key", "grade_probs", "agreement", "created_at"]
    columns += ["reasoning"] if reasons else []
    table = read_table(annotations, ANNOTATIONS, columns=columns, where=pads.field("status") == "ok")
    keys = set(table.column("annotation_key").to_pylist())
    if annotation_key and annotation_key not in keys:
        if not keys:
            raise ContractError(
                f"none of the annotations in {annotations} has status ok: the teacher answers in no form that can be read; "
                "give it a longer warm start (teacher.warm_start) or another base model (teacher.model)"
            )
        raise ContractError(
            f"{annotations} has no usable annotations of key '{annotation_key}', only of: {', '.join(sorted(keys))}; "
            "clear student.annotation_key to take the newest"
        )
    if not table.num_rows:
        return "", {}
    table = table.sort_by([("created_at", "ascending"), ("annotation_key", "ascending"), ("pair_id", "ascending")])
    key = annotation_key or table.column("annotation_key")[-1].as_py()
    table = table.filter(pc.equal(table.column("annotation_key"), key))
    names = ("pair_id", "grade_probs", "agreement", *(("reasoning",) if reasons else ()))
    rows = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    # Without a recorded agreement the probability of the likeliest grade stands in for it.
    return key, {
        pair_id: Annotated(probs, max(probs) if agreement is None else agreement, reason[0] or "" if reason else "")
        for pair_id, probs, agreement, *reason in rows
        if probs
    }


def _read_annotations(annotations: Path | None, scale: GradeScale, config: StudentConfig) -> dict[str, Annotated]:
    _, rows = read_annotated(annotations, config.annotation_key, reasons=config.contrastive_weight > 0)
    for pair_id, row in rows.items():
        probs = row.probs
        if len(probs) != scale.size or not np.isfinite(probs).all() or min(probs) < 0 or abs(sum(probs) - 1) > 1e-3:
            raise ContractError(
                f"{annotations}: grade_probs of pair {pair_id} is not a distribution over the {scale.size} grades of "
                "scale.json; annotate again with a teacher of this scale"
            )
    return {pair_id: row for pair_id, row in rows.items() if row.agreement >= config.min_agreement}
