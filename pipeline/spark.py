"""A Spark session for the jobs of this product: one config, one function.

What was left out: the cluster's own settings (executors, GPU resources, object stores), which differ everywhere; they
go in `extra` as Spark's own keys and win over everything set here.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from data.contracts import Config, ContractError, first_line

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# From the first line on: `setLogLevel` comes after the start-up warnings. The gateway's own level must equal the
# root's, or it announces that it changes it. The others print, with stack traces, what the failing action raises anyway.
_LOG4J = """\
rootLogger.level = error
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = error
logger.executor.name = org.apache.spark.executor.Executor
logger.executor.level = off
logger.tasks.name = org.apache.spark.scheduler.TaskSetManager
logger.tasks.level = off
logger.writer.name = org.apache.spark.sql.execution.datasources.FileFormatWriter
logger.writer.level = off
logger.utils.name = org.apache.spark.util.Utils
logger.utils.level = off
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = spark %p %c{1}: %m%n%ex{short}
"""


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
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    settings = _settings(config)
    builder = SparkSession.builder.master(config.master).appName(config.app_name)
    with tempfile.TemporaryDirectory(prefix="ads-relevance-") as folder:
        # Read once by the JVM when it starts, so it need not outlive this call.
        log4j = Path(folder, "log4j2.properties")
        log4j.write_text(_LOG4J, encoding="utf-8")
        given = settings.get("spark.driver.extraJavaOptions") or _java_options(config.master)
        settings["spark.driver.extraJavaOptions"] = f"-Dlog4j2.configurationFile={log4j} {given}".strip()
        for key, value in settings.items():
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
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = listed.split(",") if listed else [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
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
    }
    if config.master.startswith("local"):
        # A laptop's or a container's host name often does not resolve. A cluster's executors must reach the driver.
        settings |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
    return settings | config.extra


def _java_options(master: str) -> str:
    # On one machine the jobs are minutes long and share the cores with Python and torch: the second compiler and the
    # parallel collectors take half of the JVM's time there and never pay it back.
    return "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC" if master.startswith("local") else ""


def _require_java() -> None:
    home = os.environ.get("JAVA_HOME")
    if home:
        if not Path(home, "bin", "java").exists() and not Path(home, "bin", "java.exe").exists():
            raise ContractError(f"JAVA_HOME is '{home}', which holds no bin/java; point it at Java 17 or newer")
    elif shutil.which("java") is None:
        raise ContractError("Spark needs Java and none was found; install Java 17 or newer, or set JAVA_HOME")
