"""The environment of every process that runs a flow, set before the libraries that read it are loaded."""

from __future__ import annotations

import os

DEFAULTS = {
    # Idle OpenMP threads sleep. By default they spin, which on a machine whose cores are shared (by Spark, a server, another
    # run) makes training and generation several times slower.
    "OMP_WAIT_POLICY": "passive",
    # In bfloat16 on a CPU, torch keeps a compiled product of matrices, with its memory, for each of the last 1,024 shapes
    # (pytorch issue 29893). Batches here have ever new shapes: a teacher's training of an hour had grown to 14 GB.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
    # Nothing is reported to the makers of the libraries.
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def set_environment() -> None:
    """Set defaults where the user has chosen nothing, and keep what this machine asks of itself away from proxies."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return
    excepted = [
        host for host in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")).split(",") if host.strip()
    ]
    if "*" not in excepted:
        excepted += [host for host in LOOPBACK if host not in excepted]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(excepted)
