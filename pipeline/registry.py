"""Versions of the teacher and the student in MLflow's model registry.

A new version gets the alias `candidate`. A teacher is `champion` while there is none; which student is, `pipeline.promotion`
decides.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.promotion import promote_student
from pipeline.tracking import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".gguf", ".onnx")


def register_teacher(tracker: Tracker, model: Path, fingerprint: str) -> None:
    """Register the teacher folder; without `tracking.log_weights` the version holds all of it but the weights."""

    def register() -> None:
        with tempfile.TemporaryDirectory() as temporary:
            light = Path(temporary) / "teacher"
            drop = (
                None if tracker.settings.tracking.log_weights else shutil.ignore_patterns(*(f"*{w}" for w in WEIGHTS))
            )
            shutil.copytree(model, light, ignore=drop)
            tracker.client.log_artifacts(tracker.run_id, str(light), "teacher")
        source = f"{tracker.client.get_run(tracker.run_id).info.artifact_uri}/teacher"
        name = model_name(tracker, "teacher")
        _ensure(tracker.client, name, "Reasoning relevance model; labels the pool.")
        made = tracker.client.create_model_version(
            name, source, tracker.run_id, tags=_tags(tracker, fingerprint, model), await_creation_for=0
        )
        tracker.client.set_registered_model_alias(name, "candidate", made.version)
        if "champion" not in tracker.client.get_registered_model(name).aliases:
            tracker.client.set_registered_model_alias(name, "champion", made.version)

    tracker.attempt("register the teacher", register)


def register_student(tracker: Tracker, export: Path, student: Path, fingerprint: str) -> None:
    """Register the exported folder as an MLflow model that can be loaded and served as it is, and choose the champion.

    `student` is the distill stage's folder, whose test predictions the choice rests on.
    """

    def register() -> None:
        import mlflow

        name = model_name(tracker, "student")
        _ensure(tracker.client, name, "Relevance cross-encoder; scores query-ad pairs.")
        with tempfile.TemporaryDirectory() as temporary:
            served = Path(temporary) / "export"
            shutil.copytree(export, served, ignore=shutil.ignore_patterns("_*.json"))
            with warnings.catch_warnings(), mlflow.start_run(run_id=tracker.run_id):
                warnings.filterwarnings("ignore", message=".*type hints", category=UserWarning)  # signature is given
                info = mlflow.pyfunc.log_model(
                    name="student",
                    python_model=str(Path(__file__).with_name("student_pyfunc.py")),
                    artifacts={"export": str(served)},
                    signature=student_signature(),
                    input_example=input_example(),
                    pip_requirements=requirements(),
                )
        made = tracker.client.create_model_version(
            name,
            info.model_uri,
            tracker.run_id,
            tags=_tags(tracker, fingerprint, export),
            await_creation_for=0,
            model_id=info.model_id,
        )
        margin = tracker.settings.tracking.promotion_margin
        reason = promote_student(tracker.client, name, str(made.version), student, export, margin)
        logger.info("student version %s is %s", made.version, reason)

    tracker.attempt("register the student", register)


def model_name(tracker: Tracker, role: str) -> str:
    """`PREFIX-teacher` or `PREFIX-student`."""
    return f"{tracker.settings.tracking.experiment_prefix}-{role}"


def student_signature() -> ModelSignature:
    """Columns in and out of the registered student."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array, Map

    inputs = Schema(
        [
            ColSpec(DataType.string, "query"),
            ColSpec(DataType.string, "ad_title"),
            ColSpec(DataType.string, "ad_text", required=False),
            ColSpec(Map(DataType.string), "attributes", required=False),
        ]
    )
    outputs = Schema(
        [
            ColSpec(DataType.double, "p_relevant"),
            ColSpec(DataType.boolean, "relevant"),
            ColSpec(Array(DataType.double), "grade_probs"),
        ]
    )
    return ModelSignature(inputs=inputs, outputs=outputs)


def input_example() -> Any:
    """One pair, as a frame."""
    import pandas as pd

    return pd.DataFrame(
        {"query": ["red running shoes"], "ad_title": ["Velora red running shoes"], "ad_text": ["Free delivery."]}
    )


def requirements() -> list[str]:
    """What serving the student needs, pinned to what made it; given, so that MLflow does not guess."""
    return [f"{name}=={version(name)}" for name in ("mlflow", "numpy", "onnxruntime", "pandas", "tokenizers")]


def _ensure(client: MlflowClient, name: str, description: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name, description=description)


def _tags(tracker: Tracker, fingerprint: str, folder: Path) -> dict[str, str]:
    return {"fingerprint": fingerprint, "run": tracker.settings.run, "folder": str(folder.resolve())}
