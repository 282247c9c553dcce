"""The settings of the data stage."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from data.contracts import SPLITS, STRATA, Config, Grade, UserPath

Column = Literal["query", "ad_title", "ad_text", "attributes", "grade", "rationale"]
LogColumn = Literal["query", "ad_title", "ad_text", "attributes", "frequency"]
Source = Literal["synthetic", "home_depot", "wands", "esci", "crowdflower", "qbqtc", "qadsm", "table"]
Format = Literal["auto", "csv", "tsv", "json", "jsonl", "parquet"]
Limit = int | None

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
"""Delimiters by name."""
MISSING_LABELS = ("NA", "N/A", "#N/A", "<NA>", "NaN", "None", "NULL", "\\N", "-", "--", "?")
"""Labels that mean that there is none, as pandas, R, spreadsheets and databases write them."""


def _known_encoding(name: str) -> str:
    """The encoding under a name that Python knows: `name` itself, or the one that Java calls so (`x-windows-949`)."""
    lower = name.lower()
    for spelling in (name, lower.removeprefix("x-"), re.sub("^(x-)?(windows|ibm)-?", "cp", lower)):
        try:
            "a".encode(spelling)
        except (LookupError, UnicodeError):
            continue
        return spelling
    raise ValueError(f"there is no text encoding {name!r}; windows-1252, utf-16, shift_jis and gb18030 are some")


def _one_character(delimiter: Any) -> Any:
    """A delimiter by its name or as `\\t`; raises `ValueError` for several characters."""
    if not isinstance(delimiter, str):
        return delimiter
    character = DELIMITERS.get(delimiter.lower(), delimiter.replace("\\t", "\t"))
    if len(character) != 1 or character in '"\r\n':
        raise ValueError(f"a delimiter is one character, or {', '.join(DELIMITERS)}; it is {delimiter!r}")
    return character


Encoding = Annotated[str, AfterValidator(_known_encoding)]
Delimiter = Annotated[str | None, BeforeValidator(_one_character)]


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
    delimiter: Delimiter = None
    """As for a `table`."""
    header: tuple[str, ...] = ()
    """As for a `table`."""
    quotes: bool = True
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
        return {name: limit for name in STRATA if (limit := getattr(self, name)) is not None}

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

    source: Source | None = None
    """Where pairs come from: any `table` with a column mapping, a public set in the layout of its publisher, or made up
    (`synthetic`). Unless given, a `path` means a table, and without one the pairs are made up."""
    path: UserPath | None = None
    """File to read (`table`: a folder of such files too; `wands`, `esci`: the folder with the published files).
    `home_depot`, `qbqtc` and `qadsm` find theirs without it where the environment variable ADS_RELEVANCE_DATA names the
    folder."""
    format: Format = "auto"
    """Format of a `table`; `auto` goes by the file's name: .csv, .tsv, .jsonl, .json (each with .gz or .zip too),
    .parquet. JSON is one object for each line, or an array of objects."""
    delimiter: Delimiter = None
    """Character between the columns of a CSV `table`, such as `;`, or its name (comma, semicolon, tab, pipe); empty
    means a comma, or a tab for TSV."""
    header: tuple[str, ...] = ()
    """For a CSV or TSV `table` without a header line: the names of all its columns, in order."""
    quotes: bool = True
    """In a CSV or TSV `table`, double quotes enclose a field; false where a quote is a character like any other."""
    encoding: Encoding = "utf-8"
    """Encoding of CSV, TSV and JSON files, by any name that Python knows: `windows-1252`, `utf-16`, `shift_jis`, … A row
    with bytes that it does not know is kept aside, and the encoding that the file seems to have is proposed."""
    html: bool = False
    """For `table`: ad titles and texts are HTML; tags go and entities become characters. The public sets that hold HTML are
    treated so in any case."""
    locale: Literal["us", "es", "jp"] | None = "us"
    """For `esci`: the shop whose queries and products are taken; empty takes all."""
    texts: UserPath | None = None
    """A text file (UTF-8, gzipped too) with a text on each line about what the ads sell, such as product descriptions. A
    teacher can read them before it knows a label (`teacher.warm_start.texts`). The made-up shop has its own catalogue."""
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
    missing_labels: tuple[str, ...] = MISSING_LABELS
    """For `table`: labels that mean that there is none, in upper or lower case; an empty cell always does. What
    `grade_labels` names is a label nevertheless, and what it names in another case is a fault, unless this is set."""
    relevant_from: int | None = Field(default=None, ge=1, le=9)
    """Lowest grade that counts as relevant; empty leaves it to the source (`table`: the highest grade)."""
    rows: int = Field(default=16_000, ge=1, le=2_000_000)
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
        return {name: limit for name in SPLITS if (limit := getattr(self, f"max_{name}")) is not None}

    @property
    def source_name(self) -> Source:
        """The source in use: `source`, or what follows from `path` where it is not given."""
        return self.source or ("table" if self.path is not None else "synthetic")

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        for name, sources in _ONLY_FOR.items():
            ignorable = (type(self).model_fields[name].default, {}, *_FILLED_IN.get(name, ()))
            for_the_log = name == "encoding" and self.log is not None
            if self.source_name not in sources and not for_the_log and getattr(self, name) not in ignorable:
                remedy = (
                    "for a table of yours set `source` to 'table' and `path`" if "table" in sources else "leave it out"
                )
                raise ValueError(f"`{name}` has no effect on the source '{self.source_name}'; {remedy}")
        return self

    @model_validator(mode="after")
    def _files_are_named(self) -> Self:
        if self.source_name in ("wands", "esci", "crowdflower", "table") and self.path is None:
            raise ValueError(f"source '{self.source}' needs `path`: where its files lie")
        if self.log is not None and not self.shares.pool:
            raise ValueError("a `log` joins the pool, so `shares.pool` must be above 0")
        return self

    @model_validator(mode="after")
    def _table_is_described(self) -> Self:
        if self.source_name != "table":
            return self
        table = "source 'table'" if self.source else "a table (a `path` without `source` means one)"
        missing = " and ".join(name for name in ("query", "ad_title") if name not in self.columns)
        size, steps, words = len(self.grades), self.grade_thresholds, self.grade_labels
        rules = [
            (missing, f"{table} needs `columns` with the file's column for {missing}"),
            (size < 2, f"{table} needs `grades`: name and definition of at least two grades, lowest first"),
            (
                (steps or words) and "grade" not in self.columns,
                "thresholds and labels need the column of `grade` in `columns`",
            ),
            (steps and words, "give `grade_thresholds` for ratings or `grade_labels` for words, not both"),
            (steps and len(steps) != size - 1, f"`grade_thresholds` needs {size - 1} numbers for {size} grades"),
            (not all(map(math.isfinite, steps)), "`grade_thresholds` must be finite numbers"),
            (any(a >= b for a, b in pairwise(steps)), "`grade_thresholds` must rise"),
            (
                any(not 0 <= grade < size for grade in words.values()),
                f"`grade_labels` must map to grades 0 … {size - 1}",
            ),
            ((self.relevant_from or 1) >= size, f"`relevant_from` must be below the number of grades, {size}"),
        ]
        for broken, rule in rules:
            if broken:
                raise ValueError(rule)
        return self


_ON_A_TABLE = ("columns", "grades", "grade_thresholds", "grade_labels", "missing_labels", "format", "delimiter", "header",
               "quotes", "html")  # fmt: skip
_WITH_TEXT_FILES = ("table", "home_depot", "wands", "crowdflower", "qbqtc", "qadsm")
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_ON_A_TABLE, ("table",)),
    "path": (*_WITH_TEXT_FILES, "esci"),
    "encoding": _WITH_TEXT_FILES,
    "locale": ("esci",),
    "rows": ("synthetic",),
}
_FILLED_IN = {"rows": (20_000,)}  # the default of an older version, which its runs have on record


def data_of_preset(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What of a preset's data settings holds beside those `given`.

    A preset with `rows` describes the made-up shop, and none of it holds for another source. Where those given describe a
    table and name no source, the preset's source does not hold.
    """
    describes_table = "source" not in given and any(given.get(name) for name in _ON_A_TABLE)
    another = describes_table or given.get("path") or given.get("source", "synthetic") != "synthetic"
    if "rows" in preset and another:
        return {}
    return {name: value for name, value in preset.items() if name != "source" or not describes_table}
