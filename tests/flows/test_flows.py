"""The flows under a real Prefect engine, with stages that only write a line."""

import json
import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.testing.utilities import prefect_test_harness

from data.schema import ContractError
from flows import cli
from flows.catalog import FLOWS
from flows.runtime import exclusive
from pipeline import stages
from pipeline.artifacts import StageOutput, StageRecord, run_stage
from pipeline.settings import PipelineConfig, load_preset
from pipeline.stages import STAGES, stage_config, stage_inputs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def settings(tmp_path: Path) -> PipelineConfig:
    return load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that run: each leaves its name here."""
    ran: list[str] = []

    def runner(name: str):  # type: ignore[no-untyped-def]
        def run(settings: PipelineConfig) -> StageRecord:
            def work(out: Path) -> StageOutput:
                ran.append(name)
                return StageOutput(fingerprint=f"{name}{settings.teacher.seed}", figures={"rows": 3})

            return run_stage(
                settings.folder / STAGES[name].folder,
                stage=name,
                config=stage_config(settings, name),
                inputs=stage_inputs(settings, name),
                code=["data.schema"],
                work=work,
            )

        return run

    monkeypatch.setattr(stages, "RUNNERS", {name: runner(name) for name in STAGES})
    return ran


def test_the_pipeline_runs_once_and_then_reuses(
    settings: PipelineConfig, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cli._run("relevance-pipeline", settings)
    assert calls == ["data", "teacher", "annotate", "student", "export"]
    summary = json.loads((settings.folder / "summary.json").read_text())
    assert list(summary["stages"]) == calls
    assert summary["stages"]["data"]["figures"] == {"rows": 3}
    assert (settings.folder / "report.html").exists()
    printed = capsys.readouterr().out
    assert "relevance-pipeline, run 'sample'" in printed
    assert "again: prefect run relevance-pipeline --preset sample" in printed

    calls.clear()
    cli._run("relevance-pipeline", settings)
    assert calls == []
    assert all(
        stage["reused"] for stage in json.loads((settings.folder / "summary.json").read_text())["stages"].values()
    )

    changed = load_preset("sample", [f"runs={settings.runs}", "tracking.enabled=false", "student.seed=5"])
    cli._run("student-score", changed)
    assert calls == ["student", "score"]  # the fake student's fingerprint stays, so its export is still good


def test_a_refusal_is_one_line_and_exit_code_1(
    settings: PipelineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def refuse(settings: PipelineConfig) -> StageRecord:
        raise ContractError("there is no such file; name another")

    monkeypatch.setattr(stages, "RUNNERS", {"data": refuse})
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as ended:
        cli._run("data-prepare", settings)
    assert ended.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: there is no such file; name another"
    assert not [record for record in caplog.records if record.exc_info and record.exc_info[1]]
    assert [record.getMessage() for record in caplog.records].count("there is no such file; name another") == 1


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("a defect"), 1), (KeyboardInterrupt(), 130)])
def test_other_endings(
    error: BaseException, code: int, settings: PipelineConfig, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(settings: PipelineConfig) -> StageRecord:
        raise error

    monkeypatch.setattr(stages, "RUNNERS", {"data": fail})
    with pytest.raises(SystemExit) as ended:
        cli._run("data-prepare", settings)
    assert ended.value.code == code
    assert "error: " in capsys.readouterr().err


def _hold(folder: Path, ready: object, done: object) -> None:
    with exclusive(folder):
        ready.set()  # type: ignore[attr-defined]
        done.wait(60)  # type: ignore[attr-defined]


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "a", ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ContractError, match=f"in use by process {other.pid}"), exclusive(tmp_path / "a"):
            pass
        with exclusive(tmp_path / "b"):
            pass
    finally:
        done.set()
        other.join(60)
    with exclusive(tmp_path / "a"):
        pass


def test_deployments_are_valid() -> None:
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    deployments = {each["name"]: each for each in content["deployments"]}
    assert set(deployments) == {"nightly-annotate", "weekly-pipeline", "teacher-train", "student-export"}
    for deployment in deployments.values():
        flow = load_flow_from_entrypoint(str(ROOT / deployment["entrypoint"]))
        assert flow.name in FLOWS
        parameters = flow.validate_parameters(deployment["parameters"])
        assert isinstance(parameters["settings"], PipelineConfig)
        assert deployment["work_pool"]["name"] == "ads-relevance"
    scheduled = {name for name, each in deployments.items() if any("cron" in s for s in each.get("schedules", []))}
    assert scheduled == {"nightly-annotate", "weekly-pipeline"}


def test_forms_show_names_types_and_help_and_refuse_bad_values() -> None:
    for entry in FLOWS.values():
        flow = load_flow_from_entrypoint(f"{ROOT / 'flows' / 'relevance.py'}:{entry.function}")
        assert (flow.name, flow.description) == (entry.name, entry.help)
    schema = flow.parameters.model_dump()
    teacher = schema["definitions"]["TeacherConfig"]["properties"]
    assert teacher["seed"]["description"].startswith("Fixes the choice")
    assert teacher["seed"]["type"] == "integer"
    with pytest.raises(Exception, match="sed"):
        flow.validate_parameters({"settings": {"teacher": {"sed": 1}}})
