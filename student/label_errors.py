"""Human labels that are probably wrong: confident learning (Northcutt, Jiang and Chuang 2021, arXiv 1911.00068).

Whoever judges a label has not learned from it: the training labels are cut into folds, and each fold is graded by a
scorer that was fitted on the others. The teacher has a say only about pairs that it was not trained on, the pool's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from data.contracts import PAIRS, ContractError, MetricsLog, digest, read_table
from student.baselines import Bm25, overlap
from student.dataset import Annotated, Examples
from student.fit import fit
from student.scorer import softmax
from student.setup import Setup

Array = np.ndarray
Scorer = Callable[[Array, Array], Array]
"""Fitted on the labels of some row numbers (T,), gives the grade probabilities (H, K) of others (H,)."""

FILE = "suspects.parquet"
FOLDS = 5
SUSPECTS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("human_grade", pa.int32(), nullable=False),
        pa.field("likely_grade", pa.int32(), nullable=False),
        pa.field("teacher_grade", pa.int32()),
        pa.field("expected_loss", pa.float64(), nullable=False),
        pa.field("why", pa.string(), nullable=False),
        pa.field("reasoning", pa.string(), nullable=False),
    ]
)


def cross_fitted(count: int, scorer: Scorer, seed: int, folds: int = FOLDS) -> Array:
    """Grade probabilities (N, K) of `count` rows, each by a scorer that was fitted without its own label."""
    parts = np.array_split(np.random.default_rng(seed).permutation(count), folds)
    probs = [scorer(np.concatenate(parts[:i] + parts[i + 1 :]), part) for i, part in enumerate(parts)]
    return np.concatenate(probs)[np.argsort(np.concatenate(parts))]


def feature_scorer(setup: Setup, rows: Examples) -> Scorer:
    """Logistic regression on what costs no training: vectors of query and ad, their cosine, shared words, BM25.

    A row that a person gave several grades counts by the likeliest.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    query, ad = setup.encoder().sides(rows.queries, rows.ads)
    cosine = (query * ad).sum(axis=1)
    bm25 = Bm25(rows.ads.tolist()).scores(rows.queries, rows.ads, relative=True)
    lengths = [np.log1p([len(text.split()) for text in side]) for side in (rows.queries, rows.ads)]
    features = np.column_stack([query * ad, cosine, cosine**2, overlap(rows.queries, rows.ads), bm25, *lengths])

    def score(train: Array, held: Array) -> Array:
        probs = np.zeros((len(held), setup.scale.size))
        if len(known := np.unique(rows.grade[train])) == 1:
            probs[:, known] = 1.0
            return probs
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=100))
        model.fit(features[train], rows.grade[train])
        probs[:, model.classes_] = model.predict_proba(features[held])
        return probs

    return score


def off_diagonal(grade: Array, probs: Array) -> Array:
    """The grade (N,) that each label is confidently contradicted by; the label itself where it is not.

    A row counts for grade k when its probability reaches the mean that rows labelled k have of it, and for the likeliest of
    several (the confident joint). A grade that fewer rows than folds have has no such mean, and contradicts none.
    """
    size = probs.shape[1]
    thresholds = np.array([probs[grade == k, k].mean() if (grade == k).sum() >= FOLDS else np.inf for k in range(size)])
    passing = np.where(probs >= thresholds, probs, -1.0)
    return np.where(passing.max(axis=1) > 0, passing.argmax(axis=1), grade)


def expected_loss(grade: Array, probs: Array) -> Array:
    """How many grades (N,) a label is expected to be off, when the truth has these probabilities (N, K)."""
    return (probs * np.abs(np.arange(probs.shape[1]) - grade[:, None])).sum(axis=1)


def ranked(grade: Array, probs: Array) -> tuple[Array, Array]:
    """Row numbers of the labels that are confidently contradicted, the highest expected loss first, and by which grade."""
    likely = off_diagonal(grade, probs)
    rows = np.flatnonzero(likely != grade)
    rows = rows[np.argsort(-expected_loss(grade[rows], probs[rows]), kind="stable")]
    return rows, likely[rows]


def find(
    setup: Setup, pool: frozenset[str], human: Examples, annotations: Mapping[str, Annotated], scorer: Scorer, out: Path
) -> Array:
    """Write the suspects among N human labels to `out/suspects.parquet`, the most suspect first; returns their row numbers.

    Parameters: pool, ids of pairs that the teacher was not trained on: there its `annotations` count as much as the scorer,
    which is fitted on row numbers of `human`.
    """
    probs = cross_fitted(len(human), scorer, setup.config.seed)
    by_teacher = {pair: row for pair, row in annotations.items() if pair in pool and not row.by_student}
    heard = {i: by_teacher[pair] for i, pair in enumerate(human.pair_ids) if pair in by_teacher}
    for i, annotation in heard.items():
        probs[i] = (probs[i] + annotation.probs) / 2
    rows, likely = ranked(human.grade, probs)
    loss, share = expected_loss(human.grade, probs), overlap(human.queries[rows], human.ads[rows])
    names = [grade.name for grade in setup.scale.grades]
    table = []
    for i, grade, words in zip(rows.tolist(), likely.tolist(), share, strict=True):
        label, teacher = int(human.grade[i]), heard.get(i)
        why = f"label {names[label]} ({probs[i, label]:.0%}), likely {names[grade]} ({probs[i, grade]:.0%}) by the student"
        why += " and the teacher" if teacher else ""
        row = {
            "pair_id": human.pair_ids[i],
            "human_grade": label,
            "likely_grade": grade,
            "expected_loss": float(loss[i]),
        }
        row |= {"why": f"{why}; {words:.0%} of the query's words are in the ad", "reasoning": ""}
        if teacher:
            row |= {"teacher_grade": int(np.argmax(teacher.probs)), "reasoning": teacher.reasoning}
        table.append(row)
    pq.write_table(pa.Table.from_pylist(table, schema=SUSPECTS), out / FILE)
    return rows


def without_suspects(
    setup: Setup,
    pairs: Path,
    training: Examples,
    valid: Examples,
    annotations: Mapping[str, Annotated],
    out: Path,
    metrics: MetricsLog,
) -> Array:
    """The numbers of the training rows without a share `drop_suspects` of the human labels, the most suspect; writes them.

    All rows, and nothing is written, where the settings ask for no suspects. Raises `ContractError` where there are fewer
    human labels than folds.
    """
    if setup.config.suspects == "off":
        return np.arange(len(training))
    at = np.flatnonzero(training.grade >= 0)
    if len(at) < FOLDS:
        raise ContractError(
            f"student.suspects = '{setup.config.suspects}' judges human labels by each other, and there are {len(at)}: it "
            f"needs {FOLDS} at least; set it to 'off', or label more pairs"
        )
    human = training.take(at).gold_only()
    where = pads.field("pair_id").isin(pa.array(human.pair_ids, pa.string())) & (pads.field("split") == "pool")
    pool = read_table(pairs / "pairs", PAIRS, columns=["pair_id"], where=where)["pair_id"].to_pylist()

    def student(train: Array, held: Array) -> Array:
        phase = f"without_{digest(held.tolist())}"
        folder = out / "checkpoints" / phase
        fitted = fit(setup, human.take(train), valid, folder=folder, metrics=metrics, phase=phase)
        return softmax(setup.logits(fitted.reader, human.take(held)))

    scorer = student if setup.config.suspects == "student" else feature_scorer(setup, human)
    suspects = find(setup, frozenset(pool), human, annotations, scorer, out)
    dropped = at[suspects[: round(setup.config.drop_suspects * len(human))]]
    return np.delete(np.arange(len(training)), dropped)
