"""Two runs side by side: the paired metrics are right, and everything that differs is named."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from data.contracts import ContractError, Grade, GradeScale, write_json
from flows.compare import compare
from pipeline.artifacts import Recipe, StageOutput, run_stage
from pipeline.report.compare import compare_runs, find_run, markdown, save_comparison
from pipeline.report.summary import summarise
from pipeline.settings import load_preset
from student.evaluation import compare_students, write_predictions

GRADES = np.random.default_rng(1).integers(3, size=600)
THRESHOLD = 0.4


def make_run(folder, noise, rows=slice(None), settings=(), seed=0):
    """A finished run with a student that is right but for some noise; returns its scores."""
    score = 1 / (1 + np.exp(-(GRADES - 1 + noise * np.random.default_rng(seed).normal(size=600))))[rows]
    ids, queries = np.array([f"p{i}" for i in range(600)])[rows], np.arange(600)[rows] // 5
    grades = tuple(Grade(name=name, definition=name) for name in ("bad", "fair", "good"))

    def work(out):
        write_predictions(out, SimpleNamespace(pair_ids=ids, query_id=queries, grade=GRADES[rows]), score)
        (out / "model").mkdir()
        GradeScale(grades=grades, relevant_from=1).save(out / "model")
        write_json(out / "model" / "student.json", {"threshold": THRESHOLD})
        return StageOutput(fingerprint=f"f{seed}", figures={"test_roc_auc": 0.5 + seed / 10, "a|b<script>": "x"})

    config = load_preset("sample", [f"runs={folder.parent}", f"run={folder.name}", f"student.seed={seed}", *settings])
    record = run_stage(folder / "student", Recipe("student", config.student, {"data": f"d{seed}"}), work, share=False)
    write_json(folder / "summary.json", summarise(config, "relevance-pipeline", [record], [1.0]))
    return score


def test_metrics_are_paired_on_the_shared_rows(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", 3.0, slice(0, 500))
    b = make_run(tmp_path / "b", 0.5, rows=slice(100, 600), seed=1)
    comparison = compare_runs(tmp_path / "a", tmp_path / "b", n_boot=300)
    assert (comparison.n, comparison.n_queries) == (400, 80)
    relevant, a, b = GRADES[100:500] >= 1, a[100:], b[:400]
    auc, _, _, f1 = comparison.measures
    assert [each.metric for each in comparison.measures] == ["roc_auc", "pr_auc", "ndcg_at_10", "f1"]
    assert auc.a == pytest.approx(roc_auc_score(relevant, a))
    assert auc.b == pytest.approx(roc_auc_score(relevant, b))
    same = compare_students(tmp_path / "b" / "student", tmp_path / "a" / "student", relevant_from=1, n_boot=300)
    assert (auc.difference, auc.low, auc.high) == (same.difference, same.low, same.high)
    assert f1.difference == pytest.approx(f1_score(relevant, b >= THRESHOLD) - f1_score(relevant, a >= THRESHOLD))
    assert f1.low < f1.difference < f1.high
    assert re.fullmatch(
        r"ROC-AUC of b minus a: \+0\.\d{4} \[\+0\.\d{4}, \+0\.\d{4}\] on 400 shared test pairs of 80 queries: better\. "
        r"PR-AUC: better; NDCG@10: better; F1: better\.",
        comparison.result,
    )
    back = compare_runs(tmp_path / "b", tmp_path / "a", n_boot=300)
    assert back.measures[0].difference == pytest.approx(-auc.difference)
    assert back.result.startswith("ROC-AUC of a minus b: -0.")
    assert ": worse. PR-AUC: worse; " in back.result


def test_equal_students_show_no_difference(tmp_path: Path) -> None:
    for name in "ab":
        make_run(tmp_path / name, 1.0)
    comparison = compare_runs(tmp_path / "a", tmp_path / "b", n_boot=200)
    assert {each.difference for each in comparison.measures} == {0.0}
    assert (
        "+0.0000 [+0.0000, +0.0000] on 600 shared test pairs of 120 queries: no difference is shown. "
        in comparison.result
    )
    assert (comparison.settings, comparison.inputs, comparison.versions, comparison.code) == ({}, {}, {}, {})


def test_what_differs_is_named_without_secrets(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 1.0, settings=("spark.extra.password=hunter2", "spark.extra.x=1"))
    make_run(tmp_path / "b", 1.0, settings=("spark.extra.password=hunter3", "spark.extra.x=2"), seed=2)
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    write_json(
        tmp_path / "b" / "summary.json", summary | {"versions": summary["versions"] | {"torch": "0"}, "commit": "x"}
    )
    comparison = compare_runs(tmp_path / "a", tmp_path / "b", n_boot=200)
    assert comparison.settings == {"spark.extra.x": ("1", "2"), "student.seed": (0, 2)}
    assert comparison.inputs == {"student.data": ("d0", "d2")}
    assert comparison.versions == {"torch": (summary["versions"]["torch"], "0")}
    assert comparison.code == {"commit": (summary["commit"], "x")}
    assert comparison.metrics["student"]["test_roc_auc"] == (0.5, 0.7)
    assert "hunter" not in markdown(comparison) + comparison.model_dump_json()


def test_runs_without_a_common_test_set_are_still_put_side_by_side(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 1.0, rows=slice(0, 100))
    make_run(tmp_path / "b", 1.0, rows=slice(100, 200))
    assert "share no test row" in compare_runs(tmp_path / "a", tmp_path / "b").result
    (tmp_path / "b" / "student" / "_stage.json").rename(tmp_path / "b" / "student" / "x.json")
    with pytest.raises(ContractError, match="is not the folder of a run"):
        compare_runs(tmp_path / "a", tmp_path / "b")


def test_it_is_written_as_json_and_markdown_and_to_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    for name, noise in (("a", 3.0), ("b", 0.5)):
        make_run(tmp_path / name, noise)
    write_json(tmp_path / "a" / "_mlflow.json", {"executions": {"x": {"name": "flow", "run_id": "run-of-a"}}})
    comparison = compare_runs(tmp_path / "a", tmp_path / "b", n_boot=200)
    data, text = save_comparison(comparison, tmp_path)
    assert (data.name, text.name) == ("a-vs-b.json", "a-vs-b.md")
    content = json.loads(data.read_text())
    assert content["result"] == comparison.result
    assert content["measures"][0]["low"] == comparison.measures[0].low
    assert "| ROC-AUC | " in text.read_text()
    assert "<script>" not in text.read_text()
    store = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = store.get_experiment_by_name("ads-relevance/compare")
    (run,) = store.search_runs([experiment.experiment_id])
    assert run.info.run_name == "a-vs-b"
    assert run.data.metrics["roc_auc/difference"] == pytest.approx(comparison.measures[0].difference)
    assert run.data.metrics["f1/high"] == pytest.approx(comparison.measures[3].high)
    assert (run.data.tags["run_a"], run.data.tags["run_b"]) == ("run-of-a", "b")
    assert {item.path for item in store.list_artifacts(run.info.run_id)} == {"a-vs-b.json", "a-vs-b.md"}


def test_the_command_finds_runs_by_name_or_path_and_refuses_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "baseline", 3.0, settings=("tracking.enabled=false",))
    make_run(tmp_path / "tuned", 0.5, settings=("tracking.enabled=false",))
    assert find_run(str(tmp_path / "tuned"), tmp_path / "elsewhere") == tmp_path / "tuned"
    compare(runs=["baseline", str(tmp_path / "tuned")], folder=tmp_path, resamples=100)
    printed = capsys.readouterr().out
    assert re.search(r"ROC-AUC  0\.\d+  0\.\d+  \+0\.\d+ \[.*\]  better\n", printed)
    assert "ROC-AUC of tuned minus baseline: +0." in printed
    assert "test_roc_auc" not in printed  # equal in both
    assert "| student | test_roc_auc | 0.5 | 0.5 |" in (tmp_path / "compare" / "baseline-vs-tuned.md").read_text()
    assert (tmp_path / "compare" / "baseline-vs-tuned.json").exists()
    for runs, message in (
        (["baseline", "tunde"], "no run 'tunde' in "),
        (["baseline", "tunde"], "did you mean tuned?"),
        (["baseline"], "takes two runs"),
        (["tuned", "tuned"], "the same run"),
    ):
        with pytest.raises(SystemExit) as ended:
            compare(runs=runs, folder=tmp_path)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
