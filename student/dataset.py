"""From the pairs and annotations tables to token rows, and from token rows to batches.

Which label a row may teach is decided here and nowhere else: split `train` gives human grades, split `pool` gives
annotations only (its withheld human grades are not even read), and splits `valid` and `test` are never learned from. What
people said of a pair later (`data.contracts.human_labels`) wins over both, in `train` and `pool`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from tokenizers import Tokenizer

from data.contracts import ANNOTATIONS, PAIRS, ContractError, GradeScale, annotation_key_of, read_table
from student.config import StudentConfig
from student.ratings import rating_targets
from student.scorer import ad_text, pad, query_text

Array = np.ndarray


@dataclass(frozen=True)
class Examples:
    """N pairs of one purpose, as columns of N rows; texts and ids are arrays of strings.

    `grade` is the human grade, −1 where there is none; `gold` (N, K) what it teaches, 0 where there is none (see
    `student.ratings`); `soft` (N, K) the teacher's distribution, 0 where there is none;
    `mix` the share of the human grade in the row's loss; `weight` the row's weight; `reasons` are the teacher's, empty
    where there is none or none is needed.
    """

    pair_ids: Array
    query_id: Array
    queries: Array
    ads: Array
    sources: Array
    reasons: Array
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
        return Examples(**{name: column[rows] for name, column in vars(self).items()})

    def joined(self, other: Examples) -> Examples:
        """These rows, then those of `other`."""
        return Examples(**{name: np.concatenate([column, getattr(other, name)]) for name, column in vars(self).items()})

    def gold_only(self) -> Examples:
        """The rows with a human grade, without what the teacher said of them."""
        rows = self.take(np.flatnonzero(self.grade >= 0))
        ones, no_reason = np.ones(len(rows)), np.full(len(rows), "", dtype=object)
        return replace(rows, soft=np.zeros_like(rows.soft), reasons=no_reason, mix=ones, weight=ones)

    def digest(self) -> str:
        """Fingerprint of all that training sees, whatever the order of the rows in the files."""
        hashed = hashlib.sha256()
        for i in np.argsort(self.pair_ids):
            numbers = [float(self.mix[i]), float(self.weight[i]), *map(float, self.gold[i]), *map(float, self.soft[i])]
            hashed.update(repr((self.pair_ids[i], int(self.grade[i]), numbers)).encode())
            hashed.update(self.reasons[i].encode("utf-8", "replace"))
        return hashed.hexdigest()[:16]


class Annotated(NamedTuple):
    """What an annotation teaches: grade probabilities (K,), agreement in [0, 1], the reason if it was asked for, and whether
    an earlier student gave it in the teacher's stead."""

    probs: list[float]
    agreement: float
    reasoning: str
    by_student: bool = False


@dataclass(frozen=True)
class Tokens:
    """Token rows of N pairs, unpadded."""

    ids: list[list[int]]
    type_ids: list[list[int]]
    pad_id: int

    @cached_property
    def lengths(self) -> Array:
        """Tokens of each row, (N,)."""
        return np.array([len(row) for row in self.ids], dtype=np.int64)

    def occurring(self) -> Array:
        """The token ids that occur in the rows or pad them, ascending."""
        return np.unique(np.fromiter(itertools.chain([self.pad_id], *self.ids), dtype=np.int64))

    def batch(self, rows: Sequence[int] | Array) -> dict[str, Array]:
        """Model inputs of these rows, each int64 (len(rows), longest row)."""
        ids = [self.ids[i] for i in rows]
        return {
            "input_ids": pad(ids, self.pad_id),
            "attention_mask": pad([[1] * len(row) for row in ids]),
            "token_type_ids": pad([self.type_ids[i] for i in rows]),
        }


def tokenize(tokenizer: Tokenizer, queries: Collection[str], ads: Collection[str], pad_id: int) -> Tokens:
    """Encode each query with its ad, once for the whole training."""
    encodings = tokenizer.encode_batch(list(zip(queries, ads, strict=True)))
    return Tokens([e.ids for e in encodings], [e.type_ids for e in encodings], pad_id)


