"""A Spark session for the jobs of this product: one config, one function.

What was left out: the cluster's own settings (executors, GPU resources, object stores), which differ everywhere; they
go in `extra` as Spark's own keys and win over everything set here.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pydantic import Field

from data.contracts import Config, ContractError, first_line
from pipeline.locks import visible_gpus

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# How long a session may take to stop after a failure: running tasks can hold it. The JVM ends with this process in any case.
_STOP_SECONDS = 10

LOG4J = Path(__file__).with_name("log4j2.properties")


class SparkConfig(Config):
    """How to start Spark. The defaults suit one small machine."""

    master: str = Field(default="local[2]", min_length=1)
    """Spark master: `local[N]` for N threads on this machine, or a cluster's URL."""

    driver_memory: str = Field(default="1g", pattern=r"^[1-9][0-9]*[kmgtKMGT]$")
    """Heap of the driver's JVM (on a local master, of everything that is not Python), such as `1g` or `512m`."""

    shuffle_partitions: int = Field(default=8, ge=1, le=100_000)
    """Number of partitions after a join or an aggregation; about 2–4 for each core."""

    app_name: str = Field(default="ads-relevance", min_length=1)
    """Name under which the session is shown by Spark."""

    ui: bool = False
    """Serve Spark's own web page while the session lives."""

    extra: dict[str, str] = Field(default_factory=dict)
    """Any other Spark settings by their own keys; they win over the settings made here. On a local master the JVM is tuned
    for short jobs; for hours of work over a big table set `spark.driver.extraJavaOptions` to what you want instead."""


@contextmanager
def spark_session(config: SparkConfig) -> Iterator[SparkSession]:
    """A session for one stage, stopped after it: training must not share the memory with an idle JVM.

    What ends the stage is what is raised, even if Spark cannot be stopped then. Raises `ContractError` when it is that the
    JVM has ended.
    """
    before = signal.getsignal(signal.SIGINT)
    session = start_spark(config)
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        # PySpark's own handler talks to the JVM in the middle of another call, which fails with pages of tracebacks.
        signal.signal(signal.SIGINT, before)
    try:
        with _signals_cancel(session) if in_main else nullcontext():
            yield session
    except BaseException as error:
        gone = _stop_after(session)
        # PySpark asks the JVM again on the way out of an interrupted call, and fails at that.
        interruption = _interruption(error)
        if interruption is not error:
            raise interruption from None
        if gone and isinstance(error, Exception):
            raise ContractError(
                "Spark's JVM ended in the middle of this stage, most likely for lack of memory on this machine; close other "
                "programs, or lower what runs at once (spark.master, annotate.engines), and start the run again"
            ) from error
        raise
    session.stop()


@contextmanager
def _signals_cancel(session: SparkSession) -> Iterator[None]:
    """Inside, a signal that this process handles ends the running jobs too: PySpark would wait for them first."""
    before = {
        number: handler for number in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(number))
    }

    def cancel() -> None:
        with suppress(Exception):  # the JVM may have got the same signal
            session.sparkContext.cancelAllJobs()

    def handle(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=cancel, daemon=True).start()
        before[signal.Signals(number)](number, frame)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interruption(error: BaseException) -> BaseException:
    """The signal that `error` followed, such as KeyboardInterrupt; `error` itself if there was none."""
    context: BaseException | None = error
    while context is not None:
        if not isinstance(context, Exception | GeneratorExit):
            return context
        context = context.__context__
    return error


def _stop_after(session: SparkSession) -> bool:
    """Stop the session after a failure; whether there is no JVM any more."""
    failures: list[Exception] = []

    def stop() -> None:
        try:
            session.stop()
        except Exception as error:  # Py4J and sockets each have their own
            failures.append(error)

    # An interrupted call has left its answer in this thread's connection, where the next call would take it for its own.
    stopping = threading.Thread(target=stop, daemon=True)
    stopping.start()
    stopping.join(_STOP_SECONDS)
    return any(isinstance(error, ConnectionError) for error in failures)


def start_spark(config: SparkConfig) -> SparkSession:
    """Start a session, or return the one that is already active in this process (its JVM settings then stay).

    Times are UTC, data travels to Python as Arrow, Python workers use this interpreter, only errors are logged.
    Raises `ContractError` when Java is missing or the session cannot start.
    """
    _require_java()
    # Said by PySpark 4.3 on import of its pandas parts, which this product does not use.
    warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas")
    from pyspark.logger import PySparkLogger
    from pyspark.sql import SparkSession

    # PySpark prints a Java stack trace of 300 lines beside the exception it raises.
    for name in ("SQLQueryContextLogger", "DataFrameQueryContextLogger"):
        PySparkLogger.getLogger(name).setLevel(logging.CRITICAL)
    # The environment wins over Spark's settings in some launch paths, so both are set.
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    language = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG", "")
    if "utf" not in language.lower():  # Java could not open a file whose name is not ASCII
        os.environ["LC_ALL"] = "C.UTF-8"
    builder = SparkSession.builder.master(config.master).appName(config.app_name)
    for key, value in _settings(config).items():
        builder = builder.config(key, value)
    try:
        return builder.getOrCreate()
    except Exception as error:  # Py4J, Spark and the operating system each have their own family
        raise ContractError(
            f"Spark cannot start with master '{config.master}' and driver_memory '{config.driver_memory}' "
            f"({first_line(error)}); check the Java installation (17 or newer) and the `spark` settings"
        ) from error


def use_assigned_gpu(workers: int) -> None:
    """In a task: show this process the GPU that Spark assigned to it or, without that, the one of its partition's number.

    `workers` is how many such processes share the machine's GPUs. Does nothing outside a task.
    """
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is None:
        return
    assigned = context.resources().get("gpu")
    if assigned is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(assigned.addresses)
        return
    gpus = visible_gpus()
    if workers > 1 and len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[context.partitionId() % len(gpus)]


def _settings(config: SparkConfig) -> dict[str, str]:
    settings = {
        "spark.driver.memory": config.driver_memory,
        "spark.pyspark.python": sys.executable,
        "spark.sql.shuffle.partitions": str(config.shuffle_partitions),
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.catalogImplementation": "in-memory",
        "spark.ui.enabled": str(config.ui).lower(),
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.extraJavaOptions": "",
    }
    if config.master.startswith("local"):
        # A laptop's or a container's host name often does not resolve. A cluster's executors must reach the driver.
        settings |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
        # On one machine the jobs are minutes long and share the cores with Python and torch: the second compiler and the
        # parallel collectors take half of the JVM's time there and never pay it back.
        settings["spark.driver.extraJavaOptions"] = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    settings |= config.extra
    quiet = f"-Dlog4j2.configurationFile={LOG4J.as_uri()} {settings['spark.driver.extraJavaOptions']}"
    return settings | {"spark.driver.extraJavaOptions": quiet.strip()}


def _require_java() -> None:
    home = os.environ.get("JAVA_HOME")
    if home:
        if not Path(home, "bin", "java").exists() and not Path(home, "bin", "java.exe").exists():
            raise ContractError(f"JAVA_HOME is '{home}', which holds no bin/java; point it at Java 17 or newer")
    elif shutil.which("java") is None:
        raise ContractError("Spark needs Java and none was found; install Java 17 or newer, or set JAVA_HOME")
