"""Public sets in the layout of their publishers: what `public.toml` says of each, and the joins of several files."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from data.config import DataConfig
from data.contracts import ContractError
from data.sources.delimited import Dialect
from data.sources.files import read_columns
from data.sources.json_records import json_names
from data.sources.labels import Source
from data.sources.paths import one_file, public_file, readable

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_WANDS_FILES = ("label.csv", "query.csv", "product.csv")
_ESCI_FILES = ("shopping_queries_dataset_examples.parquet", "shopping_queries_dataset_products.parquet")


class PublicSet(Source):
    """One set and, where it is one file, which and what its columns mean."""

    html: bool = True
    file: str = ""
    format: str = "csv"
    columns: dict[str, str] = Field(default_factory=dict)
    header: tuple[str, ...] = ()
    quotes: bool = True


@cache
def public_set(name: str) -> PublicSet:
    """What `public.toml` says of a set."""
    sets = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return PublicSet.model_validate(sets[name])


def public_files(config: DataConfig) -> list[Path]:
    """The files of the set, those at `config.path` or those in `$ADS_RELEVANCE_DATA`."""
    if config.path is None:
        return [public_file(public_set(config.source_name).file)]
    if config.source_name == "wands":
        return [_in_folder(config.path, "dataset", (name, f"{name}.gz")) for name in _WANDS_FILES]
    if config.source_name == "esci":
        return [_in_folder(config.path, "shopping_queries_dataset", (name,)) for name in _ESCI_FILES]
    return [one_file(config.path)]


def read_public(spark: SparkSession, config: DataConfig) -> DataFrame:
    """The rows of the set; one whose query or product is not there, or there twice, has a `problem`."""
    if config.source_name == "wands":
        return _read_wands(spark, config)
    if config.source_name == "esci":
        return _read_esci(spark, config)
    chosen, (path,) = public_set(config.source_name), public_files(config)
    columns = dict(chosen.columns)
    if config.source_name == "qbqtc":
        with readable(path, "json"):
            columns["grade"] = "relevant" if "relevant" in json_names(path, config.encoding) else "label"
    dialect = Dialect(header=chosen.header, quotes=chosen.quotes)
    return read_columns(spark, path, chosen.format, columns, dialect=dialect, encoding=config.encoding)


def _read_wands(spark: SparkSession, config: DataConfig) -> DataFrame:
    """Labels with their query and product; the files are separated by tabs in spite of their names."""
    label_file, query_file, product_file = public_files(config)

    def read_file(path: Path, columns: dict[str, str]) -> DataFrame:
        return read_columns(spark, path, "tsv", columns, encoding=config.encoding)

    frame = read_file(label_file, {"query_id": "query_id", "product_id": "product_id", "grade": "label"})
    queries = read_file(query_file, {"query_id": "query_id", "query": "query"})
    product = {"ad_title": "product_name", "ad_text": "product_description", "attributes": "product_features"}
    products = read_file(product_file, {"product_id": "product_id"} | product)
    frame = _with_match(frame, queries, ["query_id"], f"its query is not in {query_file.name}")
    return _with_match(frame, products, ["product_id"], f"its product is not in {product_file.name}")


def _read_esci(spark: SparkSession, config: DataConfig) -> DataFrame:
    """The judgements of the locale with their product; brand and colour become attributes."""
    from pyspark.sql import functions as F

    examples_file, products_file = public_files(config)
    keys = {name: name for name in ("product_locale", "product_id")}
    texts = ("product_bullet_point", "product_description", "product_brand", "product_color")
    product = {"ad_title": "product_title"} | {name: name for name in texts}
    frame = read_columns(spark, examples_file, "parquet", {"query": "query", "grade": "esci_label"} | keys)
    products = read_columns(spark, products_file, "parquet", keys | product)
    if config.locale:
        frame, products = (each.where(F.col("product_locale") == config.locale) for each in (frame, products))
    frame = _with_match(frame, products, list(keys), f"its product is not in {products_file.name}")
    named = [
        F.nullif(F.trim(column), F.lit("")).alias(name)
        for name, column in zip(("brand", "colour"), texts[2:], strict=True)
    ]
    return frame.withColumns({"ad_text": F.concat_ws("\n", *texts[:2]), "attributes": F.to_json(F.struct(*named))})


def _with_match(labels: DataFrame, others: DataFrame, keys: list[str], missing: str) -> DataFrame:
    """`labels` with the columns of their match in `others`; without one, or with several, a row gets a `problem`."""
    from pyspark.sql import functions as F

    columns = [name for name in others.columns if name not in (*keys, "problem", "detail")]
    distinct = others.where(F.col("problem").isNull()).select(*keys, *columns).distinct()
    matches = distinct.groupBy(*keys).agg(F.count("*").alias("count"), *[F.first(name).alias(name) for name in columns])
    several = missing.replace(" is not in ", " has different rows in ")
    problem = F.when(F.col("count").isNull(), missing).when(F.col("count") > 1, several)
    detail = F.when(F.col("problem").isNull() & problem.isNotNull(), F.concat_ws(" ", *keys))
    changed = {"detail": F.coalesce("detail", detail), "problem": F.coalesce("problem", problem)}
    return labels.join(matches, keys, "left").withColumns(changed).drop("count")


def _in_folder(folder: Path, inner: str, names: tuple[str, ...]) -> Path:
    for path in [place / name for place in (folder, folder / inner) for name in names]:
        if path.is_file():
            return path
    raise ContractError(f"{folder} has no {names[0]}; set `data.path` to the folder with the published files")
