"""How Spark is started: with this interpreter, quietly, and with a clear refusal where it cannot be."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from data.contracts import ContractError
from pipeline.spark import SparkConfig, start_spark, use_assigned_gpu


def test_no_java_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ContractError, match="needs Java"):
        start_spark(SparkConfig())
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ContractError, match="JAVA_HOME"):
        start_spark(SparkConfig())


@pytest.mark.parametrize("change", [{"driver_memory": "much"}, {"driver_memory": "0g"}, {"shuffle_partitions": 0}])
def test_settings_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SparkConfig.model_validate(change)


@pytest.mark.parametrize(
    ("assigned", "workers", "seen"), [({}, 2, "5"), ({}, 1, "4,5"), ({"gpu": SimpleNamespace(addresses=["1"])}, 2, "1")]
)
def test_each_worker_sees_its_gpu(
    assigned: dict[str, Any], workers: int, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(resources=lambda: assigned, partitionId=lambda: 3)
    monkeypatch.setattr("pyspark.TaskContext.get", lambda: context)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    use_assigned_gpu(workers)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.spark
def test_the_session_is_as_asked(spark: Any) -> None:
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    assert spark.conf.get("spark.pyspark.python") == sys.executable
    assert spark.conf.get("spark.driver.bindAddress") == "127.0.0.1"
    assert spark.sparkContext.uiWebUrl is None
    rows = spark.range(2).mapInArrow(lambda batches: batches, "id long").collect()
    assert [row["id"] for row in rows] == [0, 1]


@pytest.mark.spark
def test_a_bad_master_is_one_sentence_and_a_session_prints_nothing(tmp_path: Path) -> None:
    """In a locale that knows ASCII only, with names that are not."""
    folder = tmp_path / "größe 日本"
    folder.mkdir()
    (folder / "é.txt").write_text("a line\n")
    code = """
import sys
from pathlib import Path
from data.contracts import ContractError
from pipeline.spark import SparkConfig, start_spark
try:
    start_spark(SparkConfig(master="nonsense"))
except ContractError as error:
    print("refused:", str(error).count("\\n"), "nonsense" in str(error), flush=True)
print("--", file=sys.stderr, flush=True)  # the JVM tells its side of a refusal above this line
session = start_spark(SparkConfig(shuffle_partitions=3, extra={"spark.sql.session.timeZone": "Asia/Tokyo"}))
print(session.conf.get("spark.sql.shuffle.partitions"), session.conf.get("spark.sql.session.timeZone"))
folder = Path(sys.argv[1])
print([session.read.text(str(place)).count() for place in (folder, folder / "é.txt")])
session.stop()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["refused: 0 True", "3 Asia/Tokyo", "[1, 1]"]
    quiet = done.stderr.split("--\n", 1)[1]
    assert [line for line in quiet.splitlines() if "incubator modules" not in line] == []


@pytest.mark.spark
@pytest.mark.parametrize(
    ("name", "to", "expected"),
    [
        ("SIGTERM", "all", "Ended"),
        ("SIGTERM", "self", "Ended"),
        ("SIGINT", "all", "KeyboardInterrupt"),
        ("SIGINT", "self", "KeyboardInterrupt"),
        ("SIGKILL", "jvm", "ContractError Spark's JVM ended in the middle of this stage"),
    ],
)
def test_what_ends_a_job_is_what_the_caller_sees(name: str, to: str, expected: str) -> None:
    """A signal to the process group ends the JVM too, and PySpark then fails at whatever it asks it; a signal to the process
    alone leaves a task of ten minutes, for which it would wait."""
    code = """
import os, signal, sys, threading, time
import psutil
from data.contracts import ContractError
from pipeline.spark import SparkConfig, spark_session
class Ended(BaseException):
    pass
def end(*_):
    raise Ended
signal.signal(signal.SIGTERM, end)
number, to = getattr(signal, sys.argv[1]), sys.argv[2]
def slow(batches):
    for batch in batches:
        time.sleep(600)
        yield batch
try:
    with spark_session(SparkConfig(master="local[1]")) as spark:
        tracker = spark.sparkContext.statusTracker()
        def watch():
            while not tracker.getActiveStageIds():
                time.sleep(0.1)
            time.sleep(1)
            if to == "all":
                os.killpg(os.getpid(), number)
            elif to == "self":
                os.kill(os.getpid(), number)
            else:
                [jvm] = [child for child in psutil.Process().children() if "java" in child.name()]
                jvm.send_signal(number)
        threading.Thread(target=watch, daemon=True).start()
        spark.range(2).mapInArrow(slow, "id long").collect()
except (Ended, KeyboardInterrupt, ContractError) as error:
    print(type(error).__name__, str(error).partition(",")[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, name, to],
        start_new_session=True, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
