"""Who is champion: the newest student that a paired bootstrap on human labels found no worse than the champion before it.

The reason is a tag of the version (`promotion`), whatever was decided. Rolling back is moving the alias, see
docs/operations.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from data.contracts import ContractError, GradeScale
from student.evaluation import PREDICTIONS, compare_students
from student.metrics import Comparison

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRIC = "roc_auc"


def promote_student(client: MlflowClient, name: str, version: str, student: Path, export: Path, margin: float) -> str:
    """Give version `version` of `name` the alias `candidate`, and `champion` if it may have it; returns the reason.

    Parameters: `student` the distill stage's folder, `export` the exported folder; `margin` how far the lower limit of the
    difference in ROC-AUC may lie below 0. The version's run keeps the test predictions, which later ones are compared with.
    """
    from mlflow.exceptions import MlflowException

    client.set_registered_model_alias(name, "candidate", version)
    made = client.get_model_version(name, version)
    client.log_artifact(made.run_id, str(student / PREDICTIONS), f"predictions/{version}")
    champion = client.get_registered_model(name).aliases.get("champion")
    if champion is None:
        promoted, reason = True, "champion: the first version"
    else:
        try:
            promoted, reason = _against(client, name, str(champion), student, export, margin)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            promoted, reason = False, f"not champion: version {champion}, or the run that made it, has been deleted"
    client.set_model_version_tag(name, version, "promotion", reason)
    if promoted:
        client.set_registered_model_alias(name, "champion", version)
    return reason


def verdict(found: Comparison, margin: float) -> tuple[bool, str]:
    """Whether the new student (a) may follow the old one (b), and why."""
    if found.difference is None or found.low is None:
        return False, f"not champion: {METRIC} cannot be compared on {found.n} shared test rows"
    measured = (
        f"{METRIC} {found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}] on {found.n} test rows, "
        f"allowed {-margin:+.4f}"
    )
    return (True, f"champion: {measured}") if found.low >= -margin else (False, f"not champion: {measured}")


def _against(
    client: MlflowClient, name: str, champion: str, student: Path, export: Path, margin: float
) -> tuple[bool, str]:
    old, place = client.get_model_version(name, champion), f"predictions/{champion}"
    if f"{place}/{PREDICTIONS}" not in {item.path for item in client.list_artifacts(old.run_id, place)}:
        return False, f"not champion: version {champion} has no test predictions to be compared with"
    with tempfile.TemporaryDirectory() as temporary:
        kept = client.download_artifacts(old.run_id, place, temporary)
        try:
            found = compare_students(
                student, Path(kept), relevant_from=GradeScale.load(export).relevant_from, metric=METRIC
            )
        except ContractError as error:
            return False, f"not champion: {error}"
    promoted, reason = verdict(found, margin)
    return promoted, f"{reason}; against version {champion}"
