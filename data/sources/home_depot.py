"""Home Depot product search relevance (Kaggle): a query and a product title, rated 1–3 by about three people.

`train.csv`: id, product_uid, product_title, search_term, relevance. A row keeps the mean rating in `grade_raw`. The grades
are the thirds of the range 1–3, cut at 5/3 and 7/3 as the file rounds them, so that each of its usual values
(1, 1.33 | 1.67, 2 | 2.33, 2.67, 3) has its own side and `relevant` is rating ≥ 2.33. Its product descriptions are a file of
their own and are not read. Kaggle's own file is Latin-1: set `data.encoding` for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.contracts import Grade, GradeScale
from data.html import visible_text_column
from data.sources.files import read_columns
from data.sources.labels import graded_rows, number, threshold_grade
from data.sources.paths import one_file, public_file

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from data.config import DataConfig

LICENCE = "the rules of the Kaggle competition; not to be redistributed"
GRADING = "mean of about three ratings 1–3; below 1.67 is grade 0, from 2.33 grade 2"
SCALE = GradeScale(
    grades=(
        Grade(
            name="irrelevant",
            definition="The product is not what the shopper asked for and would not serve the need behind the query.",
        ),
        Grade(
            name="partly relevant",
            definition="The product is related to the query (the same field, an accessory or part of it, or the right "
            "kind with a wrong brand, size or feature), but it is not what the shopper asked for.",
        ),
        Grade(
            name="relevant",
            definition="The product is what the shopper asked for: the right kind of product, and the brand, size and "
            "features named in the query fit it in all but a minor detail.",
        ),
    ),
    relevant_from=2,
)
THRESHOLDS = (1.67, 2.33)
_COLUMNS = {"query": "search_term", "ad_title": "product_title", "grade": "relevance"}


def input_files(config: DataConfig) -> list[Path]:
    """The CSV file: `config.path`, or `home_depot/train.csv.gz` in `$ADS_RELEVANCE_DATA`."""
    return [one_file(config.path) if config.path is not None else public_file("home_depot/train.csv.gz")]


def read(spark: SparkSession, config: DataConfig) -> tuple[DataFrame, GradeScale]:
    """The rows and the scale; a rating outside 1–3 or none at all is a `problem` of its row."""
    from pyspark.sql import functions as F

    (path,) = input_files(config)
    frame = read_columns(spark, path, "csv", _COLUMNS, encoding=config.encoding)
    rating = number(F.trim("grade"))
    faulty = rating.isNull() | (rating < 1) | (rating > 3)
    rows = graded_rows(
        frame,
        ad_title=visible_text_column(F.col("ad_title")),
        grade_raw=rating,
        grade=threshold_grade(rating, THRESHOLDS),
        fault=F.when(faulty, "the rating is not a number from 1 to 3"),
    )
    return rows, SCALE
