"""What an annotator lead looks at: pairs on which the teacher and the humans, or the teacher's own samples, disagree.

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
import os
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from data.contracts import PAIRS, ContractError, GradeScale, read_annotations, read_table
from pipeline.artifacts import read_record

What = Literal["disagreements", "low-agreement", "all"]
COLUMNS = (
    "pair_id", "why", "query", "ad_title", "ad_text", "human_grade", "teacher_grade", "agreement", "votes", "n_unparsed",
    "reasoning",
)  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_BATCH = 50_000


def audit_rows(
    annotations: Path,
    pairs: Path,
    key: str = "",
    what: What = "all",
    limit: int = 1000,
    low: float = 0.6,
    scanned: int = 0,
) -> list[dict[str, Any]]:
    """At most `limit` rows of `COLUMNS`, worst first, of the annotations under `key` (empty means the last one).

    disagreements: the human grade, where there is one, is another than the teacher's. low-agreement: at most `low` of the
    samples agree with the grade. `why` says which. `scanned` ends the search after so many annotations (0: none); ids are
    hashes, so the first ones are a sample. Human grades withheld from training are only compared with. Memory holds the
    ids that have a human grade, and `limit` rows. Raises what `read_annotations` raises.
    """
    scale = GradeScale.load(pairs)
    graded = read_table(pairs / "pairs", PAIRS, columns=["pair_id", "grade"], where=pads.field("grade").is_valid())
    worst: list[tuple[float, float, str, dict[str, Any]]] = []
    for row in _doubtful(annotations, key, graded, low, what, scanned):
        human = row["human"]
        distance = abs(human - row["grade"]) if human is not None and what != "low-agreement" else 0
        entry = (distance / scale.size, -row["agreement"], row["pair_id"], row)
        if len(worst) < limit:
            heapq.heappush(worst, entry)
        else:
            heapq.heappushpop(worst, entry)
    found = [row for *_, row in sorted(worst, key=lambda entry: (-entry[0], -entry[1], entry[2]))]
    wanted = ["pair_id", "query", "ad_title", "ad_text"]
    ids = pads.field("pair_id").isin([row["pair_id"] for row in found])
    texts = {row["pair_id"]: row for row in read_table(pairs / "pairs", PAIRS, columns=wanted, where=ids).to_pylist()}
    return [_shown(row, texts[row["pair_id"]], low) for row in found if row["pair_id"] in texts]


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of `COLUMNS` for a spreadsheet (UTF-8 with its mark), complete or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    writer.writerows([[cell(row[name]) for name in COLUMNS] for row in rows])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8-sig", newline="")
    temporary.replace(path)


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


def _doubtful(
    annotations: Path, key: str, graded: pa.Table, low: float, what: What, scanned: int
) -> Iterator[dict[str, Any]]:
    columns = ["pair_id", "grade", "agreement", "votes", "n_unparsed", "reasoning"]
    human = graded.rename_columns(["pair_id", "human"])
    seen = 0
    for batch in read_annotations(annotations, columns, key, pads.field("status") == "ok"):
        rows = pa.Table.from_batches([batch])
        place = pc.index_in(rows["pair_id"], value_set=human["pair_id"])
        rows = rows.append_column("human", human["human"].take(place))
        differs = pc.fill_null(pc.not_equal(rows["human"], rows["grade"]), False)
        unsure = pc.less_equal(rows["agreement"], low)
        chosen = {"disagreements": differs, "low-agreement": unsure, "all": pc.or_(differs, unsure)}[what]
        yield from rows.filter(chosen).to_pylist()
        seen += batch.num_rows
        if scanned and seen >= scanned:
            return


def _shown(row: dict[str, Any], pair: dict[str, Any], low: float) -> dict[str, Any]:
    reasons = []
    if row["human"] is not None and row["human"] != row["grade"]:
        reasons.append("teacher and human differ")
    if row["agreement"] <= low:
        reasons.append("samples disagree")
    return pair | {
        "why": "; ".join(reasons),
        "human_grade": row["human"],
        "teacher_grade": row["grade"],
        "agreement": row["agreement"],
        "votes": " ".join(map(str, row["votes"])),
        "n_unparsed": row["n_unparsed"],
        "reasoning": row["reasoning"],
    }


def main() -> None:
    """The command line; exit code 2 with one sentence where the run has nothing to audit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/sample")
    parser.add_argument("csv", type=Path, help="file to write")
    parser.add_argument("--what", choices=("disagreements", "low-agreement", "all"), default="all")
    parser.add_argument("--limit", type=int, default=1000, help="rows at most")
    parser.add_argument("--low", type=float, default=0.6, help="agreement up to which a pair counts as doubtful")
    parser.add_argument("--key", default="", help="annotation key; that of the run's last annotation unless given")
    options = parser.parse_args()
    from pipeline.stages import STAGES

    folder = options.run / STAGES["annotate"].folder
    try:
        record = read_record(folder)
        key = options.key or (str(record.figures["annotation_key"]) if record else "")
        rows = audit_rows(folder, options.run / STAGES["data"].folder, key, options.what, options.limit, options.low)
        write_csv(rows, options.csv)
    except (ContractError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{len(rows)} pairs in {options.csv}")


if __name__ == "__main__":
    main()
