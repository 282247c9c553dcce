"""CrowdFlower search results relevance (Kaggle): web shop results rated 1–4 by several people.

`train.csv`: id, query, product_title, product_description, median_relevance, relevance_variance. The median, 1 (worst) to 4
("completely satisfies the search query"), stays in `grade_raw`, grade = median − 1, and the raters' variance is kept in the
table `disagreement`. Titles and descriptions are scraped HTML, of which the visible text is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.contracts import Grade, GradeScale
from data.html import visible_text_column
from data.sources.files import read_columns
from data.sources.labels import graded_rows, number
from data.sources.paths import one_file

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from data.config import DataConfig

LICENCE = "the rules of the Kaggle competition; not to be redistributed"
GRADING = "median of the ratings 1–4, minus 1; the variance of the ratings is kept"
SCALE = GradeScale(
    grades=(
        Grade(name="off topic", definition="The result has nothing to do with what the shopper searched for."),
        Grade(name="slightly relevant", definition="The result touches the query but would not serve the shopper."),
        Grade(
            name="mostly relevant", definition="The result is close to what the shopper searched for, but not quite it."
        ),
        Grade(name="satisfying", definition="The result completely satisfies the query."),
    ),
    relevant_from=2,
)
_COLUMNS = {
    "query": "query",
    "ad_title": "product_title",
    "ad_text": "product_description",
    "grade": "median_relevance",
    "variance": "relevance_variance",
}


def input_files(config: DataConfig) -> list[Path]:
    """The training CSV at `config.path`."""
    assert config.path is not None
    return [one_file(config.path)]


def read(spark: SparkSession, config: DataConfig) -> tuple[DataFrame, GradeScale]:
    """The rows and the scale; a median that is no whole number from 1 to 4 is a `problem` of its row."""
    from pyspark.sql import functions as F

    frame = read_columns(spark, input_files(config)[0], "csv", _COLUMNS, encoding=config.encoding)
    rating, variance = number(F.trim("grade")), number(F.trim("variance"))
    faulty = rating.isNull() | (rating != F.rint(rating)) | ~rating.between(1, SCALE.size)
    rows = graded_rows(
        frame,
        ad_title=visible_text_column(F.col("ad_title")),
        ad_text=visible_text_column(F.col("ad_text")),
        grade_raw=rating,
        grade=F.when(~faulty, rating - 1).cast("int"),
        fault=F.when(faulty, "the median relevance is not 1, 2, 3 or 4"),
        rating_variance=F.when(variance >= 0, variance),
    )
    return rows, SCALE
