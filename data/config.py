"""The settings of the data stage."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from data.contracts import SPLITS, STRATA, Config, Grade, UserPath

Column = Literal["query", "ad_title", "ad_text", "attributes", "grade", "rationale"]
LogColumn = Literal["query", "ad_title", "ad_text", "attributes", "frequency"]
Format = Literal["auto", "csv", "tsv", "jsonl", "parquet"]
Encoding = Literal["utf-8", "latin-1", "utf-16"]  # Spark 4 reads no other charsets
Limit = int | None


class Shares(Config):
    """Share of the queries (not of the rows) that each split gets; they sum to 1."""

    train: float = Field(default=0.25, ge=0, le=1)
    """Labelled queries from which the teacher learns, and the student its gold labels."""

    valid: float = Field(default=0.10, ge=0, le=1)
    """Labelled queries for choices: early stopping, threshold, temperature."""

    test: float = Field(default=0.15, ge=0, le=1)
    """Labelled queries for the final figures, read once."""

    pool: float = Field(default=0.50, ge=0, le=1)
    """Queries for the teacher to annotate; a human grade they have is only used to measure the annotation."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        total = sum(getattr(self, name) for name in SPLITS)
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"the shares of train, valid, test and pool must sum to 1, and these sum to {total:g}")
        return self


class LogConfig(Config):
    """Pairs without labels, such as a search log, of which a sample joins the pool.

    A query's frequency is the sum over its rows. The most frequent queries that together carry `head_traffic` of it are the
    head, the next ones up to `torso_traffic` the torso, all others the tail. Of each stratum the first pairs in hash order
    are taken, queries kept whole.
    """

    path: UserPath
    """File to read, or a folder of such files."""

    format: Format = "auto"
    """As for a `table`."""

    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """As for a `table`."""

    columns: dict[LogColumn, str]
    """Our column → the file's column. `query` and `ad_title` are required; without `frequency` each row counts once."""

    head_traffic: float = Field(default=1 / 3, gt=0, lt=1)
    """Share of the traffic that the head carries."""

    torso_traffic: float = Field(default=2 / 3, gt=0, lt=1)
    """Share of the traffic that head and torso carry together."""

    head: Limit = Field(default=None, ge=0)
    """At most so many pairs of the head; empty takes all. The same for the two below."""

    torso: Limit = Field(default=None, ge=0)
    """At most so many pairs of the torso."""

    tail: Limit = Field(default=None, ge=0)
    """At most so many pairs of the tail."""

    @property
    def limits(self) -> dict[str, int]:
        """The limits that are set, by stratum."""
        found = {name: getattr(self, name) for name in STRATA}
        return {name: limit for name, limit in found.items() if limit is not None}

    @model_validator(mode="after")
    def _is_described(self) -> Self:
        missing = [name for name in ("query", "ad_title") if name not in self.columns]
        if missing:
            raise ValueError(f"the log needs `columns` with the file's column for {' and '.join(missing)}")
        if self.head_traffic >= self.torso_traffic:
            raise ValueError("`head_traffic` must be below `torso_traffic`")
        return self


