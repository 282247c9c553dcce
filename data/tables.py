"""The tables of a prepared folder on disk: writing them, counting them, their fingerprint."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from data.contracts import DISAGREEMENT, FREQUENCIES, PAIRS, RATIONALES, TEXTS, GradeScale, check_schema, digest_bytes
from data.sources.paths import spark_paths

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_COMPANIONS = {"rationales": RATIONALES, "disagreement": DISAGREEMENT, "frequencies": FREQUENCIES, "texts": TEXTS}
_ROWS_PER_FILE = 250_000


def write_tables(pairs: DataFrame, source: str, out: Path, rows: int) -> None:
    """Write `pairs/` and its companions into `out`; `rows` is how many `pairs` are."""
    from pyspark.sql import functions as F

    write_table(pairs.withColumn("source", F.lit(source)).select(*PAIRS.names), out / "pairs", rows)
    with_reason = pairs.where((F.col("split") == "train") & F.col("rationale").isNotNull())
    write_table(with_reason.select("pair_id", F.col("rationale").alias("reasoning")), out / "rationales", rows)
    labelled_often = pairs.where((F.col("n_labels") > 1) | F.col("rating_variance").isNotNull())
    write_table(labelled_often.select(*DISAGREEMENT.names), out / "disagreement", rows)
    if "stratum" in pairs.columns:
        from_log = pairs.where(F.col("frequency").isNotNull())
        write_table(from_log.select(*FREQUENCIES.names), out / "frequencies", rows)


def write_table(frame: DataFrame, folder: Path, rows: int) -> None:
    """Few files, each sorted by pair_id where there is one; which rows share a file depends on their ids alone.

    `rows` is an upper bound of their number.
    """
    files = max(1, -(-rows // _ROWS_PER_FILE))
    if "pair_id" in frame.columns:
        frame = frame.repartition(files, "pair_id").sortWithinPartitions("pair_id")
    else:
        frame = frame.coalesce(files)
    frame.write.mode("overwrite").parquet(f"file://{folder.resolve()}")


def write_texts(texts: Iterable[dict[str, str]], out: Path) -> None:
    """Write `texts/` into `out` when there are any, in their order."""
    shutil.rmtree(out / "texts", ignore_errors=True)
    chunks = iter(texts)
    while chunk := list(islice(chunks, _ROWS_PER_FILE)):
        (out / "texts").mkdir(exist_ok=True)
        number = len(list((out / "texts").iterdir()))
        pq.write_table(pa.Table.from_pylist(chunk, schema=TEXTS), out / "texts" / f"part-{number:05}.parquet")


def materialised(frame: DataFrame, folder: Path) -> DataFrame:
    """`frame` as a table in `folder`, for what is read several times.

    Spark's own cache would fill the memory of a small machine, and keep a plan behind it that every job analyses anew.
    """
    frame.write.mode("overwrite").parquet(f"file://{folder.resolve()}")
    return frame.sparkSession.read.schema(frame.schema).parquet(*spark_paths([folder]))


def count_rows(folder: Path, schema: pa.Schema | None = None) -> int:
    """Rows in the files as they lie there, from their footers; raises `ContractError` when they do not match `schema`."""
    dataset = pads.dataset(folder, format="parquet")
    if schema is not None:
        check_schema(dataset.schema, schema, str(folder))
    return dataset.count_rows()


def companion_rows(out: Path) -> dict[str, int]:
    """Rows of each companion of `pairs`, 0 for one that is not there."""
    return {
        name: count_rows(out / name, schema) if (out / name).exists() else 0 for name, schema in _COMPANIONS.items()
    }


def tables_fingerprints(spark: SparkSession, out: Path, scale: GradeScale, texts: bool = False) -> dict[str, str]:
    """Hashes of the scale and of the tables that training reads, each as a sum of its rows' hashes: order plays no part.
    The texts are among them if `texts`; a made-up shop's follow from its seed.

    `all` is of everything, `labelled` leaves the rows of split pool out: what a teacher learns from and is measured on.
    """
    from pyspark.sql import functions as F

    def hash_sums(name: str, schema: pa.Schema) -> dict[bool, list[int]]:
        # query_id follows from the query, and tables from before there was one keep their fingerprint.
        columns = [column for column in schema.names if column != "query_id"]
        table = spark.read.parquet(*spark_paths([out / name])).select(*columns)
        row_hash = F.sha2(F.to_json(F.struct(*columns)), 256)
        # 2 × 60 bits of each row's hash; the sum of 10¹⁰ rows fits a decimal of 30 digits.
        words = [F.conv(F.substring(row_hash, at, 15), 16, 10).cast("decimal(20,0)") for at in (1, 16)]
        pool = F.col("split") == "pool" if "split" in columns else F.lit(False)
        sums = table.groupBy(pool.alias("pool")).agg(F.count("*").alias("n"), *[F.sum(word) for word in words])
        return {row[0]: [int(number) for number in row[1:]] for row in sums.collect()}

    tables = [hash_sums("pairs", PAIRS), hash_sums("rationales", RATIONALES)]
    if texts:
        tables.append(hash_sums("texts", TEXTS))

    def fingerprint(*parts: bool) -> str:
        lines = [scale.model_dump_json()]
        for sums in tables:
            # An empty table counts as Spark's sums of it print, so that fingerprints on record stay.
            present = [sums[part] for part in parts if part in sums]
            lines.append(" ".join(str(sum(column)) for column in zip(*present, strict=True)) or "0 None None")
        return digest_bytes(["\n".join(lines).encode()])

    return {"all": fingerprint(False, True), "labelled": fingerprint(False)}
