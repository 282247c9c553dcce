"""Versions of the teacher and the student in MLflow's model registry, and which of them is champion.

A new version gets the alias `candidate`. A teacher is `champion` while there is none. A student becomes champion when a
paired bootstrap on human labels finds it no worse than the champion before it, unless it learned from pairs that have
drifted (`pipeline.drift`); the reason is a tag of the version
(`promotion`), whatever was decided. Rolling back is moving the alias, see docs/operations.md. A registration may come long
after the stage, and twice; a version that only drift has held back is judged again when its run goes on with other limits.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Map

from data.contracts import ContractError, GradeScale, read_json
from pipeline.artifacts import read_record
from pipeline.drift import DriftConfig, verdict_of_student
from pipeline.executions import Execution

if TYPE_CHECKING:
    from student.metrics import Comparison

logger = logging.getLogger(__name__)

METRIC = "roc_auc"
DRIFTED = "new pairs are unlike those before"
DESCRIPTIONS = {
    "teacher": "Reasoning relevance model; labels the pool.",
    "student": "Relevance cross-encoder; scores query-ad pairs.",
}
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.onnx", "*.onnx.data")
SERVED_BY = ("mlflow", "numpy", "onnxruntime", "pandas", "tokenizers")
_INPUTS = [ColSpec("string", "query"), ColSpec("string", "ad_title"), ColSpec("string", "ad_text", required=False)]
_OUTPUTS = [ColSpec("double", "p_relevant"), ColSpec("boolean", "relevant")]
SIGNATURE = ModelSignature(
    inputs=Schema([*_INPUTS, ColSpec(Map(DataType.string), "attributes", required=False)]),
    outputs=Schema(
        [*_OUTPUTS, ColSpec(Array(DataType.double), "grade_probs"), ColSpec("boolean", "decision", required=False)]
    ),
    params=ParamSchema([ParamSpec("at", DataType.string, default="")]),
)
EXAMPLE = {"query": ["red running shoes"], "ad_title": ["Velora red running shoes"], "ad_text": ["Free delivery."]}


def register(client: Any, run_id: str, place: Path | None, execution: Execution, limits: DriftConfig) -> None:
    """Make a version of PREFIX-`role` from an execution whose files lie in `place`, and set its aliases.

    Raises `ContractError` when what it is made from is no longer there.
    """
    folder, student = _folders(place, execution)
    version = _find_version(client, run_id, execution)
    if version is None:
        version = _create_version(client, _name(execution), run_id, folder, execution)
    if "promotion" not in version.tags:  # what was decided stays: the aliases may have been moved by hand since
        _promote(client, version, student, folder, execution.tracking["promotion_margin"], limits)


def reconsider(client: Any, run_id: str, place: Path | None, execution: Execution, limits: DriftConfig) -> None:
    """Judge a version again that was not promoted because of drift alone, where `limits` let it pass by now.

    Not once there is a newer candidate, nor after it was made champion by hand.
    """
    version = _find_version(client, run_id, execution)
    if version is None or not version.tags.get("promotion", "").startswith(f"not champion: {DRIFTED}"):
        return
    aliases = client.get_registered_model(version.name).aliases
    number, champion = (str(each) for each in (version.version, aliases.get("champion")))
    if str(aliases.get("candidate")) != number or champion == number:
        return
    folder, student = _folders(place, execution)
    if student is not None and _drift_fault(student, limits) is None:
        _promote(client, version, student, folder, execution.tracking["promotion_margin"], limits)


def verdict(found: Comparison, margin: float) -> tuple[bool, str]:
    """Whether the new student (a) may follow the old one (b), and why.

    `margin` is how far the lower limit of the difference in ROC-AUC may lie below 0.
    """
    if found.difference is None or found.low is None:
        return False, f"not champion: {METRIC} cannot be compared on {found.n} shared test rows"
    measured = (
        f"{METRIC} {found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}] on {found.n} test rows, "
        f"allowed {-margin:+.4f}"
    )
    return (True, f"champion: {measured}") if found.low >= -margin else (False, f"not champion: {measured}")


def _folders(place: Path | None, execution: Execution) -> tuple[Path, Path | None]:
    """The folders of an execution's model and, for a student, of its distillation; `ContractError` when they are gone."""
    model = execution.model
    if model is None or place is None or not (folder := place / model.folder).is_dir():
        raise ContractError("the folder of the model is gone; run its stage again to register it")
    student = place / model.student if model.student else None
    record = read_record(student) if student else None
    if (record.fingerprint if record else "") != model.student_fingerprint:
        raise ContractError(f"{student} holds another student by now, so this one cannot be compared with the champion")
    return folder, student


def _name(execution: Execution) -> str:
    """The registered name of an execution's model."""
    return f"{execution.tracking['experiment_prefix']}-{execution.model.role if execution.model else ''}"


