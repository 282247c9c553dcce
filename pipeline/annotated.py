"""Annotations as people read them: with the human grade and the texts of each pair, the most doubtful ones first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from data.contracts import ANNOTATIONS, KEY_FILE, read_json

What = Literal["disagreements", "low-agreement", "all"]
Row = dict[str, Any]
LOW = 0.6
_TEXTS = ["pair_id", "query", "ad_title", "ad_text", "attributes"]
_BATCH = 50_000


def usable_annotations(annotations: Path, pairs: Path, key: str) -> Iterator[pa.Table]:
    """The annotations with a grade under `key`, batch by batch, with the human grade of each pair (null without one).

    Columns: pair_id, teacher_grade, human_grade, agreement, votes, n_unparsed, reasoning. Human grades that are withheld
    from training are only compared with. Rows of splits valid and test, which measure the teacher, are left out unless
    theirs is the split that was annotated. Memory holds the ids that have a human grade, and a batch.
    """
    human = _pairs(pairs).to_table(columns=["pair_id", "grade"], filter=pads.field("grade").is_valid())
    columns = ["pair_id", "grade", "agreement", "votes", "n_unparsed", "reasoning"]
    usable = (pads.field("annotation_key") == key) & (pads.field("status") == "ok") & of_the_split(annotations, pairs)
    files = pads.dataset(annotations, format="parquet")
    nothing = pa.RecordBatch.from_pylist([], schema=pa.schema([ANNOTATIONS.field(name) for name in columns]))
    for batch in files.to_batches(columns=columns, filter=usable, batch_size=_BATCH) if files.files else [nothing]:
        table = pa.Table.from_batches([batch]).rename_columns({"grade": "teacher_grade"})
        place = pc.index_in(table["pair_id"], value_set=human["pair_id"])
        yield table.append_column("human_grade", human["grade"].take(place))


def of_the_split(annotations: Path, pairs: Path) -> pads.Expression:
    """The annotations but for those of valid and test, which measure the teacher, unless theirs is the split that was
    annotated."""
    split = read_json(note).get("split") if (note := annotations / KEY_FILE).exists() else "pool"
    beside = pads.field("split").isin([other for other in ("valid", "test") if other != split])
    return ~pads.field("pair_id").isin(_pairs(pairs).to_table(["pair_id"], filter=beside)["pair_id"].combine_chunks())


def worst(batches: Iterable[pa.Table], limit: int, what: What = "all") -> list[Row]:
    """At most `limit` doubtful rows of `usable_annotations`, worst first; `why` says what is doubtful.

    disagreements: the human grade is another than the teacher's. low-agreement: at most `LOW` of the samples agree.
    """

    def rows() -> Iterator[Row]:
        for table in batches:
            differs = pc.fill_null(pc.not_equal(table["human_grade"], table["teacher_grade"]), False)
            unsure = pc.less_equal(table["agreement"], LOW)
            chosen = {"disagreements": differs, "low-agreement": unsure, "all": pc.or_(differs, unsure)}[what]
            yield from table.filter(chosen).to_pylist()

    def order(row: Row) -> tuple[float, float, str]:
        compared = row["human_grade"] is not None and what != "low-agreement"
        distance = abs(row["human_grade"] - row["teacher_grade"]) if compared else 0
        return -distance, row["agreement"], row["pair_id"]

    def why(row: Row) -> str:
        reasons = ["teacher and human differ"] if row["human_grade"] not in (None, row["teacher_grade"]) else []
        return "; ".join(reasons + (["samples disagree"] if row["agreement"] <= LOW else []))

    return [row | {"why": why(row)} for row in heapq.nsmallest(limit, rows(), key=order)]


def with_texts(rows: list[Row], pairs: Path) -> list[Row]:
    """The rows with their pairs' texts, attributes as one text; a row whose pair is no longer in the table is left out."""
    ids = pads.field("pair_id").isin(pa.array([row["pair_id"] for row in rows], pa.string()))
    texts = {pair["pair_id"]: pair for pair in _pairs(pairs).to_table(columns=_TEXTS, filter=ids).to_pylist()}
    for pair in texts.values():
        pair["attributes"] = "; ".join(f"{name}: {value}" for name, value in pair["attributes"] or ())
    return [texts[row["pair_id"]] | row for row in rows if row["pair_id"] in texts]


def _pairs(folder: Path) -> pads.Dataset:
    # Not checked against today's schema: a run from before the table got another column can be read too.
    return pads.dataset(folder / "pairs", format="parquet")
