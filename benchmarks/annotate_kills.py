"""kill -9 at random moments of the annotation job, rerun to the end: is every pair there once, and what was done twice?

    python -m benchmarks.annotate_kills TEACHER RECORDING [--kills 20] [--seed 0]

Every run is a process of its own with a Spark session over two engines that replay recorded completions at a fixed speed
(an engine lives in its Python worker, so killing one kills the other). Each time a victim is drawn (the driver, its JVM,
or one of the Python workers) and a moment: a quarter of them anywhere from the start of the process on, the others while
engines are at work. Engines note every prompt that they complete, so `recomputed` is counted, not estimated. At the end
the table is compared, id for id, with that of an undisturbed run. Prints one JSON line; exits 1 when it does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.replay import load_replay, make_pairs, make_teacher

VICTIMS = ("driver", "jvm", "worker")
_ENGINES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--max-in-flight", type=int, default=1024)
    parser.add_argument("--speed", type=float, default=1000.0, help="pairs per second of an engine")
    parser.add_argument("--confidence", type=float, default=0.0, help="2 to 8 samples a pair, else 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        step, folder, out = options.side
        run(step, Path(folder), Path(out), options.pairs, options.max_in_flight, options.confidence)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = prove(
            options.teacher, options.recording, Path(folder),
            kills=options.kills, pairs=options.pairs, max_in_flight=options.max_in_flight, speed=options.speed,
            seed=options.seed, confidence=options.confidence,
        )  # fmt: skip
    print(json.dumps({"benchmark": "annotate_kills", **found}))
    if not found["holds"]:
        raise SystemExit(1)


def prove(
    teacher: Path,
    recording: Path,
    work: Path,
    *,
    kills: int,
    pairs: int,
    max_in_flight: int,
    speed: float,
    seed: int,
    confidence: float,
) -> dict[str, Any]:
    """Kill and rerun in the folder `work`; the counts, and whether everything `holds`."""
    draw = random.Random(seed)
    log = work / "log"
    log.mkdir()
    make_teacher(teacher, recording, work / "slow", pairs_per_s=speed, log=str(log))
    make_teacher(teacher, recording, work / "fast")
    sides = {"pairs": pairs, "max_in_flight": max_in_flight, "confidence": confidence}
    _finish(_start("make", work, work / "calm", **sides))
    _finish(_start("fast", work, work / "calm", **sides))
    killed: Counter[str] = Counter()
    most = ended = before = 0
    while killed.total() < kills:
        done = _completed(log)
        victim = VICTIMS[killed.total() % len(VICTIMS)]
        process = _start("slow", work, work / "rough", **sides)
        if not draw.randrange(4):
            time.sleep(draw.uniform(0, 15))
        else:
            while _completed(log) == done and process.poll() is None:
                time.sleep(0.05)
            time.sleep(draw.uniform(0, 4))
        if process.poll() is not None:
            ended += 1
            if ended > 2:
                break  # nothing is left to disturb
            continue
        if _kill(process, victim, draw):
            killed[victim] += 1
        process.wait(timeout=300)
        if draw.random() < 0.5:
            _wait_for_the_rest(work)  # else the next run starts while processes of this one may still be at work
        wasted = _completed(log) - rows_in(work / "rough")
        most, before = max(most, wasted - before), wasted
        print(f"# kill {killed.total()}: {victim}, {wasted} completed in vain so far", file=sys.stderr, flush=True)
    _finish(_start("slow", work, work / "rough", **sides))
    wrong = compare(work / "calm", work / "rough")
    found = {
        "kills": dict(killed),
        "pairs": pairs,
        "max_in_flight": max_in_flight,
        "engines": _ENGINES,
        "confidence": confidence,
        **wrong,
        "recomputed": _completed(log) - pairs,
        "most_recomputed_by_a_kill": most,
        "bound_for_a_kill": max_in_flight * _ENGINES,
        "seed": seed,
    }
    return found | {"holds": not any(wrong.values()) and killed.total() == kills and most <= max_in_flight * _ENGINES}


def run(step: str, work: Path, out: Path, pairs: int, max_in_flight: int, confidence: float) -> None:
    """In a process of its own: make the table of pairs, or annotate it with the slow or the fast teacher."""
    from data.contracts import ContractError
    from pipeline.annotation.config import AnnotateConfig
    from pipeline.annotation.job import annotate
    from pipeline.spark import SparkConfig, start_spark
    from teacher.prompt import load_prompt

    spark = start_spark(SparkConfig(master=f"local[{_ENGINES}]"))
    if step == "make":
        make_pairs(spark, pairs, work / "pairs")
        load_prompt(work / "slow").scale.save(work / "pairs")
        return
    try:
        annotate(
            AnnotateConfig(
                n=2 if confidence else 1, confidence=confidence, max_in_flight=max_in_flight, engines=_ENGINES
            ),
            work / step,
            work / "pairs",
            out,
            spark,
            load_replay,
        )
    except ContractError as error:
        raise SystemExit(f"error: {error}") from None


def _start(step: str, work: Path, out: Path, **options: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.annotate_kills", "-", "-", "--side", step, str(work), str(out)]
    command += [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with (work / "output.log").open("ab") as output:
        # A process group and a mark of its own, by which what outlives it is found.
        environment = dict(os.environ, ANNOTATE_KILLS=str(work))
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit("an undisturbed run failed; see output.log in its folder")


def _kill(process: subprocess.Popen[bytes], victim: str, draw: random.Random) -> bool:
    """kill -9 of one process of the job; False when there is none of that kind (yet)."""
    driver = psutil.Process(process.pid)
    if victim == "driver":
        driver.kill()
        return True
    if victim == "jvm":
        found = [child for child in driver.children(recursive=True) if _what(child)[:1] == ["java"]]
    else:
        found = python_workers(driver)
    if not found:
        driver.kill()  # the draw was too early for another victim
        return True
    draw.choice(found).kill()
    return True


def python_workers(ancestor: psutil.Process) -> list[psutil.Process]:
    """Spark's Python workers below a process, each with its engine: forked by a daemon with the same command line."""
    children = ancestor.children(recursive=True)
    daemons = {child.pid for child in children if "pyspark.daemon" in _what(child)}
    return [child for child in children if _parent(child) in daemons]


