"""The flows under a real Prefect engine, with stages that only write a line."""

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from httpx import ConnectError
from prefect.flows import load_flow_from_entrypoint

from data.contracts import ContractError, Unavailable
from flows import cli, relevance
from flows.catalog import FLOWS
from flows.deploy import fill
from pipeline import locks
from pipeline.artifacts import StageOutput, read_record
from pipeline.locks import exclusive, own_gpus, visible_gpus
from pipeline.plan import plan
from pipeline.resume import remember
from pipeline.settings import PipelineConfig, apply_overrides, choose, load_preset
from pipeline.stages import STAGES, with_upstream

pytestmark = pytest.mark.usefixtures("server")
ROOT = Path(__file__).parents[2]
Works = Callable[[str, Callable[..., StageOutput]], None]


@pytest.fixture
def settings(tmp_path: Path) -> PipelineConfig:
    return load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false"])


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Works:
    """Gives a stage other work."""
    return lambda name, work: monkeypatch.setitem(STAGES, name, replace(STAGES[name], work=work))


@pytest.fixture
def calls(works: Works) -> list[str]:
    """Stages that run: each leaves its name here."""
    ran: list[str] = []

    def work(name: str) -> Callable[..., StageOutput]:
        def run(settings: PipelineConfig, folders: dict[str, Path], out: Path) -> StageOutput:
            ran.append(name)
            (out / "made").write_text(name)
            return StageOutput(fingerprint=f"{name}{settings.teacher.seed}", figures={"rows": 3})

        return run

    for name in STAGES:
        works(name, work(name))
    return ran


def failing(*errors: BaseException | signal.Signals) -> Callable[..., StageOutput]:
    """Work that raises these or gets these signals, one at each try, and then succeeds."""
    left = list(errors)

    def run(settings: PipelineConfig, folders: dict[str, Path], out: Path) -> StageOutput:
        if left:
            error = left.pop(0)
            if isinstance(error, BaseException):
                raise error
            signal.raise_signal(error)
        return StageOutput(fingerprint="f", figures={})

    return run


