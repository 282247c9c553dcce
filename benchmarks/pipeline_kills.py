"""kill -9 at random moments of the whole pipeline, with the MLflow server down for a part of it: is everything there once?

    python -m benchmarks.pipeline_kills OUT [--kills 10] [--seed 0] [--set key=value ...]

Runs `prefect run relevance-pipeline --preset sample` into OUT, tracked by a real `mlflow server` on SQLite. After a random
pause the flow is killed with all its children and started again; between two of the kills the server is dead. After the last
run, which is left in peace, it counts: stages that completed, pool pairs without or with two annotations, executions that
have no run or two in MLflow, runs whose status or metrics differ from the run's folder, registered versions. Prints one
JSON line; exits 1 when something is missing or there twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads

from benchmarks.children import TORCH
from data.contracts import ANNOTATIONS, PAIRS, metric_lines, read_table

RUN = "killed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--longest", type=float, default=120.0, help="seconds before a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    draw = random.Random(options.seed)
    port = _free_port()
    server: subprocess.Popen[bytes] | None = _start_server(options.out, port)
    command = _command(options.out, port, options.settings)
    down = set(range(options.kills // 3, options.kills // 3 + 3))  # the kills around which no server answers
    killed = 0
    try:
        while killed < options.kills:
            if killed in down and server is not None:
                _kill(server)
                server = None
            elif killed not in down and server is None:
                server = _start_server(options.out, port)
            process = _start(command, options.out / "flow.log")
            pause = draw.uniform(5, options.longest)
            try:
                process.wait(pause)
            except subprocess.TimeoutExpired:
                _kill(process)
                killed += 1
                print(f"# kill {killed} after {pause:.0f} s, server {'up' if server else 'down'}", file=sys.stderr)
                continue
            break  # it has completed: nothing is left to disturb
        server = server or _start_server(options.out, port)
        last = _start(command, options.out / "flow.log").wait()
        counts = count(options.out / RUN, f"http://127.0.0.1:{port}")
    finally:
        if server is not None:
            _kill(server)
    holds = last == 0 and not any(counts["faults"].values())
    line = {
        "benchmark": "pipeline_kills",
        "kills": killed,
        "seed": options.seed,
        "exit": last,
        **counts,
        "holds": holds,
    }
    print(json.dumps(line))
    if not holds:
        raise SystemExit(1)


def count(folder: Path, uri: str) -> dict[str, Any]:
    """What the run's folder and MLflow hold, and the `faults`: all 0 when everything is there exactly once."""
    from mlflow import MlflowClient

    from pipeline.executions import read_executions

    pool = read_table(folder / "pairs" / "pairs", PAIRS, columns=["pair_id"], where=pads.field("split") == "pool")
    rows = read_table(folder / "annotations", ANNOTATIONS, columns=["pair_id", "annotation_key"])
    annotated = Counter(rows["pair_id"].to_pylist())
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=5000)
    by_execution = Counter(run.data.tags.get("execution", "") for run in runs)
    status = {run.data.tags.get("execution", ""): run for run in runs}
    executions = [each for each in read_executions(folder) if each.name != "flow" or each.tracking["enabled"]]
    finished = [each for each in executions if each.status == "FINISHED"]
    lost_points = 0
    for each in finished:
        lines = metric_lines(folder / each.folder / "metrics.jsonl")
        lines = [line for line in lines if each.started_at <= line["time"] <= (each.ended_at or 0)]
        for phase, name, points in _curves(lines):
            run = status.get(each.execution)
            stored = client.get_metric_history(run.info.run_id, f"{phase}/{name.replace('@', '_at_')}") if run else []
            lost_points += points != len(stored)
    faults = {
        "stages_missing": sum(
            not (folder / name / "_stage.json").exists()
            for name in ("pairs", "teacher", "annotations", "student", "export")
        ),
        "pairs_missing": len(set(pool["pair_id"].to_pylist()) - set(annotated)),
        "pairs_twice": sum(number > 1 for number in annotated.values()),
        "executions_without_run": sum(not by_execution[each.execution] for each in executions),
        "executions_with_two_runs": sum(by_execution[each.execution] > 1 for each in executions),
        "runs_of_no_execution": sum(number for name, number in by_execution.items() if not name),
        "status_differs": sum(
            each.execution in status and status[each.execution].info.status != each.status for each in executions
        ),
        "curves_differ": lost_points,
        "versions_missing_or_twice": sum(
            len(client.search_model_versions(f"name = 'ads-relevance-{role}'")) != 1 for role in ("teacher", "student")
        ),
    }
    by_status = Counter(each.status for each in executions)
    return {"pairs": len(pool), "runs": len(runs), "executions": dict(by_status), "faults": faults}


def _curves(lines: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    points: Counter[tuple[str, str]] = Counter()
    for line in lines:
        points.update((line["phase"], name) for name in line if name not in ("phase", "step", "time"))
    return [(phase, name, number) for (phase, name), number in points.items()]


def _command(out: Path, port: int, settings: list[str]) -> list[str]:
    prefect = str(Path(sys.executable).with_name("prefect"))
    chosen = [f"tracking.uri=http://127.0.0.1:{port}", *settings]
    words = [word for setting in chosen for word in ("--set", setting)]
    return [prefect, "run", "relevance-pipeline", "--preset", "sample", "--name", RUN, "--runs", str(out), *words]


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | TORCH
        )


def _start_server(out: Path, port: int) -> subprocess.Popen[bytes]:
    place = out.resolve()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{place / 'mlflow.db'}",
        "--artifacts-destination",
        str(place / "mlartifacts"),
    ]
    server = _start(command, out / "server.log")
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.2)
    raise SystemExit(f"the MLflow server did not start: see {out / 'server.log'}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
