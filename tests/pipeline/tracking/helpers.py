"""Executions as stages and flows record them, and what MLflow has of them."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.contracts import Grade, GradeScale
from pipeline.executions import FLOW, Execution, executing
from pipeline.settings import PipelineConfig
from pipeline.tracking.tracker import tracking

ROOT = Path(__file__).parents[3]
IN_A_STAGE = """
import logging, os, resource, signal, sys, time
import mlflow
from data.contracts import MetricsLog
from pipeline.executions import executing
from pipeline.settings import load_preset
from pipeline.tracking.tracker import tracking
logging.basicConfig(level=logging.WARNING)
settings = load_preset("sample", [f"runs={sys.argv[1]}"])
def stage(name):
    return executing(settings, name, settings.folder / name, config=getattr(settings, name), inputs={})
"""
SCORE_PY = """
import numpy as np

class Scorer:
    threshold = 0.5

    def __init__(self, folder):
        pass

    def grade_probs(self, rows):
        assert all(value is not None for row in rows for value in row.values()), rows
        p = np.array([0.6 + 0.1 * len(row.get("attributes") or {}) for row in rows])
        return np.stack([1 - p, p], axis=1)

    def p_relevant(self, probs):
        return probs[:, 1]

    def decide(self, probs, at):
        return probs[:, 1] >= float(at.partition("=")[2])
"""


@contextmanager
def stage(
    settings: PipelineConfig, name: str, inputs: dict[str, str] | None = None, **more: Any
) -> Iterator[Execution]:
    """A tracked execution of a stage in a folder of its name."""
    folder, config = settings.folder / name, getattr(settings, name)
    with tracking(settings), executing(settings, name, folder, config=config, inputs=inputs or {}, **more) as execution:
        yield execution


@contextmanager
def flow(settings: PipelineConfig, *stages: str) -> Iterator[Execution]:
    """A tracked execution of a flow."""
    tags, place = {"flow": "relevance-pipeline", "stages": " ".join(stages)}, settings.folder
    with tracking(settings), executing(settings, FLOW, place, config=settings, inputs={}, tags=tags) as execution:
        yield execution


def python(code: str, runs: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which has `settings` and `stage`."""
    command = [sys.executable, "-c", IN_A_STAGE + code, str(runs)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def client(settings: PipelineConfig) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(settings.tracking_uri)


def runs_of(settings: PipelineConfig, experiment: str) -> list[Any]:
    """The runs of an experiment, oldest first."""
    found = client(settings).get_experiment_by_name(f"ads-relevance/{experiment}")
    return client(settings).search_runs([found.experiment_id])[::-1] if found else []


def steps(settings: PipelineConfig, run_id: str, metric: str) -> list[int]:
    return [point.step for point in client(settings).get_metric_history(run_id, metric)]


def artifacts(settings: PipelineConfig, run: Any, path: str | None = None) -> set[str]:
    return {item.path for item in client(settings).list_artifacts(run.info.run_id, path)}


def write_export(folder: Path) -> None:
    """An exported student that can be loaded."""
    grades = (Grade(name="bad", definition="b"), Grade(name="good", definition="g"))
    GradeScale(grades=grades, relevant_from=1).save(folder)
    (folder / "score.py").write_text(SCORE_PY)
    (folder / "student.json").write_text("{}")


def wait_for(ready: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)