def test_the_pipeline_runs_once_and_then_reuses(
    settings: PipelineConfig, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run_here("relevance-pipeline", settings)
    assert calls == ["data", "teacher", "annotate", "student", "export"]
    summary = json.loads((settings.folder / "summary.json").read_text())
    assert list(summary["stages"]) == calls
    assert summary["stages"]["data"]["figures"] == {"rows": 3}
    printed = capsys.readouterr().out
    assert "relevance-pipeline, run 'sample'" in printed
    assert "again: prefect run relevance-pipeline --preset sample" in printed

    calls.clear()
    cli.run_here("relevance-pipeline", settings)
    assert calls == []
    assert all(
        stage["reused"] for stage in json.loads((settings.folder / "summary.json").read_text())["stages"].values()
    )

    cli.run_here("student-score", apply_overrides(settings, ["student.seed=5"]))
    assert calls == ["student", "score"]  # the fake student's fingerprint stays, so its export is still good


def test_a_student_from_labels_needs_no_teacher_and_leaves_its_pairs_to_the_pipeline(
    settings: PipelineConfig, calls: list[str]
) -> None:
    cli.run_here("student-from-labels", settings)
    assert calls == ["data", "student", "export"]
    record = read_record(settings.folder / "student")
    assert record is not None
    assert (list(record.inputs), record.config["use_annotations"]) == (["data"], False)
    # What is remembered is what was given, so that the next flow of this run is not bound to do without annotations.
    _, again = cli.chosen("relevance-pipeline", cli.Options(resume="sample", runs=settings.runs))
    assert again == settings
    calls.clear()
    cli.run_here("relevance-pipeline", again)
    assert calls == [
        "teacher",
        "annotate",
        "student",
    ]  # the fake student's fingerprint stays, so its export is still good
    assert (settings.folder / "student.previous").is_dir()
    without = apply_overrides(settings, ["student.use_annotations=false"])
    assert [row.stage for row in plan(without, with_upstream(("score",), without))] == [
        "data",
        "student",
        "export",
        "score",
    ]


@pytest.mark.e2e
def test_the_loop_runs_rounds_until_the_budget_is_spent_or_gains_stop_and_resumes(
    settings: PipelineConfig, calls: list[str], works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    aucs = {0: 0.6, 30: 0.7, 60: 0.75, 90: 0.74}
    before: list[int] = []

    def annotate(settings: PipelineConfig, folders: dict[str, Path], out: Path) -> StageOutput:
        select, student = settings.annotate.select, settings.annotate.student
        if "uncertain" in select.shares:
            assert student is not None
            assert json.loads((student / "student.json").read_text())["fingerprint"] == f"student {select.pairs - 30}"
        before.append(len(list(out.glob("rows-*"))))
        calls.append(f"annotate {select.pairs}")
        (out / f"rows-{select.pairs}").touch()
        tokens = {"prompt_tokens": select.pairs, "completion_tokens": 0}
        return StageOutput(fingerprint=str(select.pairs), figures={"pairs": select.pairs} | tokens)

    def student(settings: PipelineConfig, folders: dict[str, Path], out: Path) -> StageOutput:
        pairs = settings.annotate.select.pairs
        if pairs == 60 and fails:
            raise fails.pop()
        figures = {"valid_roc_auc": aucs[pairs], "test_roc_auc": 0.5}
        return StageOutput(fingerprint=str(pairs), figures=figures)

    def export(settings: PipelineConfig, folders: dict[str, Path], out: Path) -> StageOutput:
        fingerprint = f"student {settings.annotate.select.pairs}"
        (out / "student.json").write_text(json.dumps({"fingerprint": fingerprint}))
        return StageOutput(fingerprint=fingerprint, figures={})

    fails = [ContractError("the power went")]
    works("annotate", annotate)
    works("student", student)
    works("export", export)
    chosen = ["loop.select.pairs=120", "loop.rounds=4", "loop.select.uncertain=1", "loop.compare_random=true"]
    settings = apply_overrides(settings, chosen)
    with pytest.raises(SystemExit):
        cli.run_here("relevance-loop", settings)
    assert [call for call in calls if call.startswith("annotate")] == ["annotate 30", "annotate 60"]
    assert calls.count("teacher") == 1
    name, again = cli.chosen("", cli.Options(resume="sample", runs=settings.runs))
    calls.clear()
    cli.run_here(name, again)
    # The third round gains nothing, so the fourth is not run; by chance all is the same.
    assert calls.count("teacher") == 0
    assert [call for call in calls if call.startswith("annotate")] == [
        "annotate 90",
        *(f"annotate {pairs}" for pairs in (30, 60, 90)),
    ]
    assert before == [0, 1, 2, 0, 1, 2]
    points = json.loads((settings.folder / "loop.json").read_text())["rounds"]
    assert [(each["kind"], each["pairs"], each["valid_roc_auc"]) for each in points] == [
        ("round", 0, 0.6),
        *((kind, pairs, aucs[pairs]) for kind in ("round", "random") for pairs in (30, 60, 90)),
    ]
    page = (settings.folder / "loop.html").read_text()
    assert "by chance" in page
    assert "sample-random-3/report.html" in page


def test_a_refusal_is_one_line_with_the_way_to_go_on_and_exit_code_1(
    settings: PipelineConfig, works: Works, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    works("data", failing(ContractError("there is no such file; name another")))
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as ended:
        cli.run_here("data-prepare", settings, Path("my shop.toml"))
    assert ended.value.code == 1
    *_, error, remedy = capsys.readouterr().err.strip().splitlines()
    assert error == "error: there is no such file; name another"
    assert remedy.endswith(f": prefect run --resume sample --runs {settings.runs} --config 'my shop.toml'")
    assert not [record for record in caplog.records if record.exc_info and record.exc_info[1]]
    said = [record.getMessage() for record in caplog.records]
    assert any("there is no such file; name another" in line for line in said)
    assert not [line for line in said if "--resume" in line]  # once is enough


def test_a_deployments_log_says_how_to_go_on(
    settings: PipelineConfig, works: Works, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "1")
    works("data", failing(ContractError("there is no such file; name another")))
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit):
        cli.run_here("data-prepare", settings)
    (advice,) = [record.getMessage() for record in caplog.records if "--resume" in record.getMessage()]
    assert f"prefect run --resume sample --runs {settings.runs}" in advice


def test_only_a_service_that_was_away_is_tried_again(
    settings: PipelineConfig, works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relevance, "RETRY_SECONDS", 0.01)
    works("data", failing(Unavailable("no server answers"), Unavailable("nor now")))
    cli.run_here("data-prepare", settings)
    assert read_record(settings.folder / "pairs") is not None

    works("data", failing(ContractError("a bad file")))
    with pytest.raises(SystemExit):
        cli.run_here("data-prepare", apply_overrides(settings, ["data.seed=1"]))


def test_drift_is_an_event_once(settings: PipelineConfig, works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[Any, ...]] = []
    monkeypatch.setattr(relevance, "emit_event", lambda *given, **payload: events.append((*given, payload)))
    works("data", lambda *_: StageOutput(fingerprint="f", figures={"rows": 3, "drift": "look", "drift_psi": 0.2}))
    for _ in range(2):  # the second time it is reused
        cli.run_here("data-prepare", settings)
    ((event, resource, payload),) = events
    assert (event, resource["prefect.resource.name"]) == ("ads-relevance.drift.look", "sample")
    assert payload == {"payload": {"stage": "data", "psi": 0.2}}


def test_a_run_goes_on_by_its_name_with_what_is_given_over_its_own_settings(
    settings: PipelineConfig, calls: list[str], tmp_path: Path
) -> None:
    begun = apply_overrides(settings, ["run=trial", "teacher.seed=4", "student.seed=4"])
    cli.run_here("annotate", begun)
    file = tmp_path / "mended.toml"
    file.write_text("[teacher]\nseed = 5\n")

    def resumed(flow: str = "", **options: Any) -> tuple[str, PipelineConfig]:
        return cli.chosen(flow, cli.Options(**{"resume": "trial", "runs": tmp_path} | options))

    assert resumed() == ("annotate", begun)
    assert resumed("relevance-pipeline", config=file) == (
        "relevance-pipeline",
        apply_overrides(begun, ["teacher.seed=5"]),
    )
    assert resumed(config=file, set_=("teacher.seed=6",))[1] == apply_overrides(begun, ["teacher.seed=6"])
    changed = resumed(preset="cpu-real", config=file)[1]
    assert (changed.run, changed.preset, changed.teacher.seed, changed.student.seed) == ("trial", "cpu-real", 5, 4)
    assert changed.data.source == "home_depot"  # in the place of the made-up shop
    with pytest.raises(ContractError, match=r"no run 'trail' in .*: did you mean trial"):
        resumed(resume="trail")
    with pytest.raises(ContractError, match="leave --name out"):
        resumed(name="other")


@pytest.mark.parametrize("preset", ["own-data", "cpu-real", "single-gpu", "cluster", "sample"])
@pytest.mark.parametrize("source", ['source = "table"\n', "", 'source = "qadsm"\n'])
def test_a_run_on_data_of_ones_own_stays_on_it_with_another_preset(source: str, preset: str, tmp_path: Path) -> None:
    table = "" if "qadsm" in source else "columns = { query = 'q', ad_title = 't', grade = 'g' }\n"
    grades = "grades = [{ name = 'no', definition = 'No.' }, { name = 'yes', definition = 'Yes.' }]\n" if table else ""
    (tmp_path / "shop.toml").write_text(f"[data]\n{source}path = 'shop.csv'\n{table}{grades}")
    started = {name: choose(name, tmp_path / "shop.toml", "shop", tmp_path) for name in ("sample", preset)}
    remember(started["sample"], "relevance-pipeline")
    resumed = cli.chosen("", cli.Options(resume="shop", preset=preset, runs=tmp_path))[1]
    assert resumed.data.source_name == started[preset].data.source_name
    assert resumed.data == started[preset].data


def test_a_secret_is_not_kept_with_a_run_and_is_asked_for(tmp_path: Path) -> None:
    key = "spark.extra.spark.hadoop.fs.s3a.secret.key"
    begun = load_preset("sample", [f"runs={tmp_path}", "run=s", f"{key}=hunter2"])
    remember(begun, "annotate")
    assert "hunter2" not in (begun.folder / "settings.json").read_text()
    with pytest.raises(ContractError, match=f"add --set {key}="):
        cli.chosen("", cli.Options(resume="s", runs=tmp_path))
    assert cli.chosen("", cli.Options(resume="s", runs=tmp_path, set_=(f"{key}=hunter2",)))[1] == begun


def test_another_run_takes_what_is_the_same(settings: PipelineConfig, calls: list[str]) -> None:
    cli.run_here("relevance-pipeline", settings)
    calls.clear()
    trial = apply_overrides(settings, ["run=trial", "student.seed=5"])
    planned = {row.stage: (row.action, row.reason) for row in plan(trial, tuple(STAGES)[:5])}
    assert [action for action, _ in planned.values()] == ["reuse", "reuse", "reuse", "run", "run"]
    assert planned["teacher"][1].startswith("run 'sample' has made the same")
    cli.run_here("relevance-pipeline", trial)
    assert calls == ["student"]  # the fake student's fingerprint stays, so its export is still good
    assert read_record(trial.folder / "teacher").made_by == "sample"  # type: ignore[union-attr]
    assert (trial.folder / "teacher" / "made").read_text() == (settings.folder / "teacher" / "made").read_text()


def test_a_held_stage_stays_as_it_is_and_is_not_trained_by_surprise(settings: PipelineConfig, calls: list[str]) -> None:
    cli.run_here("annotate", settings)
    calls.clear()
    held = apply_overrides(settings, ["teacher.seed=5", 'hold=["teacher"]'])
    assert [row.action for row in plan(held, ("data", "teacher"))] == ["reuse", "reuse"]
    cli.run_here("annotate", held)
    assert calls == []
    teacher = settings.folder / "teacher"
    teacher.rename(teacher.with_name("teacher.previous"))
    with pytest.raises(ContractError, match=r"teacher is to be held, and .* is not finished"):
        plan(held, ("data", "teacher"))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RuntimeError("a defect"), 1, "RuntimeError: a defect"),
        (ConnectError("[Errno 111] Connection refused"), 1, "Prefect's server does not answer any more"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
    ],
)
def test_other_endings(
    error: BaseException | signal.Signals,
    code: int,
    words: str,
    settings: PipelineConfig,
    works: Works,
    capsys: pytest.CaptureFixture[str],
) -> None:
    works("data", failing(error))
    with pytest.raises(SystemExit) as ended:
        cli.run_here("data-prepare", settings)
    assert ended.value.code == code
    *_, message, remedy = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("error: ")
    assert words in message
    assert "prefect run --resume sample" in remedy


