"""Fixtures shared by all rooms."""

import os
import sys
from collections.abc import Iterator

import pytest

# Set before anything imports torch or starts a JVM: two cores are shared by Spark, torch and vLLM.
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def spark() -> Iterator["object"]:
    """One local Spark session for the whole test run."""
    from pipeline.spark import SparkConfig, start_spark

    session = start_spark(SparkConfig(master="local[2]", driver_memory="1g", shuffle_partitions=2))
    yield session
    session.stop()
