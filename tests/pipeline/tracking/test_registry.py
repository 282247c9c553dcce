"""Versions of the models: aliases, the choice of the champion, and a student that can be loaded."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from data.contracts import write_json
from pipeline.artifacts import Recipe, StageOutput, run_stage
from pipeline.executions import Registration
from pipeline.settings import PipelineConfig
from pipeline.tracking.registry import verdict
from pipeline.tracking.replay import replay
from student.evaluation import write_predictions
from student.metrics import Comparison
from tests.pipeline.tracking.helpers import artifacts, client, runs_of, stage, write_export


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
    drift = {"level": "stop", "sentence": "common words in queries (PSI 0.60)"}
    for number, noise in ((1, 0.5), (2, 2.0), (3, 0.2), (4, 0.1)):
        student = train_student(settings, f"s{number}", noise)
        write_json(student / "drift.json", drift if number == 4 else {"level": "look", "sentence": "x"})
        with stage(settings, "export", {"student": f"s{number}"}) as execution:
            write_export(export)
            execution.finish({}, f"e{number}", (), Registration(role="student", folder=export, student=student))
    reasons = [versions.get_model_version("ads-relevance-student", number).tags["promotion"] for number in (1, 2, 3, 4)]
    assert reasons[0] == "champion: the first version"
    assert reasons[1].startswith("not champion: roc_auc -0.")
    assert reasons[2].startswith("champion: roc_auc +0.")
    assert reasons[2].endswith("against version 1")
    assert reasons[3].startswith("not champion: new pairs are unlike those before: common words in queries (PSI 0.60)")
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


def test_a_student_that_cannot_be_compared_is_no_champion() -> None:
    def found(difference: float | None, low: float | None, high: float | None) -> Comparison:
        return Comparison(a="new", b="old", metric="roc_auc", n=7, difference=difference, low=low, high=high)

    assert verdict(found(None, None, None), 0.1)[0] is False
    assert verdict(found(0.0, -0.004, 0.004), 0.005)[0] is True
    assert verdict(found(0.01, -0.006, 0.02), 0.005)[0] is False
