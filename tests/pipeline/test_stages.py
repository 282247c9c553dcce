"""How stages are joined: their versions, their inputs, what is passed from one to the next."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.contracts import ContractError, digest
from pipeline.artifacts import Recipe, StageOutput, read_record, run_stage
from pipeline.plan import plan
from pipeline.settings import PipelineConfig, load_preset
from pipeline.stage import Stage
from pipeline.stages import STAGES, with_upstream

ROOT = Path(__file__).parents[2]
PIPELINE = ("data", "teacher", "annotate", "student", "export")


@pytest.fixture
def settings(tmp_path: Path) -> PipelineConfig:
    return load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false"])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that work: each leaves its name here, and makes something that depends on what it reads."""
    names: list[str] = []

    def work(name: str, version: int) -> Callable[..., StageOutput]:
        def run(settings: PipelineConfig, folders: dict[str, Path], out: Path) -> StageOutput:
            names.append(name)
            upstream = [read_record(folder).fingerprint for folder in folders.values()]  # type: ignore[union-attr]
            return StageOutput(fingerprint=digest([name, version, upstream]), figures={})

        return run

    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, replace(stage, work=work(name, stage.version)))
    return names


def complete(settings: PipelineConfig, name: str, fingerprint: str = "f", **figures: object) -> None:
    run_stage(
        STAGES[name].path(settings),
        Recipe(name, STAGES[name].config(settings), {}),
        lambda out: StageOutput(fingerprint=fingerprint, figures=figures),
    )


def test_every_stage_has_a_config_and_a_version(settings: PipelineConfig) -> None:
    for name, stage in STAGES.items():
        assert stage.config(settings) is not None
        assert stage.version >= 1
        # In the order of the table, what a stage needs comes before it.
        assert list(with_upstream((name,), settings))[-1] == name


def test_the_folders_are_those_of_the_contract() -> None:
    assert [stage.folder for stage in STAGES.values()] == [
        "pairs", "teacher", "annotations", "student", "export", "scores",
    ]  # fmt: skip


def test_one_object_is_a_whole_stage(settings: PipelineConfig) -> None:
    def work(settings: PipelineConfig, folders: dict[str, Path], out: Path) -> StageOutput:
        (out / "note.txt").write_text(str(folders["data"]))
        return StageOutput(fingerprint="n", figures={"rows": 1})

    complete(settings, "data")
    added = Stage("spark", "notes", "notes", work, needs=(STAGES["data"],))
    assert not added.run(settings).reused
    assert added.run(settings).reused
    assert (settings.folder / "notes" / "note.txt").read_text() == str(settings.folder / "pairs")


@pytest.mark.parametrize("name", ["teacher", "annotate", "student", "export", "score"])
def test_a_stage_without_its_inputs_says_which_one_is_missing(name: str, settings: PipelineConfig) -> None:
    with pytest.raises(ContractError, match="has no pairs yet"):
        STAGES[name].run(settings)


def test_a_higher_version_makes_that_stage_and_what_follows_stale_and_nothing_else(
    settings: PipelineConfig, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_all() -> list[str]:
        ran.clear()
        for name in PIPELINE:
            STAGES[name].run(settings)
        return ran

    assert run_all() == list(PIPELINE)
    assert run_all() == []

    def raised(settings: PipelineConfig, folders: dict[str, Path], out: Path) -> StageOutput:
        ran.append("annotate")
        return StageOutput(fingerprint="of another meaning", figures={})

    made_by = STAGES["annotate"].version
    monkeypatch.setitem(STAGES, "annotate", replace(STAGES["annotate"], version=9, work=raised))
    planned = {row.stage: (row.action, row.reason) for row in plan(settings, PIPELINE)}
    assert [action for action, _ in planned.values()] == ["reuse", "reuse", "run", "run", "run"]
    assert planned["annotate"][1] == f"version 9 of the stage, made by version {made_by}"
    assert planned["student"][1] == "annotate would run before it"
    assert run_all() == ["annotate", "student", "export"]
    assert run_all() == []


def test_a_comment_in_the_source_makes_nothing_stale(settings: PipelineConfig, ran: list[str], tmp_path: Path) -> None:
    for name in PIPELINE:
        STAGES[name].run(settings)
    for room in ("data", "teacher", "student", "pipeline", "flows"):
        shutil.copytree(ROOT / room, tmp_path / "code" / room, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (tmp_path / "code" / room).rglob("*.py"):
            file.write_text(f"{file.read_text(encoding='utf-8')}\n# A comment.\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "relevance-pipeline", "--runs", str(settings.runs), "--dry-run"],
        cwd=tmp_path / "code", env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["reuse"] * 5


def test_inputs_follow_the_fingerprints_and_a_base_model_of_ones_own(settings: PipelineConfig, tmp_path: Path) -> None:
    def fingerprints(settings: PipelineConfig, name: str = "teacher") -> dict[str, str]:
        return {name: each.fingerprint for name, each in STAGES[name].inputs(settings).items()}

    complete(settings, "data", "d1")
    assert fingerprints(settings) == {"data": "d1"}
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    changed = load_preset("sample", [f"runs={settings.runs}", f"teacher.model=path:{own}"])
    before = fingerprints(changed)["base"]
    assert STAGES["teacher"].inputs(changed)["base"].place == own
    (own / "config.json").write_text('{"a": 1}')
    assert fingerprints(changed)["base"] != before
    shutil.rmtree(STAGES["data"].path(settings))
    complete(settings, "data", "d2", fingerprint_labelled="l")
    complete(settings, "annotate", "a")
    assert fingerprints(settings) == {"data": "l"}  # new pairs in the pool leave the teacher as it is
    assert fingerprints(settings, "student") == {"data": "d2", "annotate": "a"}


def test_the_student_learns_from_this_runs_annotations_not_the_newest(
    settings: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    monkeypatch.setattr("pipeline.weights.resolve_model", lambda *names, **more: None)
    monkeypatch.setattr(
        "student.distill.distill",
        lambda config, *more: (keys.append(config.annotation_key), SimpleNamespace(fingerprint="s", figures={}))[1],
    )
    complete(settings, "data")
    complete(settings, "annotate", annotation_key="k7")
    STAGES["student"].run(settings)
    chosen: Any = load_preset(
        "sample", [f"runs={settings.runs}", "tracking.enabled=false", "student.annotation_key=mine"]
    )
    STAGES["student"].run(chosen)
    assert keys == ["k7", "mine"]


def test_the_teacher_stage_hands_over_the_model_that_gives_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("pipeline.weights.resolve_model", lambda spec, **_: Path(spec))
    monkeypatch.setattr(
        "teacher.train.train_teacher", lambda config, base, pairs, out, **more: given.update(base=base, **more)
    )
    model = tmp_path / "large"
    model.mkdir()
    asked = ("teacher.warm_start.reasons=engine", f"teacher.warm_start.reason_model=path:{model}")
    for overrides, expected in (((), None), (asked, Path(f"path:{model}"))):
        settings = load_preset("sample", [*overrides, f"weights_cache={tmp_path}"])
        STAGES["teacher"].work(settings, {"data": tmp_path}, tmp_path)
        assert given == {"base": Path("scratch:small"), "reason_model": expected, "cache": tmp_path / "reasons"}
        inputs = STAGES["teacher"].reads_besides(settings)
        # How a model is asked counts for those that ask one; the others' teachers stay as they are when it changes.
        assert [each.place for each in inputs.values()] == ([model, "teacher.reasons"] if overrides else [])
