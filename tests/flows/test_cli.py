"""The verb as people and scripts meet it: what it prints and how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.catalog import FLOWS
from pipeline.artifacts import StageOutput, run_stage
from pipeline.settings import load_preset
from pipeline.stages import STAGES, with_upstream

ROOT = Path(__file__).parents[2]


def prefect(*arguments: str, module: bool = False) -> subprocess.CompletedProcess[str]:
    command = ["-m", "flows.cli"] if module else ["-m", "prefect", "run"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def test_alone_it_lists_the_flows() -> None:
    done = prefect()
    assert done.returncode == 0
    lines = done.stdout.strip().splitlines()
    assert [line.split()[0] for line in lines] == [
        "data-prepare", "teacher-train", "annotate", "student-distill", "student-export",
        "student-from-labels", "student-score",
        "relevance-pipeline",
    ]  # fmt: skip
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("teacher-trian",), "no flow 'teacher-trian': did you mean teacher-train?"),
        (("teacher-train", "--preset", "sampel"), "no preset 'sampel': did you mean sample?"),
        (("teacher-train", "--set", "teacher.sed=1"), "unknown key 'teacher.sed': did you mean teacher.seed"),
        (("teacher-train", "--set", "teacher.seed=-1"), "teacher.seed: "),
        (("teacher-train", "--set", "nonsense"), "key=value"),
        (("teacher-train", "--config", "nowhere.toml"), "nowhere.toml does not exist"),
        (("teacher-train", "--name", "../x"), "run: "),
        (("teacher-train", "--config", "flows"), "config flows is a folder; name a TOML file in it"),
        (("teacher-train", "teacher.seed=3"), "'teacher.seed=3' is too much; give settings as --set key=value"),
        (("teacher-train", "shop.toml"), "'shop.toml' is too much; give a file as --config shop.toml"),
        (("compare", "--runs", "a", "b", "--folder", "nowhere"), "nowhere"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(arguments: tuple[str, ...], told: str) -> None:
    done = prefect(*arguments, module=True)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_the_same_through_prefect_itself() -> None:
    done = prefect("teacher-trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no flow 'teacher-trian': did you mean teacher-train?\n"


def test_help_names_every_option() -> None:
    done = prefect("teacher-train", "--help")
    assert done.returncode == 0
    for option in ("--preset", "--set", "--config", "--name", "--runs", "--dry-run"):
        assert option in done.stdout


def test_importing_the_command_line_is_light() -> None:
    code = (
        "import sys, flows.plugin, flows.cli, flows.catalog\n"
        "heavy = {'torch', 'pyspark', 'mlflow', 'transformers', 'vllm', 'pyarrow', 'pandas', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_importing_the_flows_starts_no_heavy_library() -> None:
    code = (
        "import sys, flows.relevance, pipeline.stages, pipeline.plan\n"
        "heavy = {'torch', 'pyspark', 'mlflow', 'transformers', 'vllm', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_dry_run_says_what_would_run_and_why(tmp_path: Path) -> None:
    settings = load_preset("sample", [f"runs={tmp_path}"])
    for name in ("data", "teacher"):
        run_stage(
            STAGES[name].path(settings),
            STAGES[name].recipe(settings, STAGES[name].inputs(settings)),
            lambda out: StageOutput(fingerprint="f", figures={}),
        )

    def rows(*more: str) -> dict[str, str]:
        done = prefect("annotate", "--runs", str(tmp_path), "--dry-run", *more, module=True)
        assert done.returncode == 0, done.stderr
        lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()[1:]]
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
    }
    settings = load_preset("sample")
    assert {name: with_upstream(entry.stages, entry.own(settings)) for name, entry in FLOWS.items()} == wanted
