"""Impatient tracking, and a store without runs: making one takes MLflow ten seconds."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.settings import PipelineConfig, load_preset


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("SEND_SECONDS", 0.1), ("FIRST_PAUSE", 0.1), ("LAST_PAUSE", 0.5), ("CLOSE_SECONDS", 20.0)):
        monkeypatch.setattr(f"pipeline.tracking.tracker.{name}", seconds)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by two processes that open it at the same time."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    code = f"from pipeline.tracking.store import open_client; open_client('sqlite:///{path}').search_experiments()"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in "ab"]
    for process in processes:
        assert process.wait() == 0, "a store that two processes open at once must be made once"
    return path


@pytest.fixture
def configure(tmp_path: Path, empty_store: Path) -> Callable[..., PipelineConfig]:
    """Settings of a run in a folder of runs with an empty store."""

    def settings(*overrides: str) -> PipelineConfig:
        if not (tmp_path / "runs").exists():
            (tmp_path / "runs").mkdir()
            shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
        return load_preset("sample", [f"runs={tmp_path / 'runs'}", "share=false", *overrides])

    return settings
