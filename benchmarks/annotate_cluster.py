"""The annotation job on a Spark standalone cluster, one of whose workers is killed; and over two vLLM servers, likewise.

    python -m benchmarks.annotate_cluster workers TEACHER RECORDING
    python -m benchmarks.annotate_cluster servers TEACHER PAIRS

`workers`: a master and two workers, each a process of its own with executors of its own. When a fifth of the pairs is done,
one worker is killed with -9, executor and all. `servers`: two `vllm serve` over the teacher; when a fifth is done, one is
killed with -9. Either way the job must end by itself with the rows of an undisturbed run. Prints one JSON line; exits 1
when it does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyspark

from benchmarks.annotate_kills import compare, rows_in
from benchmarks.replay import load_replay, make_pairs, make_teacher
from pipeline.annotation.config import AnnotateConfig
from pipeline.annotation.job import annotate
from pipeline.spark import SparkConfig, spark_session, start_spark
from teacher.engines.config import ServerConfig
from teacher.prompt import load_prompt

_ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("workers", "servers"))
    parser.add_argument("teacher", type=Path)
    parser.add_argument("source", type=Path, help="the recording, or the folder of pairs")
    parser.add_argument("--pairs", type=int, default=0, help="20,000 for workers and 600 for servers unless given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prove = kill_a_worker if options.what == "workers" else kill_a_server
        found = prove(options.teacher, options.source, Path(folder), options.pairs or prove.__defaults__[0])  # type: ignore[index]
    print(json.dumps({"benchmark": f"annotate_cluster {options.what}", **found}))
    if not found["holds"]:
        raise SystemExit(1)


def kill_a_worker(teacher: Path, recording: Path, work: Path, pairs: int = 20_000) -> dict[str, Any]:
    """Annotate on a master and two workers, of which one is killed; the counts, and whether it `holds`."""
    make_teacher(teacher, recording, work / "teacher")
    make_teacher(teacher, recording, work / "slow", pairs_per_s=1000)
    config = AnnotateConfig(n=1, max_in_flight=512, engines=2)
    with spark_session(SparkConfig()) as spark:
        make_pairs(spark, pairs, work / "pairs")
        load_prompt(teacher).scale.save(work / "pairs")
        annotate(config, work / "teacher", work / "pairs", work / "calm", spark, load_replay)
    with standalone(work / "spark", workers=2) as (master, workers):
        spark = start_spark(SparkConfig(master=master, extra=cluster_settings()))
        context = spark.sparkContext._jsc.sc()  # type: ignore[union-attr]
        wait_until(lambda: context.getExecutorMemoryStatus().size() >= 3, 120)  # the driver is one of them
        victim = workers[0]
        killer = _when(lambda: rows_in(work / "rough") > pairs / 5, lambda: os.killpg(victim.pid, signal.SIGKILL))
        try:
            annotate(config, work / "slow", work / "pairs", work / "rough", spark, load_replay)
        finally:
            spark.stop()
        killer.join()
    found = compare(work / "calm", work / "rough")
    killed = victim.poll() is not None
    return found | {"pairs": pairs, "killed": killed, "holds": killed and not any(found.values())}


def kill_a_server(teacher: Path, pairs: Path, work: Path, count: int = 600) -> dict[str, Any]:
    """Annotate over two vLLM servers, of which one is killed; the counts, and whether it `holds`."""
    urls, servers = zip(*[start_server(teacher, work / f"server-{i}.log") for i in range(2)], strict=True)
    try:
        for url, server in zip(urls, servers, strict=True):
            wait_until(lambda url=url, server=server: _answers(url, server), 400)  # type: ignore[misc]
        engine = ServerConfig(urls=urls, retries=2, max_model_len=512, concurrency=32)
        config = AnnotateConfig(n=1, max_in_flight=128, limit=count, engine=engine)
        killer = _when(lambda: rows_in(work / "out") > count / 5, lambda: os.killpg(servers[0].pid, signal.SIGKILL))
        with spark_session(SparkConfig()) as spark:
            metrics = annotate(config, teacher, pairs, work / "out", spark).figures
        killer.join()
        killed = servers[0].wait(10) is not None
    finally:
        for server in servers:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
    found = {name: metrics[name] for name in ("pairs", "ok", "unparsed", "failed", "pairs_per_s")}
    ids = _ids(work / "out")
    holds = killed and metrics["pairs"] == len(ids) == len(set(ids)) == count and not metrics["failed"]
    return found | {"killed": killed, "different_ids": len(set(ids)), "holds": holds}


@contextmanager
def standalone(folder: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A Spark master and workers of one core each, as processes of this machine; the master's URL, and the workers."""
    folder.mkdir()
    port = free_port()
    master = f"spark://127.0.0.1:{port}"
    started = [_spark("master.Master", folder / "master.log", "--host", "127.0.0.1", "--port", str(port))]
    try:
        wait_until(lambda: _listens(port), 60)
        for number in range(workers):
            place = ("--host", "127.0.0.1", "--cores", "1", "--memory", "1g", "--work-dir", str(folder / f"w{number}"))
            started.append(_spark("worker.Worker", folder / f"worker-{number}.log", *place, master))
        yield master, started[1:]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def cluster_settings() -> dict[str, str]:
    """Spark's own settings for `standalone`: one executor for each worker, on loopback, with this checkout's code."""
    return {
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.executor.cores": "1",
        "spark.executor.memory": "512m",
        "spark.executorEnv.PYTHONPATH": str(_ROOT),
        "spark.executorEnv.OMP_WAIT_POLICY": "passive",
    }


def start_server(model: Path, log: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """A vLLM server over a model folder; its URL, and its process (a group of its own)."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32"]
    command += ["--max-model-len", "512", "--no-enable-chunked-prefill"]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    environment = os.environ | quiet | {"OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    return f"http://127.0.0.1:{port}/v1", process


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def wait_until(ready: Callable[[], bool], seconds: float) -> None:
    """Return when `ready()` is true; raises `TimeoutError` when that takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready after {seconds:g} s")
        time.sleep(0.1)


def _spark(what: str, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    home = Path(pyspark.__file__).parent
    command = [str(home / "bin" / "spark-class"), f"org.apache.spark.deploy.{what}", "--webui-port", "0", *arguments]
    environment = os.environ | {"SPARK_HOME": str(home), "SPARK_DAEMON_MEMORY": "256m", "SPARK_LOCAL_IP": "127.0.0.1"}
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def _when(ready: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Do something in the background as soon as something holds."""

    def run() -> None:
        wait_until(ready, 600)
        act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def _answers(url: str, server: subprocess.Popen[bytes]) -> bool:
    if server.poll() is not None:
        raise SystemExit(f"the server of {url} ended before it was ready")
    try:
        urllib.request.urlopen(f"{url}/models", timeout=2).close()
    except OSError:
        return False
    return True


def _ids(out: Path) -> list[str]:
    import pyarrow.parquet as pq

    return [
        pair_id
        for file in out.glob("[!_]*.parquet")
        for pair_id in pq.read_table(file, columns=["pair_id"])["pair_id"].to_pylist()
    ]


if __name__ == "__main__":
    main()
