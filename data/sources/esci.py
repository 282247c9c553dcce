"""Amazon's ESCI shopping queries: up to 40 results for a hard query, in English, Spanish and Japanese shops.

`shopping_queries_dataset_examples.parquet` holds the judgements, `…_products.parquet` the products of each `product_locale`.
The labels Irrelevant, Complement, Substitute, Exact are the grades 0 to 3; `grade_raw` is the gain that the publisher gives
them in ranking, 0, 0.01, 0.1 and 1. The publisher's own train and test are not taken over, since splits are by query here.
Descriptions and bullet points are HTML in part, of which the visible text is taken; brand and colour become attributes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.contracts import ContractError, Grade, GradeScale
from data.html import visible_text_column
from data.maps import map_of
from data.sources.files import read_columns
from data.sources.joins import one_for_each, with_match
from data.sources.labels import graded_rows, named_label

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from data.config import DataConfig

LICENCE = "Apache-2.0"
GRADING = "I, C, S, E are the grades 0, 1, 2, 3 (raw: 0, 0.01, 0.1, 1)"
SCALE = GradeScale(
    grades=(
        Grade(name="irrelevant", definition="The product is not relevant, or fails a central aspect of the query."),
        Grade(
            name="complement", definition="The product does not fulfil the query, but could be used with one that does."
        ),
        Grade(
            name="substitute",
            definition="The product is somewhat relevant: it fails some aspects of the query, but can stand in for it.",
        ),
        Grade(name="exact", definition="The product is relevant and satisfies all that the query specifies."),
    ),
    relevant_from=3,
)
_GRADES = {"I": 0, "C": 1, "S": 2, "E": 3}
_GAINS = {"I": 0.0, "C": 0.01, "S": 0.1, "E": 1.0}
_FILES = ("shopping_queries_dataset_examples.parquet", "shopping_queries_dataset_products.parquet")
_KEYS = ["product_locale", "product_id"]
_PRODUCT = ("product_title", "product_description", "product_bullet_point", "product_brand", "product_color")


def input_files(config: DataConfig) -> list[Path]:
    """The two Parquet files in the folder `config.path` (or in its `shopping_queries_dataset`)."""
    assert config.path is not None
    for folder in (config.path, config.path / "shopping_queries_dataset"):
        if all((folder / name).is_file() for name in _FILES):
            return [folder / name for name in _FILES]
    raise ContractError(f"{config.path} lacks {' or '.join(_FILES)}; set `data.path` to the folder that holds both")


def read(spark: SparkSession, config: DataConfig) -> tuple[DataFrame, GradeScale]:
    """One row for each judgement of the locale, and the scale; one without its product has a `problem`."""
    from pyspark.sql import functions as F

    examples_file, products_file = input_files(config)
    columns = {"query": "query", "grade": "esci_label"} | {name: name for name in _KEYS}
    examples = read_columns(spark, examples_file, "parquet", columns)
    products = read_columns(spark, products_file, "parquet", {name: name for name in (*_KEYS, *_PRODUCT)})
    if config.locale:
        examples = examples.where(F.col("product_locale") == config.locale)
        products = products.where(F.col("product_locale") == config.locale)
    products = one_for_each(products, _KEYS, list(_PRODUCT))
    frame = with_match(examples, products, _KEYS, f"its product is not in {products_file.name}")
    grade = named_label(F.trim("grade"), _GRADES, "int")
    text = F.concat_ws("\n", "product_bullet_point", "product_description")
    named = {"brand": "product_brand", "colour": "product_color"}
    entries = [F.struct(F.lit(ours).alias("key"), F.trim(theirs).alias("value")) for ours, theirs in named.items()]
    rows = graded_rows(
        frame,
        ad_title=visible_text_column(F.col("product_title")),
        ad_text=visible_text_column(text),
        attributes=map_of(F.filter(F.array(*entries), lambda e: e["value"] != "")),
        grade_raw=named_label(F.trim("grade"), _GAINS, "double"),
        grade=grade,
        fault=F.when(grade.isNull(), "the label is not E, S, C or I"),
    )
    return rows, SCALE
