"""Preparing 10⁵, 10⁶ and 10⁷ generated rows: throughput, memory, and ids and splits that no partitioning changes.

    python -m benchmarks.data_prepare --rows 100000 1000000 10000000 --out /tmp/data-prepare

Each preparation is a process of its own (Spark's start is not timed); memory is the peak of that process and all its
children (JVM and Python workers) by proportional set size. The largest table is prepared once more, with another
number of shuffle partitions and input splits. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

ROWS_PER_FILE = 500_000
ADS_PER_QUERY = 5
SAMPLE_SECONDS = 2.0
PAUSE_SECONDS = 12.0
JAVA_OPTIONS = "-XX:+UseParallelGC"
"""What `SparkConfig.extra` advises for big tables: the full compiler, which the default leaves out for short jobs."""

# Shuffle partitions, and bytes of input that one task reads.
_LAYOUTS = {"usual": (16, 64 << 20), "other": (37, 9 << 20)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--out", type=Path, required=True, help="folder for the input and the prepared tables")
    parser.add_argument("--driver-memory", default="2g")
    parser.add_argument("--repeat", action=argparse.BooleanOptionalAction, default=True, help="the largest once more")
    parser.add_argument("--child", choices=_LAYOUTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        (rows,) = options.rows
        print(json.dumps(prepare_once(options.out, rows, options.child, options.driver_memory)))
        return
    results = []
    for rows in sorted(options.rows):
        make_rows(options.out / f"input-{rows}", rows)
        results.append(_child(options, rows, "usual"))
    if options.repeat:
        results.append(_child(options, max(options.rows), "other"))
    first = [result for result in results if result["layout"] == "usual"]
    print(
        json.dumps({
            "benchmark": "data_prepare",
            "runs": results,
            "speed_of_largest_to_next": round(first[-1]["rows_per_s"] / first[-2]["rows_per_s"], 3)
            if len(first) > 1
            else None,
            "ids_and_splits_equal": results[-1]["ids_and_splits"] == first[-1]["ids_and_splits"],
            "pages_equal": results[-1]["pages"] == first[-1]["pages"],
        })
    )  # fmt: skip


def make_rows(folder: Path, rows: int) -> None:
    """A Parquet folder of labelled pairs: five ads for a query, 2 % repeated with another label, 0.1 % faulty; half of the
    ads have a text. The same rows for the same number, whatever the machine. Nothing is done where the folder is whole."""
    done = folder / "_done"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = pa.array([_word(i) for i in range(6_000)])
    for start in range(0, rows, ROWS_PER_FILE):
        i = np.arange(start, min(start + ROWS_PER_FILE, rows), dtype=np.uint64)
        repeated = i % 50 == 49
        ad = np.where(repeated, i - 1, i)
        query = ad // ADS_PER_QUERY
        grade = (_mixed(ad, 99) + repeated) % 4
        title = _text(words, ad, 9)
        faulty = pa.array(i % 1000 == 500)
        table = pa.table({
            "query": _text(words, query, 3, salt=40),
            "title": pc.if_else(faulty, "", title),
            "text": pc.if_else(pa.array(_mixed(ad, 98) % 2 == 0), _text(words, ad, 24, salt=10), None),
            "label": pa.array(grade.astype(np.int64)),
        })  # fmt: skip
        pq.write_table(table, folder / f"part-{start:010d}.parquet")
    done.write_text("")


def prepare_once(out: Path, rows: int, layout: str, driver_memory: str) -> dict[str, Any]:
    """Prepare the input of `rows` rows; returns seconds, rows/s, peak MiB and digests of what was written."""
    from data.config import DataConfig
    from data.prepare import prepare
    from pipeline.spark import SparkConfig, start_spark

    partitions, split_bytes = _LAYOUTS[layout]
    extra = {
        "spark.sql.files.maxPartitionBytes": str(split_bytes),
        "spark.local.dir": str(out / "spark"),
        "spark.driver.extraJavaOptions": JAVA_OPTIONS,
        "spark.network.timeout": "10h",  # a process that was stopped for a while is no lost executor
    }
    spark = start_spark(SparkConfig(driver_memory=driver_memory, shuffle_partitions=partitions, extra=extra))
    config = DataConfig.model_validate({
        "source": "table",
        "path": out / f"input-{rows}",
        "columns": {"query": "query", "ad_title": "title", "ad_text": "text", "grade": "label"},
        "grades": [{"name": f"grade {k}", "definition": f"Grade {k}."} for k in range(4)],
    })  # fmt: skip
    target = out / f"prepared-{rows}-{layout}"
    target.mkdir(parents=True, exist_ok=True)
    with _PeakMemory() as memory:
        began = time.perf_counter()
        result = prepare(config, target, spark)
        seconds = time.perf_counter() - began - memory.paused
    spark.stop()
    kept = ("rejected", "duplicates", "queries", "conflicting_pairs")
    return {
        "rows": rows,
        "layout": layout,
        "shuffle_partitions": partitions,
        "seconds": round(seconds, 1),
        "paused_s": round(memory.paused),
        "rows_per_s": round(rows / seconds),
        "peak_mib": round(memory.peak / 2**20),
        "fingerprint": result.fingerprint,
        "ids_and_splits": ids_and_splits(target / "pairs"),
        "pages": _pages_digest(target / "pairs"),
        "pairs": result.figures["rows"],
        **{name: result.figures[name] for name in kept},
    }


def ids_and_splits(folder: Path) -> str:
    """Hash of all pair ids with their splits, in the order of the ids."""
    table = pads.dataset(folder, format="parquet").to_table(columns=["pair_id", "split"]).sort_by("pair_id")
    hashed = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=100_000):
        lines = pc.binary_join_element_wise(batch["pair_id"], batch["split"], ",")
        hashed.update("\n".join(lines.to_pylist()).encode())
    return hashed.hexdigest()[:16]


def _pages_digest(folder: Path) -> str:
    """Hash of the files' bytes without their footers, in the order of their partitions.

    A footer lists the encodings of a column in the order of a hash set of the JVM, another one in each process.
    """
    hashed = hashlib.sha256()
    for path in sorted(folder.glob("part-*.parquet"), key=lambda path: path.name.split("-")[1]):
        content = path.read_bytes()
        footer = int.from_bytes(content[-8:-4], "little") + 8
        hashed.update(hashlib.sha256(content[:-footer]).digest())
    return hashed.hexdigest()[:16]


def _child(options: argparse.Namespace, rows: int, layout: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.data_prepare", "--rows", str(rows), "--out", str(options.out)]
    command += ["--driver-memory", options.driver_memory, "--child", layout]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{rows:,} rows, {layout}: {result['seconds']} s, {result['peak_mib']} MiB", file=sys.stderr)
    return result


def _word(i: int) -> str:
    syllables = ("ba", "ke", "lo", "mi", "ru", "sta", "ven", "tor", "pli", "cas", "dro", "fen")
    return syllables[i % 12] + syllables[i // 12 % 12] + syllables[i // 144 % 12] + ("s" if i % 7 == 0 else "")


def _mixed(numbers: Any, salt: int) -> Any:
    """Splitmix64: well-mixed 64-bit integers from consecutive ones."""
    z = numbers + np.uint64(((salt + 1) * 0x9E3779B97F4A7C15) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _text(words: pa.Array, numbers: Any, count: int, salt: int = 0) -> pa.Array:
    parts = [words.take(pa.array(_mixed(numbers, salt + j) % np.uint64(len(words)))) for j in range(count)]
    return pc.binary_join_element_wise(*parts, " ")


class _PeakMemory:
    """The largest memory of this process and its children while the block runs, sampled, and for how long it was `paused`.

    A pause is a gap between two samples that only SIGSTOP explains: on a shared machine all processes of a run can be
    stopped to let others measure, and continued.
    """

    def __enter__(self) -> _PeakMemory:
        self.peak, self.paused = 0, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        last = time.perf_counter()
        while not self._stop.wait(SAMPLE_SECONDS):
            gap = time.perf_counter() - last
            self.paused += gap if gap > PAUSE_SECONDS else 0.0
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue  # it ended meanwhile
            self.peak = max(self.peak, total)
            last = time.perf_counter()


if __name__ == "__main__":
    main()