def with_reasons(tokens: Tokens, tokenizer: Tokenizer, reasons: Collection[str], length: int) -> Tokens:
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
    grade = table.column("grade").to_numpy().astype(np.int64)
    if len(grade) and (grade.min() < 0 or grade.max() >= scale.size):
        raise ContractError(
            f"{pairs / 'pairs'}: split '{split}' has grade {grade.max()}, but scale.json has {scale.size} grades; "
            "prepare the data again"
        )
    rating = table.column("grade_raw").to_numpy() if ratings else np.full(len(grade), np.nan)
    return _examples(table, grade, rating_targets(grade, rating.astype(np.float64), scale.size))


def read_texts(pairs: Path, where: pads.Expression, grades: int) -> Examples:
    """Pairs for which `where` holds, without anything of their grades."""
    columns = [name for name in PAIRS.names if name not in ("grade", "grade_raw")]
    table = read_table(pairs / "pairs", PAIRS, columns=columns, where=where)
    return _examples(table, np.full(table.num_rows, -1), np.zeros((table.num_rows, grades)))


def sample_texts(pairs: Path, count: int, seed: int, grades: int) -> Examples:
    """`count` pairs of splits pool and train, drawn by the seed, by pair_id; nothing of their grades."""
    ids = read_table(pairs / "pairs", PAIRS, columns=["pair_id"], where=_in_training()).column("pair_id").to_pylist()
    ids = np.random.default_rng(seed).permutation(np.sort(np.array(ids, dtype=object)))[:count]
    rows = read_texts(pairs, pads.field("pair_id").isin(pa.array(ids, pa.string())), grades)
    return rows.take(np.argsort(rows.pair_ids))


def read_labelled(pairs: Path, labels: Mapping[str, list[int]], scale: GradeScale) -> Examples:
    """The pairs of `train` and `pool` that people graded later, by the share of them that gave each grade.

    Raises `ContractError` when a grade is not on the scale.
    """
    if any(not 0 <= grade < scale.size for grades in labels.values() for grade in grades):
        raise ContractError(
            f"the human labels have a grade that is not on the scale 0 … {scale.size - 1} of these pairs"
        )
    ids = pa.array(sorted(labels), pa.string())
    rows = read_texts(pairs, _in_training() & pads.field("pair_id").isin(ids), scale.size)
    counts = [np.bincount(labels[pair_id], minlength=scale.size) for pair_id in rows.pair_ids]
    gold = np.array(counts, dtype=np.float64).reshape(rows.gold.shape)
    gold /= gold.sum(axis=1, keepdims=True)
    return replace(rows, grade=gold.argmax(axis=1), gold=gold)


def read_training(
    pairs: Path,
    annotated: Mapping[str, Annotated],
    scale: GradeScale,
    config: StudentConfig,
    labels: Mapping[str, list[int]] = {},
) -> Examples:
    """What the student learns from: graded rows of `train`, and annotated rows of `train` and `pool`.

    `labels` are the grades that people gave later, by pair_id: such a row of either split teaches them alone.

    `annotated` (see `read_annotated`) may be empty (human grades alone); `train` may be empty or without grades
    (annotations alone). Raises `ContractError` when neither gives a row, or when the annotations are of another scale.
    """
    gold, labelled = read_examples(pairs, scale, "train", ratings=config.soft_gold), read_labelled(pairs, labels, scale)
    gold = gold.take(np.flatnonzero(~np.isin(gold.pair_ids, labelled.pair_ids)))
    _check_distributions(annotated, scale)
    taught = {pair_id: row for pair_id, row in annotated.items() if row.agreement >= config.min_agreement}
    human = {*gold.pair_ids, *labelled.pair_ids}  # those come with `gold` and teach both, or the human label alone
    ids = pa.array(sorted(set(taught) - human), pa.string())
    extra = read_texts(pairs, _in_training() & pads.field("pair_id").isin(ids), scale.size)

    gold.weight[:] = labelled.weight[:] = config.gold_weight
    for i, pair_id in enumerate(gold.pair_ids):
        if pair_id in taught:
            gold.soft[i], gold.reasons[i], gold.mix[i] = (
                taught[pair_id].probs,
                taught[pair_id].reasoning,
                config.gold_mix,
            )

    rows = [taught[pair_id] for pair_id in extra.pair_ids]
    extra = replace(
        extra,
        soft=np.array([row.probs for row in rows]).reshape(extra.soft.shape),
        reasons=np.array([row.reasoning for row in rows], dtype=object),
        mix=np.zeros(len(rows)),
        weight=np.array([row.agreement for row in rows]) ** config.agreement_power
        * np.where([row.by_student for row in rows], config.cascade_weight, 1.0),
    )
    training = gold.joined(labelled).joined(extra)
    if not training.weight.sum() > 0:
        raise ContractError(
            "the student has nothing to learn from: no graded rows in split 'train' and no usable annotations; "
            "add labelled rows, or run the annotate stage on split 'pool'"
        )
    return training


