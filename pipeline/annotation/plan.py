"""Which pairs an annotation job has to do, and in which order: the part of the job that is plain Spark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.dataset as pads

from data.contracts import PAIRS, ContractError, check_schema
from pipeline.annotation.config import AnnotateConfig
from pipeline.annotation.metrics import annotated, hash_sums
from teacher.config import PromptConfig
from teacher.prompt import used_chars

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Row, SparkSession

_LONGEST = 2**20  # bytes; texts beyond this count as equally long


def missing(
    spark: SparkSession, config: AnnotateConfig, prompt: PromptConfig, pairs: Path, out: Path, key: str
) -> tuple[DataFrame, int, int]:
    """The wanted pairs that have no row under `key` yet (the id, and as much text as the prompt uses); how many pairs
    are wanted, and how many of them are missing."""
    from pyspark.sql import functions as F

    source = pairs / "pairs"
    if not source.is_dir():
        raise ContractError(f"{source} does not exist; run data-prepare first")
    check_schema(pads.dataset(source, format="parquet").schema, PAIRS, str(source))
    wanted = spark.read.parquet(str(source)).where(F.col("split") == config.split)
    if config.limit:
        first = wanted.select("pair_id").distinct().orderBy("pair_id").limit(config.limit)
        wanted = wanted.join(first, "pair_id", "left_semi")
    # These passes read the ids alone; the texts are read once, when the job runs.
    done = annotated(spark, out, key).select("pair_id")
    if any(out.glob(f"{key}-*.parquet")):
        sums = _id_sums(wanted)
        if sums["rows"] and sums == _id_sums(done):  # the same ids: known without a join
            return wanted.select("pair_id", *_texts(prompt)).limit(0), sums["rows"], 0
        wanted, ids = wanted.join(done, "pair_id", "left_anti"), wanted.select("pair_id").distinct()
        count, left = ids.count(), ids.join(done, "pair_id", "left_anti").count()
        wanted = wanted.dropDuplicates(["pair_id"])
    else:
        count, repeats = _counted(wanted)
        if repeats:
            wanted = wanted.dropDuplicates(["pair_id"])
            count = wanted.count()
        left = count
    if not count:
        raise ContractError(f"split '{config.split}' of {source} has no pairs; choose another split")
    return wanted.select("pair_id", *_texts(prompt)), count, left


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


def _counted(table: DataFrame) -> tuple[int, bool]:
    """How many rows there are, and whether an id occurs twice; the latter may be wrongly true (a collision of hashes),
    never wrongly false."""
    from pyspark.sql import functions as F

    # Spread first: counting within every task beforehand, as Spark would, gains nothing where hardly an id repeats.
    hashes = table.select(F.xxhash64("pair_id").alias("id")).repartition("id")
    row = hashes.groupBy("id").count().agg(F.sum("count").alias("rows"), F.max("count").alias("most")).first()
    assert row is not None  # an aggregate without groups has one row
    return row["rows"] or 0, (row["most"] or 0) > 1


def _texts(prompt: PromptConfig) -> list[Column]:
    """The columns that the prompt shows, cut to what it can use: a megabyte of title must not travel, and pairs that
    differ only in what is left out have equal columns. Valid UTF-8 afterwards, which Arrow and Python insist on."""
    from pyspark.sql import functions as F

    def cut(column: Column, limit: int) -> Column:
        # Bytes are known, characters must be counted: most texts have no more bytes than they may have characters.
        used = used_chars(limit)
        return F.make_valid_utf8(F.when(F.octet_length(column) <= used, column).otherwise(F.substring(column, 1, used)))

    title, text = prompt.max_title_chars, prompt.max_text_chars
    listed = text or title
    # A list of entries: names that are equal after the cut would be an error in a map. As JSON, which Spark hands to Python
    # faster than lists: in Spark 4.3 a batch whose lists are all null takes 15 µs a row.
    attributes = F.transform(
        F.map_entries("attributes"),
        lambda e: F.struct(cut(e["key"], listed).alias("key"), cut(e["value"], listed).alias("value")),
    )
    attributes = F.to_json(attributes, {"ignoreNullFields": "false"})
    nothing = F.lit(None).cast("string")
    return [
        cut(F.col("query"), title).alias("query"),
        cut(F.col("ad_title"), title).alias("ad_title"),
        (cut(F.col("ad_text"), text) if text else nothing).alias("ad_text"),
        (attributes if prompt.attributes else nothing).alias("attributes"),
    ]
