"""The record of executions holds what happened, whole, and no secret."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.executions import EXECUTIONS, FLOW, Registration, executing, read_executions, reused
from pipeline.settings import PipelineConfig, load_preset
from tests.pipeline.tracking.helpers import python


@pytest.fixture
def settings(tmp_path: Path) -> PipelineConfig:
    return load_preset("sample", [f"runs={tmp_path}", "tracking.enabled=false"])


def statuses(settings: PipelineConfig) -> list[str]:
    return [each.status for each in read_executions(settings.folder)]


def test_an_execution_is_recorded_with_its_result(settings: PipelineConfig) -> None:
    run, export, student = settings.folder, settings.folder / "export", settings.folder / "student"
    with executing(settings, FLOW, run, config=settings, inputs={}, tags={"flow": "f", "stages": "a b"}):
        inputs, sources = {"student": "s1", "source": ""}, {"student": student, "source": "s3://me:hunter2@bucket"}
        with executing(
            settings, "export", export, config=settings.export, inputs=inputs, sources=sources,
            tags={"api_key": "hunter2"}, experiment="student-export",
        ) as execution:  # fmt: skip
            (run / "report.html").write_text("")
            model = Registration(role="student", folder=export, student=student)
            artifacts = [run / "report.html", export / "not-there.md"]
            execution.finish({"auc": 0.9, "n": {"token": "hunter2"}}, "e1", artifacts, model)
        reused("data", run / "pairs")
    whole, part = read_executions(run)
    assert (whole.status, whole.reused, whole.experiment) == ("FINISHED", {"data": ""}, "ads-relevance/f")
    assert (part.status, part.parent, part.experiment) == ("FINISHED", whole.execution, "ads-relevance/student-export")
    assert (part.fingerprint, part.metrics["auc"], part.config) == ("e1", 0.9, settings.export.model_dump(mode="json"))
    assert part.artifacts == ["../report.html"]
    assert part.inputs["student"] == {"fingerprint": "s1", "source": str(student.resolve()), "counts": {}}
    assert part.model == Registration(role="student", folder=Path("."), student=Path("../student"))
    assert "hunter2" not in (run / EXECUTIONS).read_text()


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_an_error_is_recorded_without_logins(settings: PipelineConfig, error: type[BaseException], status: str) -> None:
    def fail() -> None:
        with executing(settings, "data", settings.folder / "pairs", config={}, inputs={}) as execution:
            execution.finish({"rows": 1}, "f", (), Registration(role="teacher", folder=settings.folder))
            raise error("https://me:hunter2@host is away\nand more")

    with pytest.raises(error):
        fail()
    (recorded,) = read_executions(settings.folder)
    assert (recorded.status, recorded.error) == (status, "https://***@host is away")
    assert recorded.model is None  # nothing of what failed is registered


def test_a_killed_process_leaves_an_execution_that_was_killed(settings: PipelineConfig) -> None:
    done = python("with stage('student'): os.kill(os.getpid(), signal.SIGKILL)", settings.runs)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with (settings.folder / EXECUTIONS).open("a") as file:
        file.write('{"execution": "')  # cut short in the middle of a line
    assert statuses(settings) == ["KILLED"]
    with executing(settings, "student", settings.folder / "student", config={}, inputs={}):
        assert statuses(settings) == ["KILLED", "RUNNING"]
    assert statuses(settings) == ["KILLED", "FINISHED"]


def test_what_runs_on_another_machine_was_killed_when_it_begins_again(settings: PipelineConfig) -> None:
    for _ in range(2):
        with executing(settings, "score", settings.folder / "scores", config={}, inputs={}):
            pass
    begin, _, again, _ = map(json.loads, (settings.folder / EXECUTIONS).read_text().splitlines())
    lines = [begin | {"host": "elsewhere"}, again | {"host": "elsewhere"}]
    for number, expected in ((1, ["RUNNING"]), (2, ["KILLED", "RUNNING"])):
        (settings.folder / EXECUTIONS).write_text("".join(json.dumps(line) + "\n" for line in lines[:number]))
        assert statuses(settings) == expected


def test_lines_of_several_writers_stay_whole(settings: PipelineConfig) -> None:
    def write(number: int) -> None:
        folder = settings.folder / str(number)
        with executing(settings, f"stage{number}", folder, config={"x": "y" * 5000}, inputs={}) as execution:
            execution.finish({"number": number})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert sorted(each.metrics["number"] for each in read_executions(settings.folder)) == list(range(40))


def test_a_full_disk_is_a_warning_and_does_not_stop_the_work(settings: PipelineConfig) -> None:
    # As on a full disk, writing fails with an error, here in the middle of a line.
    code = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with stage("student") as execution:
    size = (settings.folder / "executions.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
    execution.finish({"x": "y" * 1000})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with stage("export"):
    print("the work went on")
"""
    done = python(code, settings.runs)
    assert done.stdout == "the work went on\n", done.stderr
    assert done.stderr.count("executions.jsonl is not complete") == 1
    assert statuses(settings) == ["KILLED", "FINISHED"]
