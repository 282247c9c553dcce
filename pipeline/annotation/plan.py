"""Which pairs an annotation job has to do, and in which order: the part of the job that is plain Spark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.dataset as pads

from data.contracts import PAIRS, ContractError, check_schema, read_table
from pipeline.annotation.config import AnnotateConfig
from pipeline.annotation.metrics import hash_sums
from pipeline.rows import attributes_as_json
from teacher.config import PromptConfig
from teacher.prompt import used_chars

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Row, SparkSession

_LONGEST = 2**20  # bytes; texts beyond this count as equally long


def chosen_pairs(spark: SparkSession, config: AnnotateConfig, pairs: Path) -> DataFrame:
    """The pairs that `config` names; raises `ContractError` when there is no table of pairs, or none of them is meant."""
    from pyspark.sql import functions as F

    source = pairs / "pairs"
    if not source.is_dir():
        raise ContractError(f"{source} does not exist; run data-prepare first")
    check_schema(pads.dataset(source, format="parquet").schema, PAIRS, str(source))
    chosen = spark.read.parquet(str(source)).where(F.col("split") == config.split)
    if chosen.isEmpty():
        raise ContractError(f"split '{config.split}' of {source} has no pairs; choose another split")
    if config.limit:
        first = chosen.select("pair_id").distinct().orderBy("pair_id").limit(config.limit)
        chosen = chosen.join(first, "pair_id", "left_semi")
    return chosen


def measured_ids(config: AnnotateConfig, pairs: Path) -> dict[str, list[str]]:
    """The ids of the labelled pairs that the teacher is measured on, for the splits `valid` and `test`."""
    ids = {}
    for split, limit in (("valid", config.valid_pairs), ("test", config.test_pairs)):
        where = (pads.field("split") == split) & pads.field("grade").is_valid()
        found = read_table(pairs / "pairs", PAIRS, columns=["pair_id"], where=where)["pair_id"]
        ids[split] = sorted(found.to_pylist())[:limit]
    return ids


def pairs_of(spark: SparkSession, pairs: Path, ids: Sequence[str]) -> DataFrame:
    """The pairs with these ids."""
    from pyspark.sql import functions as F

    return spark.read.parquet(str(pairs / "pairs")).where(F.col("pair_id").isin(list(ids)))


def missing(meant: DataFrame, done: DataFrame | None, prompt: PromptConfig) -> tuple[DataFrame, int, int]:
    """Those of the pairs `meant` whose id is not in `done` (the id, and as much text as the prompt uses), how many pairs are
    meant, and how many of them are missing."""
    todo = meant.select("pair_id", *_texts(prompt))
    # These passes read the ids alone; the texts are read once, when the job runs.
    done = done.select("pair_id") if done is not None else None
    sums = _id_sums(meant)
    if done is not None and sums == _id_sums(done):  # the same ids: known without a join
        return todo.limit(0), sums["rows"], 0
    # Spread first: removing repeats within every task beforehand, as Spark would, gains nothing where hardly an id repeats.
    ids = meant.select("pair_id").repartition("pair_id").distinct()
    total = left = ids.count()
    if total < sums["rows"]:
        todo = todo.dropDuplicates(["pair_id"])
    if done is not None:
        todo, left = todo.join(done, "pair_id", "left_anti"), ids.join(done, "pair_id", "left_anti").count()
    return todo, total, left


def in_order(todo: DataFrame, partitions: int) -> DataFrame:
    """`todo` in so many partitions, each in the order in which it is to be annotated."""
    from pyspark.sql import functions as F

    # Equal texts meet in one partition, side by side, and are generated once. Longest first: what does not fit shows at
    # once, and prompts in flight are of like length. By id in the end: the parts are the same for every try. Length and
    # text make one number, which Spark sorts several times faster than the texts themselves.
    length = F.octet_length("query") + F.octet_length("ad_title") + F.coalesce(F.octet_length("ad_text"), F.lit(0))
    shortness = (_LONGEST - F.least(length, F.lit(_LONGEST))).cast("bigint")
    text = F.pmod(F.xxhash64("query", "ad_title", "ad_text"), F.lit(2**40))
    return (
        todo.repartition(partitions, "query", "ad_title")
        .withColumn("place", shortness * 2**40 + text)
        .sortWithinPartitions("place", "pair_id")
        .drop("place")
    )


def _id_sums(table: DataFrame) -> Row:
    """How many `rows` there are, and hashes of their ids added up: equal for equal ids in any order."""
    from pyspark.sql import functions as F

    row = table.agg(F.count("*").alias("rows"), *hash_sums("pair_id")).first()
    assert row is not None  # an aggregate without groups has one row
    return row


def _texts(prompt: PromptConfig) -> list[Column]:
    """The columns that the prompt shows, cut to what it can use: a megabyte of title must not travel, and pairs that
    differ only in what is left out have equal columns. Valid UTF-8 afterwards, which Arrow and Python insist on."""
    from pyspark.sql import functions as F

    def cut(column: Column, limit: int) -> Column:
        # Bytes are known, characters must be counted: most texts have no more bytes than they may have characters.
        used = used_chars(limit)
        return F.make_valid_utf8(F.when(F.octet_length(column) <= used, column).otherwise(F.substring(column, 1, used)))

    title, text = prompt.max_title_chars, prompt.max_text_chars
    nothing = F.lit(None).cast("string")
    attributes = attributes_as_json(lambda column: cut(column, text or title))
    return [
        cut(F.col("query"), title).alias("query"),
        cut(F.col("ad_title"), title).alias("ad_title"),
        (cut(F.col("ad_text"), text) if text else nothing).alias("ad_text"),
        (attributes if prompt.attributes else nothing).alias("attributes"),
    ]
