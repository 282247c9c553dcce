"""The whole way through the command line, killed in the middle, run again, and run once more with nothing to do.

Everything is real (Prefect's server, Spark, vLLM, MLflow, ONNX); only the models and the table are tiny, so their figures
say nothing about quality.
"""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset as pads
import pytest

from data.contracts import ANNOTATIONS, PAIRS, SCORES, read_table
from flows.deploy import fill

pytestmark = [pytest.mark.e2e, pytest.mark.spark, pytest.mark.vllm]

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "data.rows=400",
    "teacher.model=scratch:tiny",
    "teacher.warm_start.texts=0",
    "teacher.warm_start.repeats=1",
    "teacher.warm_start.examples=200",
    "teacher.warm_start.epochs=16",
    "teacher.warm_start.min_steps=0",
    "teacher.agpo.steps=2",
    "teacher.agpo.group_size=4",
    "teacher.agpo.prompts_per_step=2",
    "teacher.evaluation.examples=8",
    "teacher.evaluation.every=0",
    "teacher.evaluation.samples=2",
    "teacher.max_completion_tokens=32",
    "annotate.n=2",
    "annotate.max_in_flight=16",
    "annotate.max_failed_share=1.0",
    "annotate.min_ok_share=0.0",
    "student.base=scratch:tiny",
    "student.epochs=1",
    "student.gold_only_baseline=false",
    "student.bootstrap_samples=100",
    "export.max_decisions_changed=1.0",
]


def command(flow, runs):
    settings = [part for override in TINY for part in ("--set", override)]
    return [
        str(Path(sys.executable).with_name("prefect")),
        *("run", flow, "--preset", "sample", "--name", "e2e", "--runs", str(runs)),
        *settings,
    ]


def run(flow, runs, environment):
    done = subprocess.run(
        command(flow, runs), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def windows(folder):
    return {file.name for file in folder.glob("*.parquet")} if folder.exists() else set()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment):
    """Killed with −9, children and all, once two windows of annotations are committed; then run to the end."""
    runs = tmp_path_factory.mktemp("runs")
    annotations = runs / "e2e" / "annotations"
    with subprocess.Popen(
        command("relevance-pipeline", runs),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 600
        while len(windows(annotations)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0].decode()
    kept = {name: (annotations / name).stat().st_mtime_ns for name in windows(annotations)}
    assert len(kept) >= 2, output[-6000:]
    assert not (runs / "e2e" / "summary.json").exists(), "the run was over before it could be killed"
    teacher = (runs / "e2e" / "teacher" / "_stage.json").stat().st_mtime_ns
    stdout = run("relevance-pipeline", runs, environment)
    return runs / "e2e", kept, teacher, stdout


def test_the_run_resumes_and_repeats_nothing(finished):
    folder, kept, teacher, _ = finished
    assert (folder / "teacher" / "_stage.json").stat().st_mtime_ns == teacher
    for name, written in kept.items():
        assert (folder / "annotations" / name).stat().st_mtime_ns == written
    # Valid and test are so small that the teacher is measured on all of their pairs.
    meant = read_table(folder / "pairs" / "pairs", PAIRS, where=pads.field("split") != "train")
    rows = read_table(folder / "annotations", ANNOTATIONS)
    assert sorted(rows["pair_id"].to_pylist()) == sorted(meant["pair_id"].to_pylist())
    assert len(set(rows["annotation_key"].to_pylist())) == 1


def test_every_stage_left_its_folder_and_figures(finished):
    folder, _, _, stdout = finished
    summary = json.loads((folder / "summary.json").read_text())
    stages = summary["stages"]
    assert list(stages) == ["data", "teacher", "annotate", "student", "export"]
    assert all(stage["figures"] for stage in stages.values())
    assert stages["teacher"]["reused"]
    assert not stages["student"]["reused"]
    for name in (
        "teacher/model/model.safetensors",
        "student/model/model.safetensors",
        "export/model.onnx",
        "report.html",
    ):
        assert (folder / name).exists(), name
    assert "export" in stdout


def test_the_report_shows_every_section_with_its_metrics(finished):
    folder = finished[0]
    stages = json.loads((folder / "summary.json").read_text())["stages"]
    metrics = {name: stage["figures"] for name, stage in stages.items()}
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Left out" not in report
    named = re.split(r'<section id="(\w+)">', report)[1:]
    sections = dict(zip(named[::2], named[1::2], strict=True))
    for section, shown in {
        "pairs": f"{metrics['data']['rows']:,}",
        "teacher": f"{metrics['teacher']['test/completion_tokens']:.4g}",
        "annotation": f"{metrics['annotate']['failed']:,} failed",
        "student": f"{metrics['student']['test_roc_auc']:.3f}",
        "export": f"{metrics['export']['int8_megabytes']:.2f}",
        "examples": "agreement" if metrics["annotate"]["ok"] else "no usable annotation",
        "second_look": "pairs",
        "lineage": stages["export"]["fingerprint"],
    }.items():
        assert shown in sections[section], section


def test_mlflow_has_the_runs_and_the_registered_versions(finished):
    folder = finished[0]
    with sqlite3.connect(folder.parent / "mlflow.db") as store:
        experiments = {name for (name,) in store.execute("select name from experiments")}
        versions = {name for (name,) in store.execute("select name from model_versions")}
        steps = store.execute("select count(distinct step) from metrics where key = 'agpo/accuracy'").fetchone()[0]
    assert {"ads-relevance/teacher-train", "ads-relevance/student-distill"} <= experiments
    assert {"ads-relevance-teacher", "ads-relevance-student"} <= versions
    assert steps == 2


def test_scores_come_from_the_exported_folder(finished, environment):
    folder = finished[0]
    run("student-score", folder.parent, environment)
    scores = read_table(folder / "scores", SCORES)
    assert len(scores) > 0
    assert all(0 <= p <= 1 for p in scores["p_relevant"].to_pylist())


def test_a_second_run_reuses_every_stage(finished, environment):
    folder = finished[0]
    run("relevance-pipeline", folder.parent, environment)
    summary = json.loads((folder / "summary.json").read_text())
    assert all(stage["reused"] for stage in summary["stages"].values() if stage["in_flow"])


def test_a_worker_runs_a_registered_deployment_to_the_end(finished, server):
    folder = finished[0]
    # Another seed, so that the export has work to do.
    parameters = json.dumps(fill("sample", name="e2e", runs=str(folder.parent), set=[*TINY, "export.seed=1"]))
    server.call("--no-prompt", "deploy", "--all")
    listed = server.call("deployment", "ls")
    assert "nightly-annotate" in listed
    assert "weekly-pipeline" in listed
    server.call("deployment", "run", "student-export/student-export", "--params", parameters)
    before = (folder / "export" / "_stage.json").stat().st_mtime_ns
    assert server.start("worker", "start", "--pool", "ads-relevance", "--run-once").wait(600) == 0
    assert (folder / "export" / "_stage.json").stat().st_mtime_ns > before
    assert "COMPLETED" in server.call("flow-run", "ls", "--state", "COMPLETED")
