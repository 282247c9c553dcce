"""WANDS, Wayfair's product search relevance: furniture, queries and expert labels in three files.

`product.csv`, `query.csv` and `label.csv`, separated by tabs in spite of their names. A label joins a query with a product:
Irrelevant, Partial or Exact are the grades 0, 1 and 2; `grade_raw` is the gain that the publisher gives them, 0, 0.5 and 1.
Descriptions are HTML, of which the visible text is taken; `product_features` ("name:value|…") become attributes.
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
    from pyspark.sql import Column, DataFrame, SparkSession

    from data.config import DataConfig

LICENCE = "MIT"
GRADING = "Irrelevant, Partial, Exact are the grades 0, 1, 2 (raw: 0, 0.5, 1)"
SCALE = GradeScale(
    grades=(
        Grade(name="irrelevant", definition="The product does not serve what the shopper asked for."),
        Grade(
            name="partial",
            definition="The product is of the right kind, but an attribute asked for is missing or differs.",
        ),
        Grade(name="exact", definition="The product is what the shopper asked for, with every attribute asked for."),
    ),
    relevant_from=2,
)
_GRADES = {"Irrelevant": 0, "Partial": 1, "Exact": 2}
_GAINS = {"Irrelevant": 0.0, "Partial": 0.5, "Exact": 1.0}
_FILES = ("label.csv", "query.csv", "product.csv")


def input_files(config: DataConfig) -> list[Path]:
    """The three files in the folder `config.path` (or in its `dataset`), plain or gzipped."""
    assert config.path is not None
    return [_file(config.path, name) for name in _FILES]


def read(spark: SparkSession, config: DataConfig) -> tuple[DataFrame, GradeScale]:
    """One row for each label, and the scale; one whose query or product is not there, or there twice, has a `problem`."""
    from pyspark.sql import functions as F

    label_file, query_file, product_file = input_files(config)

    def read_file(path: Path, columns: dict[str, str]) -> DataFrame:
        return read_columns(spark, path, "tsv", columns, encoding=config.encoding)

    labels = read_file(label_file, {"query_id": "query_id", "product_id": "product_id", "grade": "label"})
    queries = read_file(query_file, {"query_id": "query_id", "query": "query"})
    products = read_file(
        product_file,
        {"product_id": "product_id", "ad_title": "product_name", "ad_text": "product_description",
         "features": "product_features"},
    )  # fmt: skip
    queries = one_for_each(queries, ["query_id"], ["query"])
    products = one_for_each(products, ["product_id"], ["ad_title", "ad_text", "features"])
    frame = with_match(labels, queries, ["query_id"], f"its query is not in {query_file.name}")
    frame = with_match(frame, products, ["product_id"], f"its product is not in {product_file.name}")
    grade = named_label(F.trim("grade"), _GRADES, "int")
    rows = graded_rows(
        frame,
        ad_title=visible_text_column(F.col("ad_title")),
        ad_text=visible_text_column(F.col("ad_text")),
        attributes=_attributes(F.col("features")),
        grade_raw=named_label(F.trim("grade"), _GAINS, "double"),
        grade=grade,
        fault=F.when(grade.isNull(), "the label is not Exact, Partial or Irrelevant"),
    )
    return rows, SCALE


def _attributes(features: Column) -> Column:
    """`name:value|name:value` as a map; a part without a colon has no name and is left out."""
    from pyspark.sql import functions as F

    def entry(part: Column) -> Column:
        value = F.trim(F.substring_index(part, ":", -1))
        return F.struct(F.trim(F.substring_index(part, ":", 1)).alias("key"), F.when(value != "", value).alias("value"))

    parts = F.filter(F.split(features, "[|]"), lambda part: part.contains(":"))
    return map_of(F.filter(F.transform(parts, entry), lambda e: e["key"] != ""))


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz", folder / "dataset" / name):
        if path.is_file():
            return path
    raise ContractError(f"{folder} has no {name}; set `data.path` to the folder with {', '.join(_FILES)}")
