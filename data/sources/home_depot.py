"""Home Depot product search relevance (Kaggle): a query and a product title, rated 1–3 by about three people.

A row keeps the mean rating in `grade_raw`. The grades are the thirds of the range 1–3, cut at 5/3 and 7/3 as the file
rounds them, so that each of its usual values (1, 1.33 | 1.67, 2 | 2.33, 2.67, 3) has its own side and `relevant` is
rating ≥ 2.33. Its product descriptions are a file of their own and are not read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from data.schema import ContractError, Grade, GradeScale
from data.sources.files import list_files, read_columns
from data.sources.labels import number, threshold_grade

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from data.config import DataConfig

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
    """The CSV file: `config.path`, or where the public data sets are kept."""
    if config.path is not None:
        return list_files(config.path)
    for folder in data_folders():
        if (path := folder / "home_depot" / "train.csv.gz").is_file():
            return [path]
    raise ContractError(
        "the Home Depot file was not found; set `data.path` to its train.csv or train.csv.gz, "
        "or ADS_RELEVANCE_DATA to the folder that holds home_depot/train.csv.gz"
    )


def data_folders() -> list[Path]:
    """Where public data sets are looked for: `$ADS_RELEVANCE_DATA`, else `shared/data` beside this repository."""
    given = os.environ.get("ADS_RELEVANCE_DATA")
    return [Path(given)] if given else [Path(__file__).parents[3] / "shared" / "data"]


def read(spark: SparkSession, config: DataConfig) -> tuple[DataFrame, GradeScale]:
    """The rows and the scale; a rating outside 1–3 or none at all is a `problem` of its row."""
    from pyspark.sql import functions as F

    (path, *more) = input_files(config)
    if more:
        raise ContractError(f"{config.path} holds several files; set `data.path` to the training CSV itself")
    frame = read_columns(spark, path, "csv", _COLUMNS)
    rating = number(F.trim("grade"))
    faulty = rating.isNull() | (rating < 1) | (rating > 3)
    return frame.select(
        "query",
        "ad_title",
        F.lit(None).cast("string").alias("ad_text"),
        F.lit(None).cast("map<string,string>").alias("attributes"),
        rating.alias("grade_raw"),
        threshold_grade(rating, THRESHOLDS).alias("grade"),
        F.lit(None).cast("string").alias("rationale"),
        F.coalesce("problem", F.when(faulty, "the rating is not a number from 1 to 3")).alias("problem"),
        F.coalesce("detail", F.when(faulty, F.col("grade"))).alias("detail"),
    ), SCALE
