"""Fixtures shared by all rooms."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before anything imports torch or starts a JVM: two cores are shared by Spark, torch and vLLM.
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Public data sets that may lie beside the repository; tests that need one skip where it is not there.
if (PUBLIC_DATA := Path(__file__).parents[2] / "shared" / "data").is_dir():
    os.environ.setdefault("ADS_RELEVANCE_DATA", str(PUBLIC_DATA))


@pytest.fixture(scope="session")
def spark() -> Iterator["object"]:
    """One local Spark session for the whole test run."""
    from pipeline.spark import SparkConfig, start_spark

    session = start_spark(SparkConfig(master="local[2]", driver_memory="1g", shuffle_partitions=2))
    yield session
    session.stop()
