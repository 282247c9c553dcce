"""Which pairs a budget of annotations goes to: a table with the reason for each, made once for what it depends on."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from data.contracts import (
    FREQUENCIES,
    SCORES,
    SELECTION,
    ContractError,
    digest,
    digest_files,
    read_annotations,
    read_table,
    whole_file,
)
from pipeline.annotation.cascade import Scores
from pipeline.annotation.config import SelectConfig

if TYPE_CHECKING:
    from student.selection import Selection

log = logging.getLogger(__name__)
Array = np.ndarray
BEFORE = "annotated before"
CANDIDATES = 200_000  # pairs, any, that `diverse` chooses among: it has their vectors in memory
_MAX_LENGTH = 96  # tokens of a text that `diverse` reads


@dataclass(frozen=True)
class Sources:
    """What strategies go by: the folder of pairs, what an exported student says of them, and an encoder's folder."""

    pairs: Path
    scores: Scores | None = None
    encoder: Path | None = None


def select(
    config: SelectConfig,
    seed: int,
    candidates: pa.Table,
    out: Path,
    key: str,
    measured: Sequence[str],
    sources: Sources,
) -> pa.Table:
    """The `SELECTION` of some `candidates` (columns pair_id, query_id) for the budget; the same, read again, next time.

    Pairs that are in `out` under `key` already come first and count. A budget in tokens goes by the rows of the pairs
    `measured`; raises `ContractError` where it has none. Memory holds the ids of the candidates.
    """
    candidates = candidates.sort_by("pair_id")
    ids = candidates["pair_id"].combine_chunks()
    count = min(len(ids), *_budgets(config, out, key, measured))
    version = sources.scores.version if sources.scores and "uncertain" in config.shares else ""
    made_of = [config.model_dump(mode="json"), seed, key, count, version, digest(ids.to_pylist())]
    if "by_stratum" in config.shares:
        made_of.append(digest(_strata(candidates, sources.pairs).tolist()))
    if "diverse" in config.shares and sources.encoder:
        made_of.append(digest_files(sorted(path for path in sources.encoder.iterdir() if path.is_file())))
    path = out / f"_selection-{digest(made_of)}.parquet"
    if path.exists():
        return read_table(path, SELECTION)
    there = pads.field("pair_id").isin(ids)
    before = [name for batch in read_annotations(out, ["pair_id"], key, there) for name in batch["pair_id"].to_pylist()]
    left = candidates.filter(pc.invert(pc.is_in(ids, pa.array(before, pa.string()))))
    chosen = _chosen(config, seed, left, max(0, count - len(before)), sources)
    names = sorted(before) + left["pair_id"].take(pa.array(chosen.rows, pa.int64())).to_pylist()
    table = pa.table({"pair_id": names, "why": [BEFORE] * len(before) + chosen.why}, schema=SELECTION)
    with whole_file(path) as temporary:
        pq.write_table(table, temporary)
    log.info("annotate: %d of %d pairs chosen, %d of them annotated before", len(table), len(ids), len(before))
    return table


def _budgets(config: SelectConfig, out: Path, key: str, measured: Sequence[str]) -> list[int]:
    """The budgets that are set, in pairs."""
    budgets = [config.pairs] if config.pairs else []
    if config.tokens:
        columns = ["prompt_tokens", "completion_tokens"]
        rows = pads.field("pair_id").isin(pa.array(measured, pa.string()))
        taken = [sum(row.values()) for batch in read_annotations(out, columns, key, rows) for row in batch.to_pylist()]
        if not sum(taken):
            raise ContractError(
                "annotate.select.tokens goes by the pairs that the teacher is measured on, and there are none; set "
                "annotate.valid_pairs, or a budget in pairs"
            )
        budgets.append(int(config.tokens * len(taken) / sum(taken)))
    return budgets


def _chosen(config: SelectConfig, seed: int, left: pa.Table, count: int, sources: Sources) -> Selection:
    """`count` rows of `left`, by the strategies' shares."""
    from student import selection

    if not count or not len(left):
        return selection.Selection(np.zeros(0, np.int64), [])
    rng, parts = np.random.default_rng(seed), {}
    for name in config.shares:
        if name == "random":
            parts[name] = selection.random(len(left), count, rng)
        elif name == "by_stratum":
            parts[name] = selection.by_stratum(_strata(left, sources.pairs), count, rng)
        elif name == "uncertain":
            parts[name] = selection.uncertain(_probs(left, sources), count, rng)
        elif name == "diverse":
            some = np.sort(rng.permutation(len(left))[: max(CANDIDATES, count)])
            rows, why = selection.diverse(_vectors(left.take(pa.array(some)), sources), count, rng)
            parts[name] = selection.Selection(some[rows], why)
    return selection.mixture(parts, config.shares, count)


def _strata(left: pa.Table, pairs: Path) -> Array:
    """The stratum (N,) of each pair's query: that of the log where there is one, else by the number of its pairs here."""
    if (pairs / "frequencies").is_dir():
        table = read_table(pairs / "frequencies", FREQUENCIES, columns=["pair_id", "stratum"])
        place = pc.index_in(left["pair_id"], value_set=table["pair_id"])
        return np.array(pc.fill_null(table["stratum"].take(place), "not in the log").to_pylist())
    _, query, ads = np.unique(left["query_id"].to_pylist(), return_inverse=True, return_counts=True)
    return np.array(["1–3 ads", "4–10 ads", "11 ads or more"])[np.searchsorted([4, 11], ads[query], side="right")]


def _probs(left: pa.Table, sources: Sources) -> Array:
    """Grade probabilities (N, K) by the student."""
    assert sources.scores is not None  # the settings ask for a student
    of_student = pads.field("model_version") == sources.scores.version
    table = read_table(sources.scores.folder, SCORES, columns=["pair_id", "grade_probs"], where=of_student)
    probs = table["grade_probs"].take(pc.index_in(left["pair_id"], value_set=table["pair_id"])).combine_chunks()
    return probs.flatten().to_numpy().reshape(len(left), -1)


def _vectors(left: pa.Table, sources: Sources) -> Array:
    """Vectors (N, 2 D): those of the query and of the ad."""
    from student.baselines import Encoder
    from student.dataset import read_texts
    from student.model import pick_device, save_tokenizer

    assert sources.encoder is not None  # the settings ask for one
    rows = read_texts(sources.pairs, pads.field("pair_id").isin(left["pair_id"].combine_chunks()), 1)
    rows = rows.take(np.argsort(rows.pair_ids))  # the order of `left`
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_tokenizer(sources.encoder, Path(folder), _MAX_LENGTH)
    encoder = Encoder(sources.encoder, tokenizer, 128, pick_device("auto"))
    return np.hstack(encoder.sides(rows.queries, rows.ads))