def _find_version(client: Any, run_id: str, execution: Execution) -> Any:
    """The version that an execution has made; None where it has made none."""
    found = client.search_model_versions(f"name = '{_name(execution)}' and run_id = '{run_id}'")
    return next((each for each in found if each.tags.get("fingerprint") == execution.fingerprint), None)


def _create_version(client: Any, name: str, run_id: str, folder: Path, execution: Execution) -> Any:
    is_teacher = name.endswith("-teacher")
    try:
        client.create_registered_model(name, description=DESCRIPTIONS[name.rpartition("-")[2]])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with tempfile.TemporaryDirectory() as temporary:
        drop = WEIGHTS if is_teacher and not execution.tracking["log_weights"] else ("_*.json", "_*.jsonl", "layers-*")
        copy = shutil.copytree(folder, Path(temporary) / folder.name, ignore=shutil.ignore_patterns(*drop))
        if is_teacher:
            client.log_artifacts(run_id, str(copy), "teacher")
            source, model_id = f"{client.get_run(run_id).info.artifact_uri}/teacher", None
        else:
            mlflow.set_tracking_uri(client.tracking_uri)  # for this process; models cannot be logged through a client
            source, model_id = _log_student(run_id, copy)
    tags = {"fingerprint": execution.fingerprint, "run": execution.tags["run"], "folder": str(folder.resolve())}
    return client.create_model_version(name, source, run_id, tags=tags, await_creation_for=0, model_id=model_id)


def _log_student(run_id: str, export: Path) -> tuple[str, str]:
    """Upload the exported folder as an MLflow model that can be loaded and served as it is; returns its address and id."""
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="student",
            python_model=str(Path(__file__).with_name("student_pyfunc.py")),
            artifacts={"export": str(export)},
            signature=SIGNATURE,
            input_example=pd.DataFrame(EXAMPLE),
            pip_requirements=[f"{name}=={installed(name)}" for name in SERVED_BY],  # given, or MLflow guesses
        )
    return info.model_uri, info.model_id


def _promote(client: Any, version: Any, student: Path | None, export: Path, margin: float, limits: DriftConfig) -> None:
    """Give a version its aliases, and note why. A student's run keeps its test predictions, for later comparisons."""
    name, number = version.name, str(version.version)
    client.set_registered_model_alias(name, "candidate", number)
    if student is not None:
        from student.evaluation import PREDICTIONS
        from student.ladder import evaluated

        student = evaluated(student, export)
        client.log_artifact(version.run_id, str(student / PREDICTIONS), f"predictions/{number}")
    champion = client.get_registered_model(name).aliases.get("champion")
    promoted, reason = champion is None, "champion: the first version"
    if champion is not None and student is None:
        reason = f"not champion: version {champion} is, until the alias is moved by hand"
    elif (student is not None and (fault := _floor_fault(student))) or (
        student is not None and (fault := _drift_fault(student, limits))
    ):
        promoted, reason = False, f"not champion: {fault}"
    elif champion is not None and student is not None:
        try:
            promoted, reason = _against(client, name, str(champion), student, export, margin)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            reason = f"not champion: version {champion}, or the run that made it, has been deleted"
    if promoted:
        client.set_registered_model_alias(name, "champion", number)
    client.set_model_version_tag(name, number, "promotion", reason)  # last: it says that all is done
    logger.info("version %s of %s is %s", number, name, reason)


def _floor_fault(student: Path) -> str | None:
    """Why a student is no better than what costs no label; None if it is, or if it was never evaluated."""
    from student.evaluation import floor_fault  # here, since it loads torch

    path = student / "evaluation.json"
    return floor_fault(read_json(path)) if path.exists() else None


def _drift_fault(student: Path, limits: DriftConfig) -> str | None:
    """Why what a student learned from must be looked at first: pairs too unlike those before, see `pipeline.drift`."""
    level, sentence = verdict_of_student(student, limits)
    if level != "stop":
        return None
    return f"{DRIFTED}: {sentence}; if that is meant, move the alias, or raise drift.stop and resume the run"


def _against(client: Any, name: str, champion: str, student: Path, export: Path, margin: float) -> tuple[bool, str]:
    from student.evaluation import PREDICTIONS, compare_students  # here, since it loads torch

    old, place = client.get_model_version(name, champion), f"predictions/{champion}"
    if f"{place}/{PREDICTIONS}" not in {item.path for item in client.list_artifacts(old.run_id, place)}:
        return False, f"not champion: version {champion} has no test predictions to be compared with"
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(client.download_artifacts(old.run_id, place, temporary))
        try:
            scale = GradeScale.load(export)
            found = compare_students(student, kept, relevant_from=scale.relevant_from, metric=METRIC)
        except ContractError as error:
            return False, f"not champion: {error}"
    promoted, reason = verdict(found, margin)
    return promoted, f"{reason}; against version {champion}"