class DataConfig(Config):
    """From a source to one checked table of query–ad pairs with leak-free splits."""

    source: Literal["synthetic", "home_depot", "wands", "esci", "crowdflower", "qbqtc", "table"] = "synthetic"
    """Where pairs come from: made up (`synthetic`), a public set in the layout of its publisher, or any `table` with a
    column mapping."""

    path: UserPath | None = None
    """File to read (`table`: a folder of such files too; `wands`, `esci`: the folder with the published files). `home_depot`
    and `qbqtc` find theirs without it where the environment variable ADS_RELEVANCE_DATA names the folder."""

    format: Format = "auto"
    """Format of a `table`; `auto` goes by the file's name: .csv, .tsv, .jsonl (each with .gz too), .parquet."""

    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Character between the columns of a CSV `table`, such as `;` or `|`; empty means a comma, or a tab for TSV."""

    encoding: Encoding = "utf-8"
    """Encoding of CSV and TSV files. A row with bytes that it does not know is kept aside."""

    html: bool = False
    """For `table`: ad titles and texts are HTML; tags go and entities become characters. The public sets that hold HTML are
    treated so in any case."""

    locale: Literal["us", "es", "jp"] | None = "us"
    """For `esci`: the shop whose queries and products are taken; empty takes all."""

    log: LogConfig | None = None
    """Unlabelled pairs that join the pool, beside any source."""

    columns: dict[Column, str] = Field(default_factory=dict)
    """For `table`: our column → the file's column. `query` and `ad_title` are required. `attributes` may be a map, an
    object or JSON text; `rationale` is the reason for the label, used to warm up the teacher."""

    grades: tuple[Grade, ...] = Field(default=(), max_length=10)
    """For `table`: name and one-sentence definition of each grade, from irrelevant (0) up; the teacher reads them."""

    grade_thresholds: tuple[float, ...] = ()
    """For `table` with ratings: the lowest rating of grade 1, 2, …; one fewer than there are grades."""

    grade_labels: dict[str, int] = Field(default_factory=dict)
    """For `table` with labels as words: label → grade. Without it and without thresholds, labels are 0 … K−1."""

    relevant_from: int | None = Field(default=None, ge=1, le=9)
    """Lowest grade that counts as relevant; empty leaves it to the source (`table`: the highest grade)."""

    rows: int = Field(default=20_000, ge=1, le=2_000_000)
    """Number of rows to make up, for `synthetic`."""

    seed: int = Field(default=0, ge=0)
    """Seed of the splits and of the synthetic source."""

    split_by: Literal["near_query", "query"] = "near_query"
    """What stays together in one split: queries that differ only in case, spacing, punctuation, word order or plural
    (`near_query`), or only equal ones, as in tables that were split so before (`query`)."""

    shares: Shares = Shares()
    """Share of the queries in each split."""

    max_train: Limit = Field(default=None, ge=1)
    """At most so many pairs in `train` (the first in hash order); empty keeps all. The same for the three below."""

    max_valid: Limit = Field(default=None, ge=1)
    """At most so many pairs in `valid`."""

    max_test: Limit = Field(default=None, ge=1)
    """At most so many pairs in `test`."""

    max_pool: Limit = Field(default=None, ge=1)
    """At most so many pairs in `pool`."""

    max_text_chars: int = Field(default=20_000, ge=10, le=1_000_000)
    """Longest query, title, text or attributes that is accepted, in characters; a longer row is kept aside."""

    max_rejected_share: float = Field(default=0.05, ge=0, le=1)
    """Share of the rows that may be kept aside as faulty before the run stops."""

    @property
    def limits(self) -> dict[str, int]:
        """The limits that are set, by split."""
        found = {name: getattr(self, f"max_{name}") for name in SPLITS}
        return {name: limit for name, limit in found.items() if limit is not None}

    @model_validator(mode="after")
    def _files_are_named(self) -> Self:
        if self.source in ("wands", "esci", "crowdflower") and self.path is None:
            raise ValueError(f"source '{self.source}' needs `path`: where its published files lie")
        if self.log is not None and not self.shares.pool:
            raise ValueError("a `log` joins the pool, so `shares.pool` must be above 0")
        return self

    @model_validator(mode="after")
    def _table_is_described(self) -> Self:
        if self.source != "table":
            return self
        if self.path is None:
            raise ValueError("source 'table' needs `path`, the file to read")
        missing = [name for name in ("query", "ad_title") if name not in self.columns]
        if missing:
            raise ValueError(f"source 'table' needs `columns` with the file's column for {' and '.join(missing)}")
        size = len(self.grades)
        if size < 2:
            raise ValueError("source 'table' needs `grades`: name and definition of at least two grades, lowest first")
        if self.grade_thresholds and self.grade_labels:
            raise ValueError("give `grade_thresholds` for ratings or `grade_labels` for words, not both")
        if self.grade_thresholds and len(self.grade_thresholds) != size - 1:
            raise ValueError(f"`grade_thresholds` needs {size - 1} numbers for {size} grades")
        if any(not math.isfinite(t) for t in self.grade_thresholds):
            raise ValueError("`grade_thresholds` must be finite numbers")
        if any(a >= b for a, b in zip(self.grade_thresholds, self.grade_thresholds[1:], strict=False)):
            raise ValueError("`grade_thresholds` must rise")
        if any(not 0 <= grade < size for grade in self.grade_labels.values()):
            raise ValueError(f"`grade_labels` must map to grades 0 … {size - 1}")
        if self.relevant_from is not None and self.relevant_from >= size:
            raise ValueError(f"`relevant_from` must be below the number of grades, {size}")
        return self
