"""For an annotator lead: pairs on which the teacher and the humans, or the teacher's own samples, disagree.

    python -m pipeline.report.audit runs/sample audit.csv [--what all] [--limit 1000]

writes them as CSV, worst first: the human grade farthest from the teacher's, then the lowest agreement. The texts of ads
and queries are hostile input, and spreadsheets run what begins like a formula: such a cell gets an apostrophe in front, and
control characters go. The report shows the same rows as escaped text.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import io
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from data.contracts import ANNOTATIONS, KEY_FILE, ContractError, read_json, write_text
from pipeline.report.summary import metrics_of
from pipeline.stages import STAGES, finished_stages

What = Literal["disagreements", "low-agreement", "all"]
Row = dict[str, Any]
COLUMNS = (
    "pair_id", "why", "query", "ad_title", "ad_text", "human_grade", "teacher_grade", "agreement", "votes", "n_unparsed",
    "reasoning",
)  # fmt: skip
LOW = 0.6
_TEXTS = ["pair_id", "query", "ad_title", "ad_text"]
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_BATCH = 50_000


def usable_annotations(annotations: Path, pairs: Path, key: str) -> Iterator[pa.Table]:
    """The annotations with a grade under `key`, batch by batch, with the human grade of each pair (null without one).

    Columns: pair_id, teacher_grade, human_grade, agreement, votes, n_unparsed, reasoning. Human grades that are withheld
    from training are only compared with. Rows of splits valid and test, which measure the teacher, are left out unless
    theirs is the split that was annotated. Memory holds the ids that have a human grade, and a batch.
    """
    split = read_json(note).get("split") if (note := annotations / KEY_FILE).exists() else "pool"
    beside = pads.field("split").isin([other for other in ("valid", "test") if other != split])
    left_out = _pairs(pairs).to_table(columns=["pair_id"], filter=beside)["pair_id"]
    human = _pairs(pairs).to_table(columns=["pair_id", "grade"], filter=pads.field("grade").is_valid())
    columns = ["pair_id", "grade", "agreement", "votes", "n_unparsed", "reasoning"]
    usable = (pads.field("annotation_key") == key) & (pads.field("status") == "ok")
    files = pads.dataset(annotations, format="parquet")
    nothing = pa.RecordBatch.from_pylist([], schema=pa.schema([ANNOTATIONS.field(name) for name in columns]))
    for batch in files.to_batches(columns=columns, filter=usable, batch_size=_BATCH) if files.files else [nothing]:
        table = pa.Table.from_batches([batch]).rename_columns({"grade": "teacher_grade"})
        table = table.filter(pc.invert(pc.is_in(table["pair_id"], value_set=left_out)))
        place = pc.index_in(table["pair_id"], value_set=human["pair_id"])
        yield table.append_column("human_grade", human["grade"].take(place))


def worst(batches: Iterable[pa.Table], limit: int, what: What = "all", low: float = LOW) -> list[Row]:
    """At most `limit` doubtful rows of `usable_annotations`, worst first; `why` says what is doubtful.

    disagreements: the human grade is another than the teacher's. low-agreement: at most `low` of the samples agree.
    """

    def rows() -> Iterator[Row]:
        for table in batches:
            differs = pc.fill_null(pc.not_equal(table["human_grade"], table["teacher_grade"]), False)
            unsure = pc.less_equal(table["agreement"], low)
            chosen = {"disagreements": differs, "low-agreement": unsure, "all": pc.or_(differs, unsure)}[what]
            yield from table.filter(chosen).to_pylist()

    def order(row: Row) -> tuple[float, float, str]:
        compared = row["human_grade"] is not None and what != "low-agreement"
        distance = abs(row["human_grade"] - row["teacher_grade"]) if compared else 0
        return -distance, row["agreement"], row["pair_id"]

    def why(row: Row) -> str:
        reasons = ["teacher and human differ"] if row["human_grade"] not in (None, row["teacher_grade"]) else []
        return "; ".join(reasons + (["samples disagree"] if row["agreement"] <= low else []))

    return [row | {"why": why(row)} for row in heapq.nsmallest(limit, rows(), key=order)]


def with_texts(rows: list[Row], pairs: Path) -> list[Row]:
    """The rows with their pairs' texts; a row whose pair is not in the table any more is left out."""
    ids = pads.field("pair_id").isin(pa.array([row["pair_id"] for row in rows], pa.string()))
    texts = {pair["pair_id"]: pair for pair in _pairs(pairs).to_table(columns=_TEXTS, filter=ids).to_pylist()}
    return [texts[row["pair_id"]] | row for row in rows if row["pair_id"] in texts]


def write_csv(rows: list[Row], path: Path) -> None:
    """Write rows of `COLUMNS` for a spreadsheet (UTF-8 with its mark), complete or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in rows:
        row = row | {"votes": " ".join(map(str, row["votes"]))}
        writer.writerow([cell(row[name]) for name in COLUMNS])
    write_text(path, "\ufeff" + text.getvalue())


def cell(value: Any) -> str:
    """A value as the text of a cell that no spreadsheet takes for a formula; numbers of ours are no text.

    >>> cell("=HYPERLINK(1)"), cell(" +1"), cell(-0.5), cell(None)
    ("'=HYPERLINK(1)", "' +1", '-0.5', '')
    """
    if value is None:
        return ""
    if isinstance(value, int | float):
        return str(value)
    text = "".join(c if unicodedata.category(c) not in ("Cc", "Cf", "Cs") else " " for c in str(value))
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def _pairs(folder: Path) -> pads.Dataset:
    # Not checked against today's schema: a run from before the table got another column can be read too.
    return pads.dataset(folder / "pairs", format="parquet")


def main() -> None:
    """The command line; exit code 2 with one sentence where the run has nothing to audit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/sample")
    parser.add_argument("csv", type=Path, help="file to write")
    parser.add_argument("--what", choices=("disagreements", "low-agreement", "all"), default="all")
    parser.add_argument("--limit", type=int, default=1000, help="rows at most")
    parser.add_argument("--low", type=float, default=LOW, help="agreement up to which a pair counts as doubtful")
    parser.add_argument("--key", default="", help="annotation key; that of the run's last annotation unless given")
    options = parser.parse_args()
    annotations, pairs = (options.run / STAGES[name].folder for name in ("annotate", "data"))
    try:
        records = finished_stages(options.run)
        if "annotate" not in records and not options.key:
            raise ContractError(f"{annotations} is not finished; run annotate first, or give the annotations' --key")
        key = options.key or metrics_of(records["annotate"])["annotation_key"]
        batches = usable_annotations(annotations, pairs, key)
        rows = with_texts(worst(batches, options.limit, options.what, options.low), pairs)
        write_csv(rows, options.csv)
    except (ContractError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{len(rows)} pairs in {options.csv}")


if __name__ == "__main__":
    main()
