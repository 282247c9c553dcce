"""What drift compares: of each query, its text and one of its ads; and the profile of those that a teacher learned from.

One ad stands for a query, since the more ads are taken together, the more words they have: batches with fewer ads a query
would look like another topic. It is the one with the lowest pair_id, a hash, so the choice is by chance and the same on
every machine. For the same reason samples are of whole queries: one of pairs has most of the queries with many ads.
"""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from pydantic import BaseModel

from data.contracts import ANNOTATIONS, PAIRS, read_json, write_json
from data.contracts import words as words_of
from pipeline.artifacts import read_record

logger = logging.getLogger(__name__)
FILE = "profile.json"  # in a teacher's folder
VERSION = 2  # raised when what is counted changes; 1 counted the words of all ads of a query, and had none in its file
SAMPLE = 100_000  # pairs whose texts are read on each side
IDS = 1_000_000  # pairs of the pool of which it is asked whether they are annotated
_LONGEST = 8  # words of a query, and more
_COLUMNS = ["pair_id", "query_id", "query", "ad_title"]


class Text(NamedTuple):
    """What stands for a query."""

    pair_id: str
    query: str
    ad_title: str


Texts = Mapping[str, Text]
"""By query_id, which is a hash, in its order."""


class Profile(BaseModel):
    """What is remembered of the queries (and one ad of each) that a model learned from."""

    version: int = 1
    queries: int
    lengths: dict[str, int]
    scripts: dict[str, int]
    words: dict[str, dict[str, int]]
    """For `query` and `ad`: in how many queries (in the ads of how many) each word is."""


def read_texts(pairs: Path, where: pads.Expression) -> Texts:
    """The queries, with an ad of each, of a sample of the pairs for which `where` holds."""
    files, rows = pairs / "pairs", count(pairs / "pairs", where)
    return texts_of(read(files, _COLUMNS, where if rows <= SAMPLE else where & some_queries(rows)))


def texts_among(pairs: Path, ids: Any) -> Texts:
    """The queries of the pairs with these ids, with an ad of each, of these pairs too."""
    return texts_of(read(pairs / "pairs", _COLUMNS, among(ids)))


def texts_of(rows: pa.Table) -> Texts:
    """Of each query the pair with the lowest pair_id."""
    texts: dict[str, Text] = {}
    for row in rows.sort_by([("query_id", "ascending"), ("pair_id", "ascending")]).to_pylist():
        texts.setdefault(row["query_id"], Text(row["pair_id"], row["query"], row["ad_title"]))
    return texts


def new_pairs(pairs: Path, annotations: Path) -> pa.Array:
    """The ids of the pool's pairs without an annotation under any key; of a sample of queries where there are many."""
    pool, rows = in_split("pool"), count(pairs / "pairs", in_split("pool"))
    known = ["pair_id", "query_id"]
    ids = read(pairs / "pairs", known, pool if rows <= IDS else pool & some_queries(rows, IDS))
    annotated = read(annotations, ["pair_id"], among(ids["pair_id"]))["pair_id"]
    new = ids.filter(pc.invert(pc.is_in(ids["pair_id"], value_set=annotated.combine_chunks())))
    return new.sort_by("query_id")["pair_id"].slice(0, SAMPLE).combine_chunks()


def annotated_grades(annotations: Path, pairs: Path, where: pads.Expression) -> dict[str, int]:
    """By pair_id, the grades for which `where` holds; of a sample of queries where there are many."""
    if (rows := count(annotations, where)) > SAMPLE:
        where &= among(read(pairs / "pairs", ["pair_id"], some_queries(rows))["pair_id"])
    found = read(annotations, ["pair_id", "grade"], where)
    return dict(zip(found["pair_id"].to_pylist(), found["grade"].to_pylist(), strict=True))


def profile(texts: Texts) -> Profile:
    """The profile of queries with an ad of each."""
    lengths, scripts = _lengths(texts), Counter(_script(text.query) for text in texts.values())
    words = {kind: word_counts(texts, kind) for kind in ("query", "ad")}
    return Profile(version=VERSION, queries=len(texts), lengths=lengths, scripts=scripts, words=words)


def remember(pairs: Path, teacher: Path) -> None:
    """Write the profile of split train, which a teacher has learned from, into the teacher's folder."""
    write_json(teacher / FILE, profile(read_texts(pairs, in_split("train"))).model_dump(mode="json"))


def remembered(teacher: Path, pairs: Path, labelled: str) -> Profile | None:
    """The profile in a teacher's folder; None where there is none that can be compared, which the log says.

    One of another version is made again from `pairs`, if their labelled part, of fingerprint `labelled`, is what this
    teacher learned from.
    """
    if not (teacher / FILE).exists():
        return None
    known = Profile.model_validate(read_json(teacher / FILE))
    if known.version == VERSION:
        return known
    record = read_record(teacher)
    if record is not None and labelled and record.inputs.get("data") == labelled:
        logger.info("%s counts words as another release did; the same is counted again in %s", teacher / FILE, pairs)
        return profile(read_texts(pairs, in_split("train")))
    logger.warning("drift: %s", refused(teacher))
    return None


def refused(teacher: Path) -> str:
    """In words, why a profile of another version says nothing."""
    return (
        f"{teacher / FILE} counts words as another release did, and the pairs that the teacher learned from are no longer "
        "there; its next training writes it anew"
    )


def word_counts(texts: Texts, kind: str) -> Counter[str]:
    """In how many queries, or in the ads of how many, each word is."""
    parts = (text.query if kind == "query" else text.ad_title for text in texts.values())
    return Counter(word for part in parts for word in set(words_of(part)))


def _lengths(texts: Texts) -> dict[str, int]:
    lengths = (len(words_of(text.query)) for text in texts.values())
    return dict(Counter(f"{min(n, _LONGEST)}{' or more' if n >= _LONGEST else ''} words" for n in lengths))


def _script(text: str) -> str:
    """The script of most of a text's letters, as Unicode names them; `none` without letters."""
    letters = Counter(unicodedata.name(c, "OTHER").partition(" ")[0] for c in text if c.isalpha())
    return max(letters, key=lambda name: (letters[name], name), default="none").lower()


def count(folder: Path, where: pads.Expression) -> int:
    """How many rows there are for which `where` holds."""
    files = _files(folder)
    return files.count_rows(filter=where) if files else 0


def read(folder: Path, columns: list[str], where: pads.Expression) -> pa.Table:
    """All rows for which `where` holds."""
    if files := _files(folder):
        return files.to_table(columns, filter=where)
    fields = {field.name: field for schema in (PAIRS, ANNOTATIONS) for field in schema}
    return pa.schema([fields[name] for name in columns]).empty_table()


def some_queries(rows: int, size: int | None = None) -> pads.Expression:
    """A share of the queries, those whose query_id, a hash, is low, so that of so many rows about `size` are left."""
    return pads.field("query_id") < f"{(size or SAMPLE) * 16**8 // rows:08x}"


def in_split(split: str) -> pads.Expression:
    """The pairs of a split."""
    return pads.field("split") == split


def among(ids: Any) -> pads.Expression:
    """The rows with these pair_ids."""
    values = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else pa.array(ids, pa.string())
    return pads.field("pair_id").isin(values)


def _files(folder: Path) -> Any:
    dataset = pads.dataset(folder, format="parquet") if folder.exists() else None
    return dataset if dataset is not None and dataset.files else None
