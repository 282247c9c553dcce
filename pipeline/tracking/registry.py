"""Versions of the teacher and the student in MLflow's model registry.

A new version gets the alias `candidate`. A teacher is `champion` while there is none; which student is,
`pipeline.tracking.promotion` decides. A registration may come long after the stage,
when the store was down, and may be tried twice.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from data.contracts import ContractError
from pipeline.artifacts import read_record
from pipeline.tracking.promotion import promote_student

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".gguf", ".onnx")


class Registration(BaseModel):
    """What to register. Folders are relative to the stage's: `folder` is the model, `student` the distill stage's output."""

    role: Literal["teacher", "student"]
    name: str
    run: str
    folder: str
    fingerprint: str
    log_weights: bool
    promotion_margin: float
    student: str = ""
    student_fingerprint: str = ""


def register(client: MlflowClient, run_id: str, stage_folder: Path, wanted: Registration) -> None:
    """Make a version of `wanted.name` from a stage's run and set its aliases.

    Raises `ContractError` when what it is made from is no longer there.
    """
    model = stage_folder / wanted.folder
    if not model.is_dir():
        raise ContractError(f"{model} is gone; run the stage again to register its model")
    found = [
        each
        for each in client.search_model_versions(f"name = '{wanted.name}' and run_id = '{run_id}'")
        if each.tags.get("fingerprint") == wanted.fingerprint
    ]
    if wanted.role == "teacher":
        _register_teacher(client, run_id, model, wanted, str(found[0].version) if found else "")
    else:
        _register_student(client, run_id, stage_folder, model, wanted, str(found[0].version) if found else "")


def _register_teacher(client: MlflowClient, run_id: str, model: Path, wanted: Registration, made: str) -> None:
    """Register the teacher folder; without `log_weights` the version holds all of it but the weights."""
    if not made:
        with tempfile.TemporaryDirectory() as temporary:
            light = Path(temporary) / "teacher"
            drop = None if wanted.log_weights else shutil.ignore_patterns(*(f"*{weights}" for weights in WEIGHTS))
            shutil.copytree(model, light, ignore=drop)
            client.log_artifacts(run_id, str(light), "teacher")
        source = f"{client.get_run(run_id).info.artifact_uri}/teacher"
        _ensure(client, wanted.name, "Reasoning relevance model; labels the pool.")
        tags = _tags(wanted, model)
        made = str(client.create_model_version(wanted.name, source, run_id, tags=tags, await_creation_for=0).version)
    client.set_registered_model_alias(wanted.name, "candidate", made)
    if "champion" not in client.get_registered_model(wanted.name).aliases:
        client.set_registered_model_alias(wanted.name, "champion", made)


def _register_student(
    client: MlflowClient, run_id: str, stage_folder: Path, export: Path, wanted: Registration, made: str
) -> None:
    """Register the exported folder as an MLflow model that can be loaded and served as it is, and choose the champion."""
    student = stage_folder / wanted.student
    record = read_record(student)
    if (record.fingerprint if record else "") != wanted.student_fingerprint:
        raise ContractError(f"{student} holds another student by now, so this one cannot be compared with the champion")
    if not made:
        _ensure(client, wanted.name, "Relevance cross-encoder; scores query-ad pairs.")
        made = _log_student(client, run_id, export, wanted)
    reason = promote_student(client, wanted.name, made, student, export, wanted.promotion_margin)
    logger.info("student version %s is %s", made, reason)


def _log_student(client: MlflowClient, run_id: str, export: Path, wanted: Registration) -> str:
    import mlflow

    with tempfile.TemporaryDirectory() as temporary:
        served = Path(temporary) / "export"
        shutil.copytree(export, served, ignore=shutil.ignore_patterns("_*.json", "_*.jsonl"))
        with mlflow.start_run(run_id=run_id):
            info = mlflow.pyfunc.log_model(
                name="student",
                python_model=str(Path(__file__).with_name("student_pyfunc.py")),
                artifacts={"export": str(served)},
                signature=student_signature(),
                input_example=input_example(),
                pip_requirements=requirements(),
            )
    made = client.create_model_version(
        wanted.name, info.model_uri, run_id, tags=_tags(wanted, export), await_creation_for=0, model_id=info.model_id
    )
    return str(made.version)


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
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _tags(wanted: Registration, folder: Path) -> dict[str, str]:
    return {"fingerprint": wanted.fingerprint, "run": wanted.run, "folder": str(folder.resolve())}
