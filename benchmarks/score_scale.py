"""Scoring whole tables with an exported student: pairs per second and memory by the number of pairs, and what a kill costs.

    python -m benchmarks.score_scale EXPORT [--sizes 100000 1000000] [--precision int8]

Every size is scored by a process and a Spark session of its own, then once more with nothing to do. The largest is scored a
second time into another folder, killed with -9 (driver, JVM and Python workers) when half of its rows are there, and
started again: every pair must be there once and have the same score, whatever shared its batch. Memory is the peak of
each kind of process, read twice a second; on a local master the JVM is driver and executor in one. Prints one JSON line;
exits 1 when a pair is missing, twice, or has two scores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.annotate_kills import python_workers, rows_in
from benchmarks.replay import make_pairs

CORES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--precision", choices=["fp32", "int8"], default="int8")
    parser.add_argument("--memory", default="1g", help="heap of Spark's JVM, driver and executor in one")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        step, pairs, out = options.side
        side(options, step, Path(pairs), Path(out))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for size in options.sizes:
            pairs, out = work / f"pairs-{size}", work / f"scores-{size}"
            _run("make", pairs, str(size))
            row = {"pairs": size, **_run("score", pairs, str(out))}
            again = _run("score", pairs, str(out))
            row["rerun_seconds"], row["rerun_scored"] = again["seconds"], again["rows_new"]
            print(f"# {json.dumps(row)}", file=sys.stderr, flush=True)
            found.append(row)
        rough = work / "rough"
        _run("score", pairs, str(rough), kill_at=size // 2)
        killed_at = rows_in(rough)
        resumed = _run("score", pairs, str(rough))
        wrong = compare(out, rough)
    kill = {"rows_there": killed_at, "scored_after": resumed["rows_new"], **wrong}
    line = {"benchmark": "score_scale", "precision": options.precision, "cores": CORES, "sizes": found, "kill": kill}
    print(json.dumps(line))
    if wrong["missing"] or wrong["twice"] or wrong["largest_difference"] > 1e-6:
        raise SystemExit(1)


def side(options: argparse.Namespace, step: str, pairs: Path, out: Path) -> None:
    """In a process of its own: make a table of pairs, or score it and leave the figures beside it."""
    from pipeline.score import score
    from pipeline.spark import SparkConfig, start_spark
    from student.config import ScoreConfig

    spark = start_spark(SparkConfig(master=f"local[{CORES}]", driver_memory=options.memory))
    if step == "make":
        make_pairs(spark, int(str(out)), pairs)
        return
    # One thread for each task: Spark's two tasks fill the two cores.
    config = ScoreConfig(precision=options.precision, threads=1, splits=["pool"])
    figures = score(config, options.export, pairs, out, spark).figures
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    jvm.java.lang.System.gc()
    heap = jvm.java.lang.Runtime.getRuntime()
    figures["jvm_live_heap_mib"] = round((heap.totalMemory() - heap.freeMemory()) / 2**20, 1)
    out.with_suffix(".json").write_text(json.dumps(figures), encoding="utf-8")


def compare(calm: Path, rough: Path) -> dict[str, Any]:
    """Pairs of `calm` that `rough` lacks or has twice, and the largest difference of a probability."""
    import pandas as pd

    a, b = (pd.read_parquet(out, columns=["pair_id", "p_relevant"]).set_index("pair_id") for out in (calm, rough))
    moved = (a - b[~b.index.duplicated()]).abs()["p_relevant"]
    return {
        "missing": len(a.index.difference(b.index)),
        "twice": int(b.index.duplicated().sum()),
        "largest_difference": float(moved.max()),
    }


def _run(step: str, pairs: Path, out: str, kill_at: int = 0) -> dict[str, Any]:
    """A step in a process of its own: its figures and the peak memory of its kinds of processes, in MiB."""
    command = [sys.executable, "-m", "benchmarks.score_scale", *sys.argv[1:], "--side", step, str(pairs), out]
    peaks = {"driver_python": 0, "jvm": 0, "python_worker": 0}
    with subprocess.Popen(command, start_new_session=True) as process:
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(0.5)
            kinds = {"driver_python": [driver], "python_worker": python_workers(driver)}
            kinds["jvm"] = [child for child in driver.children() if _name(child) == "java"]
            for kind, members in kinds.items():
                peaks[kind] = max([peaks[kind], *map(_resident, members)])
            if kill_at and rows_in(Path(out)) >= kill_at:
                os.killpg(process.pid, signal.SIGKILL)
                return {}
    if process.returncode:
        raise SystemExit(f"the step {step} failed: see above")
    if step == "make":
        return {}
    figures = json.loads(Path(out).with_suffix(".json").read_text(encoding="utf-8"))
    memory = {f"{kind}_peak_mib": round(peak / 2**20, 1) for kind, peak in peaks.items()}
    names = ("seconds", "pairs_per_second", "rows_new", "jvm_live_heap_mib")
    return {name: figures[name] for name in names} | memory


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


if __name__ == "__main__":
    main()
