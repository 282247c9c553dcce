"""The annotation job without its engine: pairs per second, driver memory and the cost of a rerun, by the number of pairs.

    python -m benchmarks.annotate_scale TEACHER RECORDING [--sizes 10000 100000 1000000 10000000] [--samples 1]
        [--confidence 0] [--prompts]

The engine replays recorded completions (`python -m benchmarks.replay` makes them); the rest is the product's own code:
anti-join, shuffle, sort, streams, aggregates, Parquet parts, metrics. Every size runs twice, each time in a process and a
Spark session of its own: once from nothing, once with nothing to do. `pairs_per_s` is over the whole of `annotate()`,
from its first line to its last, session start apart; `job_pairs_per_s` over the Spark job alone that makes the
annotations, from its submission (shuffle, sort and the start of the workers included) to its last file. On a local master
the JVM is driver and executor in one; with `--cluster` it runs on Spark standalone with two workers, processes of their
own, and the JVM's memory is the driver's alone. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.children import answer, ask
from benchmarks.replay import load_replay, make_pairs, make_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--samples", type=int, default=1, help="completions of a pair")
    parser.add_argument("--confidence", type=float, default=0.0, help="samples are then 8 at most")
    parser.add_argument("--prompts", action="store_true", help="render and tokenise every pair too")
    parser.add_argument("--max-in-flight", type=int, default=32_768)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--memory", default="1g", help="heap of Spark's JVM, driver and executor in one")
    parser.add_argument("--cluster", action="store_true", help="Spark standalone with two workers, not a local master")
    parser.add_argument("--work", type=Path, help="folder for the tables; a temporary one unless given")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        answer(measure(options, Path(options.side[0]), options.side[1]))
        return
    found = []
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        make_teacher(options.teacher, options.recording, work / "teacher", prompts=options.prompts)
        for size in options.sizes:
            _child(work, f"make-{size}")
            first = _child(work, f"run-{size}")
            again = _child(work, f"rerun-{size}")
            row = {"pairs": size, **first, **{f"rerun_{name}": value for name, value in again.items()}}
            print(f"# {json.dumps(row)}", file=sys.stderr, flush=True)
            found.append(row)
    one, other = found[0], found[-1]
    line: dict[str, Any] = {
        "benchmark": "annotate_scale",
        "samples": options.samples,
        "confidence": options.confidence,
        "prompts": options.prompts,
        "max_in_flight": options.max_in_flight,
        "engines": options.engines,
        "cluster": options.cluster,
        "sizes": found,
    }
    if len(found) > 1:
        # Seconds of the whole job as a power of the number of pairs: 1 is linear.
        line["slope"] = round(math.log(other["seconds"] / one["seconds"]) / math.log(other["pairs"] / one["pairs"]), 3)
    print(json.dumps(line))


def measure(options: argparse.Namespace, work: Path, what: str) -> dict[str, Any]:
    """One step in this process: make the table of a size, annotate it, or annotate it again."""
    begin = time.monotonic()
    step, size = what.rsplit("-", 1)
    with _session(options, work / f"spark-{what}") as spark:
        logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(message)s")
        return _step(options, work, step, size, spark, begin)


@contextmanager
def _session(options: argparse.Namespace, folder: Path) -> Iterator[Any]:
    from pipeline.spark import SparkConfig, start_spark

    # Not the settings of short jobs, which `start_spark` chooses on a local master.
    java = {"spark.driver.extraJavaOptions": "-XX:+UseParallelGC"}
    if not options.cluster:
        yield start_spark(SparkConfig(master="local[2]", driver_memory=options.memory, extra=java))
        return
    from benchmarks.annotate_cluster import cluster_settings, standalone

    with standalone(folder, workers=2) as (master, _):
        spark = start_spark(SparkConfig(master=master, driver_memory=options.memory, extra=java | cluster_settings()))
        yield spark
        spark.stop()


def _step(options: argparse.Namespace, work: Path, step: str, size: str, spark: Any, begin: float) -> dict[str, Any]:
    from pipeline.annotation.config import AnnotateConfig
    from pipeline.annotation.job import annotate
    from teacher.prompt import load_prompt

    started = time.monotonic()
    pairs, out = work / f"pairs-{size}", work / f"annotations-{size}"
    if step == "make":
        make_pairs(spark, int(size), pairs)
        load_prompt(work / "teacher").scale.save(pairs)
        return {}
    # Few enough files that every size from 10^5 on merges them: memory is compared between jobs that do the same.
    config = AnnotateConfig(
        n=options.samples, confidence=options.confidence, max_in_flight=options.max_in_flight, engines=options.engines,
        max_files=10, min_ok_share=0,
    )  # fmt: skip
    rates: list[float] = []
    logging.getLogger("pipeline.annotation.job").addFilter(lambda record: _note(record, rates))
    metrics = annotate(config, work / "teacher", pairs, out, spark, load_replay).figures
    done = time.monotonic()
    if metrics["pairs"] != int(size) or metrics["n_new"] != (int(size) if step == "run" else 0):
        raise SystemExit(f"the job made the wrong number of rows: {metrics}")
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    assert spark.sparkContext._gateway is not None
    jvm.java.lang.System.gc()
    heap = jvm.java.lang.Runtime.getRuntime()
    live = heap.totalMemory() - heap.freeMemory()
    peak = Path(f"/proc/{spark.sparkContext._gateway.proc.pid}/status").read_text(encoding="utf-8")  # type: ignore[attr-defined]
    jvm_kib = next(int(line.split()[1]) for line in peak.splitlines() if line.startswith("VmHWM"))
    return {
        "seconds": round(done - started, 2),
        "pairs_per_s": round(int(size) / (done - started)),
        "job_pairs_per_s": round(rates[-1]) if rates else None,
        "with_start_s": round(done - begin, 2),
        "driver_python_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "jvm_live_heap_mib": round(live / 2**20, 1),
        "jvm_peak_mib": round(jvm_kib / 1024, 1),
        "files": len(list(out.glob("[!_]*.parquet"))),
    }


def _note(record: logging.LogRecord, rates: list[float]) -> bool:
    """Keep the rate in a line of progress: pairs by now over seconds since the job was submitted."""
    if str(record.msg).startswith("annotate: %d of"):
        assert isinstance(record.args, tuple)
        rates.append(float(record.args[3]))  # type: ignore[arg-type]
    return True


def _child(work: Path, what: str) -> dict[str, Any]:
    arguments = [argument for argument in sys.argv[1:] if argument]
    return ask("benchmarks.annotate_scale", *arguments, "--side", str(work), what, environment={})


if __name__ == "__main__":
    main()
