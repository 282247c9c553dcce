"""Versions of the models: aliases, the choice of the champion, and a student that can be loaded."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from pipeline import drift
from pipeline.artifacts import Recipe, StageOutput, run_stage
from pipeline.executions import Registration, reused
from pipeline.resume import remember
from pipeline.settings import PipelineConfig, apply_overrides
from pipeline.tracking.registry import verdict
from pipeline.tracking.replay import replay
from student.evaluation import write_predictions
from student.metrics import Comparison
from tests.pipeline.tracking.helpers import artifacts, client, flow, runs_of, stage, write_export


def train_student(settings: PipelineConfig, fingerprint: str, noise: float) -> Path:
    """What the distill stage leaves of a student that is right but for some noise."""
    rng = np.random.default_rng(0)
    grade = rng.integers(2, size=400)
    test = SimpleNamespace(pair_ids=[f"p{i}" for i in range(400)], query_id=np.arange(400) // 4, grade=grade)

    def work(out: Path) -> StageOutput:
        write_predictions(out, test, 1 / (1 + np.exp(-(2 * grade - 1 + noise * rng.normal(size=400)))))
        return StageOutput(fingerprint=fingerprint, figures={})

    return run_stage(settings.folder / "student", Recipe("student", settings.student, {"x": fingerprint}), work).folder


def test_models_are_registered_with_aliases_and_the_student_can_be_loaded(
    configure: Callable[..., PipelineConfig], tmp_path: Path
) -> None:
    import mlflow

    settings = configure()
    teacher = settings.folder / "teacher" / "model"
    for fingerprint in ("t1", "t2"):
        with stage(settings, "teacher") as execution:
            teacher.mkdir(exist_ok=True)
            (teacher / "model.safetensors").write_bytes(b"weights")
            (teacher / "model_card.md").write_text("# Teacher")
            execution.finish({}, fingerprint, (), Registration(role="teacher", folder=teacher))
    versions = client(settings)
    assert versions.get_model_version_by_alias("ads-relevance-teacher", "champion").tags["fingerprint"] == "t1"
    assert versions.get_model_version_by_alias("ads-relevance-teacher", "candidate").tags["fingerprint"] == "t2"
    assert artifacts(settings, runs_of(settings, "teacher")[0], "teacher") == {"teacher/model_card.md"}  # no weights

    export = settings.folder / "export"
    for number, noise in ((1, 0.5), (2, 2.0), (3, 0.2), (4, 0.1)):
        student = train_student(settings, f"s{number}", noise)
        drift.save(student, [drifted(0.6 if number == 4 else 0.2)], drift.STUDENT_FILE)
        with stage(settings, "export", {"student": f"s{number}"}) as execution:
            write_export(export)
            execution.finish({}, f"e{number}", (), Registration(role="student", folder=export, student=student))
    reasons = [versions.get_model_version("ads-relevance-student", number).tags["promotion"] for number in (1, 2, 3, 4)]
    assert reasons[0] == "champion: the first version"
    assert reasons[1].startswith("not champion: roc_auc -0.")
    assert reasons[2].startswith("champion: roc_auc +0.")
    assert reasons[2].endswith("against version 1")
    assert reasons[3].startswith("not champion: new pairs are unlike those before: common words in queries 20.0%")
    # Sent once more, a registration changes nothing, though the alias was moved by hand since.
    versions.set_registered_model_alias("ads-relevance-student", "champion", "2")
    (settings.folder / "_mlflow.json").unlink()
    assert replay(settings.folder, settings.tracking_uri) == ""
    assert versions.get_registered_model("ads-relevance-student").aliases == {"candidate": 4, "champion": 2}
    assert len(versions.search_model_versions("name = 'ads-relevance-student'")) == 4

    mlflow.set_tracking_uri(settings.tracking_uri)
    uri = "models:/ads-relevance-student@candidate"
    model = mlflow.pyfunc.load_model(uri)
    attributes = [{"colour": "red", "size": "9"}, None]
    pairs = pd.DataFrame(
        {"query": ["a", "b"], "ad_title": ["t", "u"], "ad_text": ["x", None], "attributes": attributes}
    )
    assert model.predict(pairs)["p_relevant"].round(6).tolist() == [0.8, 0.6]
    assert model.predict(pairs[["query", "ad_title"]])["relevant"].tolist() == [True, True]
    decided = model.predict(pairs, params={"at": "precision=0.7"})
    assert decided["decision"].tolist() == [True, False]
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / "loaded")))
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle")]
    assert "onnxruntime==" in (folder / "requirements.txt").read_text()


def drifted(psi: float) -> drift.Check:
    """A check that found this index."""
    measure = drift.Measure(name="common words in queries", expected="5.0%", found="20.0%", psi=psi)
    about: dict[str, Any] = {"against": "teacher", "at": datetime.now(UTC), "pairs": 400, "queries": 300}
    return drift.Check(**about, measures=[measure])


def test_what_drift_alone_has_held_back_is_judged_again_by_the_limits_of_a_resumed_run(
    configure: Callable[..., PipelineConfig],
) -> None:
    settings = configure()
    versions, name, export = client(settings), "ads-relevance-student", settings.folder / "export"

    def distil(number: int, noise: float) -> None:
        student = train_student(settings, f"s{number}", noise)
        drift.save(student, [drifted(0.6 if number > 1 else 0.01)], drift.STUDENT_FILE)
        with flow(settings, "student", "export"), stage(settings, "export", {"student": f"s{number}"}) as execution:
            write_export(export)
            execution.finish({}, f"e{number}", (), Registration(role="student", folder=export, student=student))

    def resume(*limits: str) -> str:
        """The same run with other limits, which reuses everything; returns what was decided of the newest version."""
        remember(apply_overrides(settings, limits), "relevance-pipeline")
        with flow(settings, "student", "export"):
            reused("export", export)
        number = versions.get_registered_model(name).aliases["candidate"]
        return str(versions.get_model_version(name, number).tags["promotion"])

    distil(1, 0.5)
    distil(2, 0.1)
    assert resume().startswith("not champion: new pairs are unlike those before")
    assert resume("drift.stop=0.5").startswith("not champion: new pairs are unlike those before")
    assert resume("drift.stop=0.9").startswith("champion: roc_auc +0.")
    assert versions.get_registered_model(name).aliases == {"candidate": 2, "champion": 2}
    # Lower limits take nothing back, and a student that is worse stays what it was.
    assert resume("drift.stop=0.5").startswith("champion: roc_auc +0.")
    distil(3, 2.0)
    assert resume("drift.stop=0.5").startswith("not champion: new pairs are unlike those before")
    assert resume("drift.stop=0.9").startswith("not champion: roc_auc -0.")
    assert versions.get_registered_model(name).aliases == {"candidate": 3, "champion": 2}


def test_a_student_that_is_registered_late_is_judged_by_the_limits_of_then(
    configure: Callable[..., PipelineConfig],
) -> None:
    """The run was resumed with other limits before its export."""
    settings, levels = configure(), []
    for stop in (0.5, 0.9):
        student = train_student(settings, f"s{stop}", 0.5)
        drift.save(student, [drifted(0.6)], drift.STUDENT_FILE)
        remember(apply_overrides(settings, [f"drift.stop={stop}"]), "relevance-pipeline")
        with stage(settings, "export", {"student": f"s{stop}"}) as execution:
            write_export(settings.folder / "export")
            model = Registration(role="student", folder=settings.folder / "export", student=student)
            execution.finish({}, f"e{stop}", (), model)
        versions = client(settings)
        number = versions.get_registered_model("ads-relevance-student").aliases["candidate"]
        levels.append(versions.get_model_version("ads-relevance-student", number).tags["promotion"])
    assert levels[0].startswith("not champion: new pairs are unlike")
    assert levels[1] == "champion: the first version"


def test_a_student_that_cannot_be_compared_is_no_champion() -> None:
    def found(difference: float | None, low: float | None, high: float | None) -> Comparison:
        return Comparison(a="new", b="old", metric="roc_auc", n=7, difference=difference, low=low, high=high)

    assert verdict(found(None, None, None), 0.1)[0] is False
    assert verdict(found(0.0, -0.004, 0.004), 0.005)[0] is True
    assert verdict(found(0.01, -0.006, 0.02), 0.005)[0] is False