def _what(process: psutil.Process) -> list[str]:
    """Name and arguments; empty for a process that has ended."""
    try:
        return [process.name(), *process.cmdline()]
    except psutil.Error:
        return []


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def _wait_for_the_rest(work: Path) -> None:
    """Wait until the processes of a killed run have ended by themselves."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(_environment(process).get("ANNOTATE_KILLS") == str(work) for process in psutil.process_iter()):
            return
        time.sleep(0.2)
    raise SystemExit("a process of a killed run lives on")


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _completed(log: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in log.iterdir())


def compare(calm: Path, rough: Path) -> dict[str, int]:
    """Rows of `calm` that `rough` misses, rows that `rough` has twice, and rows that differ (but for their time)."""
    expected, found = dict(_table(calm)), list(_table(rough))
    counts = Counter(pair_id for pair_id, _ in found)
    return {
        "missing": len(expected.keys() - counts.keys()),
        "duplicates": sum(count - 1 for count in counts.values()),
        "different": sum(expected.get(pair_id) != content for pair_id, content in found),
    }


def rows_in(out: Path) -> int:
    """Committed rows of a folder."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(file).num_rows for file in out.glob("[!_]*.parquet"))


def _table(out: Path) -> Iterator[tuple[str, str]]:
    """Each row's id, and all of its content but the time."""
    import pyarrow.parquet as pq

    for file in out.glob("[!_]*.parquet"):
        for row in pq.read_table(file).drop_columns(["created_at"]).to_pylist():
            yield row["pair_id"], json.dumps(row)


if __name__ == "__main__":
    main()
