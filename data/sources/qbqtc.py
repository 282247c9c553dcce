"""QBQTC, QQ Browser query–title relevance: Chinese web results graded 0–2.

JSONL with id, query, title and label (a number, as text); an older release names it `relevant` and has no id. The label is
the grade and stays in `grade_raw`: 0 poor, 1 some, 2 high relevance. The publisher (CLUE benchmark) states no licence.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.contracts import Grade, GradeScale
from data.sources.files import json_names, read_columns
from data.sources.labels import graded_rows, number
from data.sources.paths import one_file, public_file

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from data.config import DataConfig

LICENCE = "none stated by the publisher"
GRADING = "the label 0, 1 or 2 is the grade"
SCALE = GradeScale(
    grades=(
        Grade(name="poor", definition="The page does not answer the query."),
        Grade(name="somewhat relevant", definition="The page has to do with the query but answers it in part only."),
        Grade(name="highly relevant", definition="The page answers the query."),
    ),
    relevant_from=2,
)


def input_files(config: DataConfig) -> list[Path]:
    """The JSONL file: `config.path`, or `qbqtc/train.jsonl.gz` in `$ADS_RELEVANCE_DATA`."""
    return [one_file(config.path) if config.path is not None else public_file("qbqtc/train.jsonl.gz")]


def read(spark: SparkSession, config: DataConfig) -> tuple[DataFrame, GradeScale]:
    """The rows and the scale; any other label than 0, 1 and 2 is a `problem` of its row."""
    from pyspark.sql import functions as F

    (path,) = input_files(config)
    label = "relevant" if "relevant" in json_names(path) else "label"
    frame = read_columns(spark, path, "jsonl", {"query": "query", "ad_title": "title", "grade": label})
    grade = number(F.trim("grade"))
    faulty = grade.isNull() | ~grade.isin(0.0, 1.0, 2.0)
    rows = graded_rows(
        frame,
        ad_title=F.col("ad_title"),
        grade_raw=grade,
        grade=F.when(~faulty, grade).cast("int"),
        fault=F.when(faulty, "the label is not 0, 1 or 2"),
    )
    return rows, SCALE