@pytest.mark.parametrize(
    ("flow", "setting"), [("student-export", "export.bf16=true"), ("student-score", "score.precision=bf16")]
)
def test_what_this_machine_cannot_do_is_said_before_anything_runs(
    flow: str, setting: str, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    settings = load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false", setting])
    with pytest.raises(SystemExit):
        cli.run_here(flow, settings)
    assert calls == []
    cli.run_here("data-prepare", settings)
    assert calls == ["data"]


def test_a_run_that_is_in_use_gets_no_advice_to_go_on(
    settings: PipelineConfig, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    remember(settings, "data-prepare")
    with exclusive(settings.folder), pytest.raises(SystemExit):
        cli.run_here("data-prepare", settings)
    assert "is in use by process" in (shown := capsys.readouterr().err)
    assert "--resume" not in shown


def test_a_reused_stage_needs_no_gpu(
    settings: PipelineConfig, calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    cli.run_here("student-distill", settings)
    with own_gpus():
        cli.run_here("student-distill", settings)
        with pytest.raises(SystemExit):
            cli.run_here("student-distill", apply_overrides(settings, ["student.seed=9"]))
    assert calls == ["data", "teacher", "annotate", "student"]


def test_a_deployment_keeps_no_secret() -> None:
    with pytest.raises(ContractError, match=r"spark\.extra\..*secret\.key would be shown"):
        fill(set=["spark.extra.spark.hadoop.fs.s3a.secret.key=hunter2"])


def test_a_config_file_names_the_run(tmp_path: Path) -> None:
    file = tmp_path / "shop.toml"
    file.write_text("[teacher]\nseed = 4\n")
    assert cli.chosen("annotate", cli.Options(config=file))[1].run == "shop"
    assert cli.chosen("annotate", cli.Options(config=file, name="other"))[1].run == "other"
    odd = file.rename(tmp_path / "my shop.toml")
    with pytest.raises(ContractError, match="'my shop' cannot name a run; give one with --name"):
        cli.chosen("annotate", cli.Options(config=odd))
    odd.write_text('run = "named"\n')
    assert cli.chosen("annotate", cli.Options(config=odd))[1].run == "named"


def _hold(folder: Path, ready: object, done: object) -> None:
    with exclusive(folder):
        ready.set()  # type: ignore[attr-defined]
        done.wait(60)  # type: ignore[attr-defined]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """Another process that holds the folder `a`, and the event that has it end."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "a", ready, done))
    process.start()
    assert ready.wait(60)
    yield process, done
    if process.is_alive():  # an event waits for all that wait for it, also for the dead
        done.set()
    process.join(60)


def test_two_processes_cannot_share_a_run_and_one_that_was_killed_holds_nothing(
    tmp_path: Path, holder: tuple[Any, Any]
) -> None:
    process, _ = holder
    with pytest.raises(ContractError, match=f"in use by process {process.pid}"), exclusive(tmp_path / "a"):
        pass
    with exclusive(tmp_path / "b"):
        pass
    process.kill()
    process.join(60)
    with exclusive(tmp_path / "a"):
        pass


def test_a_flow_can_wait_for_a_run_that_is_in_use(
    tmp_path: Path, holder: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.05)
    threading.Timer(0.5, holder[1].set).start()
    with exclusive(tmp_path / "a", wait=60):
        assert holder[1].is_set()


def test_a_folder_of_runs_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ContractError, match="cannot be made"), exclusive(tmp_path / "runs" / "a"):
        pass


def test_two_trainings_do_not_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert visible_gpus() == ["0", "1"]
    with own_gpus():
        with pytest.raises(ContractError, match=f"GPU 0 is in use by process {os.getpid()}"), own_gpus():
            pass
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
        with own_gpus():
            pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with own_gpus(), own_gpus():  # on the CPU nobody waits
        pass


STEPS = ("flows.deploy.fill", "flows.deploy.end_silent_runs")


def test_deployments_are_valid() -> None:
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    deployments = {each["name"]: each for each in content["deployments"]}
    assert set(deployments) == {
        "nightly-annotate",
        "weekly-pipeline",
        "teacher-train",
        "student-from-labels",
        "student-export",
    }
    for deployment in deployments.values():
        flow = load_flow_from_entrypoint(str(ROOT / deployment["entrypoint"]))
        assert flow.name in FLOWS
        # As `prefect deploy` does: the step's output is the parameters, so that the form shows the values that will run.
        chosen, silence = (deployment["build"][i][step] for i, step in enumerate(STEPS))
        assert silence == {"minutes": 5}
        assert deployment["parameters"] == {"settings": "{{ settings }}"}
        filled = fill(**chosen)
        assert filled["settings"]["data"]["rows"] == load_preset("sample").data.rows
        parameters = flow.validate_parameters(json.loads(json.dumps(filled)))
        assert parameters["settings"] == load_preset("sample", [f"run={chosen['name']}", *chosen["set"]])
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