def random_batches(count: int, batch_size: int, rng: np.random.Generator) -> list[Array]:
    """Batches of row numbers in random order; what is left over makes a smaller one at the end."""
    order = rng.permutation(count)
    return [order[i : i + batch_size] for i in range(0, count, batch_size)]


def query_grouped(query_id: Array, batch_size: int, rng: np.random.Generator) -> list[Array]:
    """Batches of row numbers in which the rows of one query stand together, queries in random order."""
    queries, number = np.unique(query_id, return_inverse=True)
    order = rng.permutation(len(number))
    order = order[np.argsort(rng.permutation(len(queries))[number[order]], kind="stable")]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _in_training() -> pads.Expression:
    return pads.field("split").isin(["train", "pool"])


def _examples(table: pa.Table, grade: Array, gold: Array) -> Examples:
    """Rows of the `pairs` table that teach `gold` (N, K) wholly, each with weight 1."""
    column = {name: table.column(name).to_pylist() for name in table.column_names}
    ads = zip(column["ad_title"], column["ad_text"], column["attributes"], strict=True)
    ones = np.ones(table.num_rows)
    texts = {
        "pair_ids": column["pair_id"],
        "query_id": column["query_id"],
        "queries": [query_text(query) for query in column["query"]],
        "ads": [ad_text(*ad) for ad in ads],
        "sources": column["source"],
        "reasons": [""] * table.num_rows,
    }
    arrays = {name: np.array(values, dtype=object) for name, values in texts.items()}
    return Examples(**arrays, grade=grade, gold=gold, soft=np.zeros_like(gold), mix=ones, weight=ones.copy())


def read_annotated(
    annotations: Path | None, annotation_key: str, *, reasons: bool = False
) -> tuple[str, dict[str, Annotated]]:
    """The key learned from, and pair_id → annotation of its rows with status ok.

    An empty `annotation_key` means the key that the folder was last annotated under. Raises `ContractError` for a key
    without such rows.
    """
    if annotations is None or not annotations.exists():
        return "", {}
    key = annotation_key or annotation_key_of(annotations)
    columns = ["pair_id", "grade_probs", "agreement", "annotator", *(["reasoning"] if reasons else [])]
    usable = pads.field("status") == "ok"
    of_key = pads.field("annotation_key") == key
    rows = read_table(annotations, ANNOTATIONS, columns=columns, where=usable & of_key).to_pylist()
    if not rows:
        _refuse_unusable(annotations, key)
        return "", {}
    # Without a recorded agreement the probability of the likeliest grade stands in for it.
    return key, {
        row["pair_id"]: Annotated(
            probs,
            max(probs) if row["agreement"] is None else row["agreement"],
            row.get("reasoning") or "",
            row["annotator"] is not None,
        )
        for row in rows
        if (probs := row["grade_probs"])
    }


def _refuse_unusable(annotations: Path, key: str) -> None:
    """Raise `ContractError` unless the table has no row at all."""
    table = read_table(annotations, ANNOTATIONS, columns=["annotation_key", "status"])
    others = sorted(set(table.filter(pc.equal(table.column("status"), "ok")).column("annotation_key").to_pylist()))
    if others:
        raise ContractError(
            f"{annotations} has no usable annotations of key '{key}', only of: {', '.join(others)}; "
            "set student.annotation_key to one of them, or clear it to take the last"
        )
    if table.num_rows:
        raise ContractError(
            f"none of the annotations in {annotations} has status ok: the teacher answers in no form that can be read; "
            "give it a longer warm start (teacher.warm_start) or another base model (teacher.model)"
        )


def _check_distributions(annotated: Mapping[str, Annotated], scale: GradeScale) -> None:
    for pair_id, row in annotated.items():
        probs = row.probs
        if len(probs) != scale.size or not np.isfinite(probs).all() or min(probs) < 0 or abs(sum(probs) - 1) > 1e-3:
            raise ContractError(
                f"grade_probs of pair {pair_id} in the annotations is not a distribution over the {scale.size} grades of "
                "scale.json; annotate again with a teacher of this scale"
            )
