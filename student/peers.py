"""What a student is compared with: what costs no label, BM25, and the teacher itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data.contracts import PAIRS, read_table
from student.baselines import Bm25
from student.calibration import best_f1_threshold
from student.dataset import Annotated, Examples
from student.evaluation import System
from student.metrics import roc_auc
from student.scorer import ad_text, softmax
from student.setup import Setup

Array = np.ndarray


def ranker(setup: Setup, name: str, score: Callable[[Examples], Array], valid: Examples, test: Examples) -> System:
    """A system that has seen no label and gives a score (N,) only; its threshold comes from valid."""
    on_valid, relevant = score(valid), setup.relevant(valid)
    threshold = best_f1_threshold(relevant, on_valid)
    return System(name, score(test), threshold, valid_roc_auc=roc_auc(relevant, on_valid))


def cosine(setup: Setup, valid: Examples, test: Examples) -> System:
    """The cosine of query and ad under the encoder in `setup.base`, which nothing was taught."""
    encoder = setup.encoder()
    return ranker(setup, "untrained_cosine", lambda rows: encoder.cosine(rows.queries, rows.ads), valid, test)


def warmed_up(setup: Setup, valid: Examples, test: Examples) -> System:
    """The classifier in `setup.base` as its warm-up left it."""
    reader = setup.reader()
    reader.model.eval()
    return ranker(setup, "warm_up", lambda rows: setup.p_relevant(softmax(setup.logits(reader, rows))), valid, test)


def without_labels(untrained: Setup, setup: Setup, valid: Examples, test: Examples) -> list[System]:
    """What the student must be above: the encoder's cosine and, where there was one, the warm-up."""
    free = [cosine(untrained, valid, test)]
    return [*free, warmed_up(setup, valid, test)] if setup.config.warm_up.pairs else free


def peers(
    setup: Setup, pairs: Path, annotations: dict[str, Annotated], valid: Examples, test: Examples
) -> list[System]:
    """BM25 and, where it has annotated test pairs, the teacher."""
    return [*bm25(setup, pairs, valid, test), *teacher_on_test(setup, annotations, valid, test)]


def bm25(setup: Setup, pairs: Path, valid: Examples, test: Examples) -> list[System]:
    """BM25 over the ads of all splits, and BM25 as a share of the query's limit."""
    columns = ["ad_title", "ad_text", "attributes"]
    table = read_table(pairs / "pairs", PAIRS, columns=columns).to_pylist()
    index = Bm25([ad_text(row["ad_title"], row["ad_text"], row["attributes"]) for row in table])

    def scores(relative: bool, rows: Examples) -> Array:
        return index.scores(rows.queries, rows.ads, relative=relative)

    shares = {"bm25": False, "bm25_relative": True}
    return [ranker(setup, name, partial(scores, share), valid, test) for name, share in shares.items()]


def annotated(annotations: dict[str, Annotated], examples: Examples, grades: int) -> tuple[Array, Array]:
    """Which rows (M,) of the examples have an annotation, and its probabilities (M, K)."""
    at = np.flatnonzero([pair_id in annotations for pair_id in examples.pair_ids])
    return at, np.array([annotations[pair_id].probs for pair_id in examples.pair_ids[at]]).reshape(-1, grades)


def with_soft(examples: Examples, annotations: dict[str, Annotated]) -> Examples:
    """The examples with the soft labels of those that have an annotation."""
    soft = examples.soft.copy()
    at, soft_at = annotated(annotations, examples, soft.shape[1])
    soft[at] = soft_at
    return replace(examples, soft=soft)


def teacher_on_test(setup: Setup, annotations: dict[str, Annotated], valid: Examples, test: Examples) -> list[System]:
    """The teacher's own grades of the test rows that it has annotated; its threshold is from those of valid, or 0.5."""

    at, probs = annotated(annotations, test, setup.scale.size)
    if not len(at):
        return []
    on_valid, valid_probs = annotated(annotations, valid, setup.scale.size)
    relevant, score = setup.relevant(valid)[on_valid], setup.p_relevant(valid_probs)
    return [System("teacher", setup.p_relevant(probs), best_f1_threshold(relevant, score), probs, at)]
