"""How stages are joined: their code, their inputs, what is passed from one to the next."""

import shutil
from pathlib import Path

import pytest

from data.contracts import ContractError
from pipeline import stages
from pipeline.artifacts import Recipe, StageOutput, run_stage
from pipeline.settings import PipelineConfig, load_preset
from pipeline.stages import RUNNERS, STAGES, stage_config, stage_folder, stage_inputs, with_upstream


@pytest.fixture
def settings(tmp_path: Path) -> PipelineConfig:
    return load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false"])


def complete(settings: PipelineConfig, name: str, fingerprint: str = "f", **figures: object) -> None:
    run_stage(
        stage_folder(settings, name),
        Recipe(name, stage_config(settings, name), {}),
        lambda out: StageOutput(fingerprint=fingerprint, figures=figures),
    )


def test_every_stage_has_a_config_a_runner_and_a_version(settings: PipelineConfig) -> None:
    assert list(RUNNERS) == list(STAGES)
    for name, stage in STAGES.items():
        assert stage_config(settings, name) is not None
        assert stage.version >= 1
        assert set(stage.needs) <= set(STAGES)
        # In the order of the table, what a stage needs comes before it.
        assert list(with_upstream((name,)))[-1] == name


def test_the_folders_are_those_of_the_contract() -> None:
    assert [stage.folder for stage in STAGES.values()] == [
        "pairs", "teacher", "annotations", "student", "export", "scores",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["teacher", "annotate", "student", "export", "score"])
def test_a_stage_without_its_inputs_says_which_one_is_missing(name: str, settings: PipelineConfig) -> None:
    with pytest.raises(ContractError, match="has no pairs yet"):
        RUNNERS[name](settings)
    with pytest.raises(ContractError, match="has no pairs yet"):
        stage_inputs(settings, name)


def test_inputs_follow_the_fingerprints_and_a_base_model_of_ones_own(settings: PipelineConfig, tmp_path: Path) -> None:
    complete(settings, "data", "d1")
    assert stage_inputs(settings, "teacher") == {"data": "d1"}
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    changed = load_preset("sample", [f"runs={settings.runs}", f"teacher.model=path:{own}"])
    before = stage_inputs(changed, "teacher")["base"]
    (own / "config.json").write_text('{"a": 1}')
    assert stage_inputs(changed, "teacher")["base"] != before
    shutil.rmtree(stage_folder(settings, "data"))
    complete(settings, "data", "d2")
    assert stage_inputs(settings, "teacher") == {"data": "d2"}


def test_the_student_learns_from_this_runs_annotations_not_the_newest(settings: PipelineConfig) -> None:
    complete(settings, "annotate", annotation_key="k7")
    folder = stage_folder(settings, "annotate")
    assert stages._with_key(settings, folder).annotation_key == "k7"
    chosen = load_preset("sample", [f"runs={settings.runs}", "student.annotation_key=mine"])
    assert stages._with_key(chosen, folder).annotation_key == "mine"
