"""What Prefect's pages get from a run, on a real Prefect server; and that a server which refuses costs one warning."""

import contextvars
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from data.contracts import log_progress
from flows import artifacts
from flows.artifacts import PageProgress, plain, progress_on_page, publish

pytestmark = pytest.mark.usefixtures("server")
HOSTILE = "![x](http://ads.invalid/x.png) <img src=x onerror=alert(1)> | **b** `c` www.ads.invalid a@b.invalid"


@pytest.fixture
def nobody_listens() -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield


def summary_of(folder: Path, run: str) -> dict[str, Any]:
    (folder / "student").mkdir()
    metrics = {"roc_auc": {"value": 0.9, "low": 0.85, "high": 0.95}, "f1": {"value": None, "low": None, "high": None}}
    systems = [{"name": "student", "n": 1500, "metrics": metrics}, {"name": HOSTILE, "n": 2, "metrics": {}}]
    (folder / "student" / "evaluation.json").write_text(json.dumps({"systems": systems}))
    stage = {"in_flow": True, "reused": False, "seconds": 2.0, "figures": {"test_roc_auc": 0.9}}
    report = folder / "report.html"
    return {"run": run, "stages": {"student": stage}, "report": str(report), "report_link": report.as_uri()}


def found(key: str) -> list[Any]:
    """All versions under a key, the oldest first."""
    client = get_client(sync_client=True)
    everything = client.read_artifacts(limit=200)
    return sorted((each for each in everything if each.key == key), key=lambda each: each.created)


def test_stages_evaluation_and_report_are_on_the_pages(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, "Shop_1 <b>")
    flow(lambda: publish(summary), name="publishing")()
    (stages,) = found("shop-1-b-stages")
    assert json.loads(stages.data) == [
        {"stage": "student", "status": "done", "seconds": "2.0", "key figures": "test_roc_auc 0.9"}
    ]
    assert stages.description == r"Stages of run Shop_1 \<b\>"
    (evaluation,) = found("shop-1-b-evaluation")
    student, other = json.loads(evaluation.data)
    assert student == {"system": "student", "pairs": "1,500", "ROC-AUC": "0.900 (0.850 to 0.950)", "F1": "–"}
    assert other["system"] == plain(HOSTILE)
    (report,) = found("shop-1-b-report")
    assert report.data == f"[Report]({summary['report_link']})"
    assert evaluation.flow_run_id is not None


def test_a_run_without_report_or_student_has_its_stages(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, "bare")
    del summary["report"]
    flow(lambda: publish(summary), name="publishing")()
    assert found("bare-stages")
    assert not found("bare-report")
    assert not found("bare-evaluation")


@pytest.mark.usefixtures("nobody_listens")
def test_a_server_that_refuses_costs_a_warning_for_the_summary_and_one_for_a_bar(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "FlowRunContext", SimpleNamespace(get=lambda: True))
    progress = PageProgress("gone")
    with caplog.at_level(logging.WARNING, logger="flows.artifacts"):
        publish(summary_of(tmp_path, "lost"))
        for _ in range(3):
            progress(1, 1)
    assert [record.name for record in caplog.records].count("flows.artifacts") == 2


def test_a_task_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "UPDATE_SECONDS", 0.0)
    seen: list[float] = []

    @task
    def work() -> None:
        progress = PageProgress("Half way", "pairs of *run* x")
        for done in (-1, 2, 10):
            context = contextvars.copy_context()  # as a job's watcher has it
            thread = threading.Thread(target=context.run, args=(progress, done, 4))
            thread.start()
            thread.join()
            seen.append(found("half-way")[0].data)

    flow(lambda: work(), name="progressing")()
    assert seen == [0.0, 50.0, 100.0]
    (bar,) = found("half-way")
    assert bar.type == "progress"
    assert bar.description == r"pairs of \*run\* x"
    assert bar.task_run_id is not None


def test_updates_are_few_and_the_last_one_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float] = []
    update = artifacts.update_progress_artifact
    monkeypatch.setattr(
        artifacts, "update_progress_artifact", lambda artifact, done: (sent.append(done), update(artifact, done))[1]
    )
    clock = iter(range(1000))
    # 10 ms between calls; of this module alone, as Prefect needs the real clock.
    monkeypatch.setattr(artifacts, "time", SimpleNamespace(monotonic=lambda: next(clock) / 100))

    def work() -> None:
        progress = PageProgress("often")
        for done in range(450):
            progress(done, 500)
        progress(500, 500)
        progress(500, 500)

    flow(work, name="progressing")()
    assert len(sent) == 3  # two within 4.5 s, and the end
    assert sent[-1] == 100.0
    assert found("often")[0].data == 100.0


def test_markdown_makes_nothing_of_plain_text() -> None:
    assert plain(HOSTILE) == (
        r"\!\[x\](http:\//ads.invalid/x.png) \<img src=x onerror=alert(1)\> \| \*\*b\*\* \`c\` www\.ads.invalid a\@b.invalid"
    )
    assert plain("a\n# b") == r"a \# b"


def test_a_bar_follows_the_progress_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "UPDATE_SECONDS", 0.0)
    log = logging.getLogger("pipeline.annotation.job")

    @flow
    def running() -> None:
        with progress_on_page("Trial 1", "annotate"):
            log.warning("nothing of progress in this line")
            assert not found("trial-1-annotate")
            log_progress(log, 3, 4, "annotate: %d of %d pairs", 3, 4)
        log_progress(log, 4, 4, "after the stage")

    running()
    PageProgress("trial 1 annotate")(4, 4)  # outside a run nothing is sent
    (bar,) = found("trial-1-annotate")
    assert bar.data == 75.0
