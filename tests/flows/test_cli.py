"""The verb as people and scripts meet it: what it prints and how it ends."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.catalog import FLOWS
from flows.cli import run_app
from pipeline.artifacts import StageOutput, run_stage
from pipeline.settings import PipelineConfig, load_preset
from pipeline.stages import STAGES, with_upstream

ROOT = Path(__file__).parents[2]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line; returns its exit code, and what it prints to stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run_app(arguments)
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_alone_it_lists_the_flows(run: Run) -> None:
    code, out, _ = run()
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(FLOWS)
    assert all(len(line.split()) > 3 for line in out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("teacher-trian",), "no flow 'teacher-trian': did you mean teacher-train?"),
        (("teacher-train", "--preset", "sampel"), "no preset 'sampel': did you mean sample?"),
        (("teacher-train", "--set", "teacher.sed=1"), "unknown key 'teacher.sed': did you mean teacher.seed"),
        (("teacher-train", "--set", "teacher.seed=-1"), "teacher.seed: "),
        (("teacher-train", "--set", "nonsense"), "key=value"),
        (("teacher-train", "--config", "nowhere.toml"), "nowhere.toml cannot be read (No such file or directory)"),
        (("teacher-train", "--name", "../x"), "run: "),
        (("teacher-train", "--config", "flows"), "config file flows cannot be read (Is a directory); name a TOML file"),
        (("teacher-train", "teacher.seed=3"), "'teacher.seed=3' is too much; give settings as --set key=value"),
        (("teacher-train", "shop.toml"), "'shop.toml' is too much; give a file as --config shop.toml"),
        (("compare", "--runs", "a", "b", "--folder", "nowhere"), "nowhere"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(arguments: tuple[str, ...], told: str, run: Run) -> None:
    code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert told in error
    assert len(error.strip().splitlines()) == 1


def test_the_same_through_prefect_itself() -> None:
    command = [sys.executable, "-m", "prefect", "run", "teacher-trian"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no flow 'teacher-trian': did you mean teacher-train?\n"


@pytest.mark.parametrize(
    "arguments",
    [(), ("completion", "bash"), ("data-prepare", "--dry-run", "--runs", "nowhere"), ("teacher-train", "-h")],
)
def test_it_ends_without_a_word_when_nobody_reads_what_it_prints(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert said == ""
    assert process.returncode in (1, 141)  # rich's own, and that of a process which SIGPIPE ends


def test_help_names_every_option_and_the_flows_settings(run: Run) -> None:
    code, out, _ = run("teacher-train", "--help")
    assert code == 0
    for option in ("--preset", "--set", "--config", "--name", "--runs", "--dry-run", "teacher.agpo.steps", "data.*"):
        assert option in out
    for key in PipelineConfig.model_fields.keys() - {"preset", "run", "runs"} - {"teacher", "loop", *STAGES}:
        assert f"\n{key}" in out


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("flows.plugin, flows.cli, flows.catalog", "torch pyspark mlflow transformers vllm pyarrow pandas sklearn"),
        ("flows.relevance, pipeline.stages, pipeline.plan", "torch pyspark mlflow transformers vllm sklearn"),
        ("teacher.train", "vllm"),  # vLLM only where rollouts need it, though TRL would import it
    ],
)
def test_importing_the_command_line_the_flows_and_the_training_is_light(modules: str, heavy: str) -> None:
    code = f"import sys, {modules}; sys.exit(' '.join({set(heavy.split())} & sys.modules.keys()) or 0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_dry_run_says_what_would_run_and_why(tmp_path: Path, run: Run) -> None:
    settings = load_preset("sample", [f"runs={tmp_path}"])
    for name in ("data", "teacher"):
        run_stage(
            STAGES[name].path(settings),
            STAGES[name].recipe(settings, STAGES[name].inputs(settings)),
            lambda out: StageOutput(fingerprint="f", figures={}),
        )

    def rows(*more: str) -> dict[str, str]:
        code, out, error = run("annotate", "--runs", str(tmp_path), "--dry-run", *more)
        assert (code, error) == (0, "")
        lines = [line.split(maxsplit=2) for line in out.splitlines()[1:]]
        return {stage: f"{action}: {reason}" for action, stage, reason in lines}

    planned = rows()
    assert planned["data"].startswith("reuse: unchanged")
    assert planned["teacher"].startswith("reuse: unchanged")
    assert planned["annotate"] == "run: it has not completed in this run"
    assert rows("--set", "teacher.seed=3")["teacher"] == "run: changed settings: teacher.seed"
    planned = rows("--set", "data.rows=999")
    assert planned["data"] == "run: changed settings: data.rows; source: synthetic (made up, 999 rows)"
    assert planned["teacher"] == "run: data would run before it"
    assert not (tmp_path / "sample" / "annotations").exists()


def test_a_dry_run_of_the_loop_needs_no_student_that_its_first_round_will_make(tmp_path: Path, run: Run) -> None:
    settings = load_preset("sample", [f"runs={tmp_path}", "run=sample-round-1"])
    for name in ("data", "teacher"):
        recipe = STAGES[name].recipe(settings, STAGES[name].inputs(settings))
        run_stage(STAGES[name].path(settings), recipe, lambda out: StageOutput(fingerprint="f", figures={}))
    chosen = ("--set", "loop.select.pairs=40", "--set", "loop.select.uncertain=1")
    code, out, error = run("relevance-loop", "--runs", str(tmp_path), "--dry-run", *chosen)
    assert (code, error) == (0, "")
    assert "annotate  its student is made before it" in out
    # One that nobody would make is still missed.
    student = ("--set", f"annotate.student={tmp_path}/none", "--set", "annotate.cascade.max_loss=0.01")
    code, _, error = run("annotate", "--runs", str(tmp_path), "--name", "sample-round-1", "--dry-run", *student)
    assert code
    assert "holds no exported student" in error


def test_every_flow_brings_the_stages_it_needs() -> None:
    wanted = {
        "data-prepare": ("data",),
        "teacher-train": ("data", "teacher"),
        "annotate": ("data", "teacher", "annotate"),
        "student-distill": ("data", "teacher", "annotate", "student"),
        "student-export": ("data", "teacher", "annotate", "student", "export"),
        "student-from-labels": ("data", "student", "export"),
        "student-score": ("data", "teacher", "annotate", "student", "export", "score"),
        "relevance-pipeline": ("data", "teacher", "annotate", "student", "export"),
        "relevance-loop": ("data", "teacher", "annotate", "student", "export"),
    }
    settings = load_preset("sample", ["loop.select.pairs=100"])
    assert {name: with_upstream(entry.stages, entry.own(settings)) for name, entry in FLOWS.items()} == wanted
