"""The stages of a run: which folder, which config, which inputs, which version, and the call that joins them.

A stage here is the room's plain function plus reuse by content and tracking. A room's heavy modules are imported when
its stage has work to do, so that a run that reuses everything starts neither Spark nor torch.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.contracts import Config, ContractError, digest, metric_lines
from pipeline.artifacts import Output, Recipe, StageRecord, read_record, run_stage
from pipeline.locks import own_gpus
from pipeline.settings import PipelineConfig
from pipeline.spark import SparkConfig
from pipeline.tracking.tracker import Tracker, note_reused, track

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from student.config import StudentConfig

logger = logging.getLogger(__name__)

Work = Callable[[Path, Tracker], Output]


@dataclass(frozen=True)
class Stage:
    """One stage, by the name of its part of the settings."""

    name: str
    folder: str
    needs: tuple[str, ...]
    version: int
    """Raised by hand when the same config and inputs would give an output of another meaning."""
    incremental: bool = False
    title: str = ""


# New pairs in the pool leave the teacher as it is, so that they alone are annotated.
_READS_LABELS_ONLY = ("teacher", "export")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("data", "pairs", (), 2, title="Pairs"),
        Stage("teacher", "teacher", ("data",), 1, title="Teacher"),
        Stage("annotate", "annotations", ("data", "teacher"), 1, incremental=True, title="Annotations"),
        Stage("student", "student", ("data", "annotate"), 1, title="Student"),
        Stage("export", "export", ("data", "student"), 1, title="Export"),
        Stage("score", "scores", ("data", "export"), 1, incremental=True, title="Scores"),
    )
}


def stage_folder(settings: PipelineConfig, name: str) -> Path:
    """The folder of a stage in this run."""
    return settings.folder / STAGES[name].folder


def stage_config(settings: PipelineConfig, name: str) -> Config:
    """The part of the settings that a stage depends on."""
    return getattr(settings, name)


def finished_stages(folder: Path) -> dict[str, StageRecord]:
    """The records of the stages that have completed in a run's folder, in running order."""
    found = {name: read_record(folder / stage.folder) for name, stage in STAGES.items()}
    return {name: record for name, record in found.items() if record is not None}


def held_record(settings: PipelineConfig, name: str) -> StageRecord | None:
    """The record of a stage that `settings.hold` keeps as it is; None where it has never completed or is not held.

    Raises `ContractError` when only its previous output is finished.
    """
    if name not in settings.hold:
        return None
    folder = stage_folder(settings, name)
    record = read_record(folder)
    if record is None and read_record(previous := folder.with_name(f"{folder.name}.previous")) is not None:
        raise ContractError(
            f"{name} is to be held, and {folder} is not finished: finish it without `hold`, or delete it and give its name "
            f"to {previous}"
        )
    return record and record.model_copy(update={"reused": True, "folder": folder})


def _on_this_gpu(settings: PipelineConfig, name: str) -> bool:
    """Whether a stage uses the GPUs of the machine that runs it, where there are any."""
    if name == "annotate":
        return settings.annotate.engine.kind != "openai" and settings.spark.master.startswith("local")
    return name in ("teacher", "student")


def with_upstream(names: tuple[str, ...]) -> tuple[str, ...]:
    """The stages with all that they need, in the order in which they run."""
    wanted = set(names)
    for name in reversed(STAGES):
        if name in wanted:
            wanted |= set(STAGES[name].needs)
    return tuple(name for name in STAGES if name in wanted)


def run_data(settings: PipelineConfig) -> StageRecord:
    """From the source to `pairs/`; raises `ContractError` for a source that cannot be used."""

    def work(out: Path, tracker: Tracker) -> Output:
        from data.prepare import prepare

        with spark_session(settings.spark) as spark:
            result = prepare(settings.data, out, spark)
        tracker.artifact(out / "card.json")
        tracker.artifact(out / "card.md")
        tracker.artifact(out / "scale.json")
        return result

    return _run(settings, "data", work)


def run_teacher(settings: PipelineConfig) -> StageRecord:
    """Base model → warm start → AGPO → `teacher/model/`; needs the pairs of this run."""
    pairs = _finished(settings, "data")

    def work(out: Path, tracker: Tracker) -> Output:
        from pipeline.weights import resolve_model
        from teacher.train import train_teacher

        base = resolve_model(
            settings.teacher.model,
            role="decoder",
            pairs=pairs,
            cache=settings.weights_cache.expanduser(),
            seed=settings.teacher.seed,
        )
        result = train_teacher(settings.teacher, base, pairs, out)
        _replay(out, tracker)
        tracker.artifact(out / "metrics.jsonl")
        tracker.artifact(out / "evaluation.json")
        tracker.artifact(out / "model" / "model_card.md")
        return result

    def register(out: Path, tracker: Tracker, result: Output) -> None:
        tracker.register("teacher", out / "model", result.fingerprint)

    return _run(settings, "teacher", work, register)


def run_annotate(settings: PipelineConfig) -> StageRecord:
    """The teacher labels the pool into `annotations/`; needs the pairs and the teacher of this run."""
    pairs, teacher = _finished(settings, "data"), _finished(settings, "teacher") / "model"

    def work(out: Path, tracker: Tracker) -> Output:
        from pipeline.annotation.job import annotate

        with spark_session(settings.spark) as spark:
            return annotate(settings.annotate, teacher, pairs, out, spark)

    return _run(settings, "annotate", work)


def run_student(settings: PipelineConfig) -> StageRecord:
    """The encoder learns from the annotations into `student/model/`; needs pairs and annotations of this run."""
    pairs, annotations = _finished(settings, "data"), _finished(settings, "annotate")

    def work(out: Path, tracker: Tracker) -> Output:
        from pipeline.weights import resolve_model
        from student.distill import distill

        base = resolve_model(
            settings.student.base,
            role="encoder",
            pairs=pairs,
            cache=settings.weights_cache.expanduser(),
            seed=settings.student.seed,
        )
        result = distill(_with_key(settings, annotations), base, pairs, annotations, out)
        _replay(out, tracker)
        for name in (
            "metrics.jsonl",
            "evaluation.json",
            "curves.json",
            "test_predictions.parquet",
            "model/model_card.md",
        ):
            tracker.artifact(out / name)
        return result

    return _run(settings, "student", work)


def run_export(settings: PipelineConfig) -> StageRecord:
    """The student as ONNX in `export/`, checked against the trained model; needs pairs and student of this run."""
    pairs, student = _finished(settings, "data"), _finished(settings, "student") / "model"

    def work(out: Path, tracker: Tracker) -> Output:
        from student.export import export_student

        result = export_student(settings.export, student, pairs, out)
        tracker.artifact(out / "export.json")
        tracker.artifact(out / "model_card.md")
        return result

    def register(out: Path, tracker: Tracker, result: Output) -> None:
        tracker.register("student", out, result.fingerprint, student=student.parent)

    return _run(settings, "export", work, register)


def run_score(settings: PipelineConfig) -> StageRecord:
    """Scores of the pairs table into `scores/`; needs the pairs and the export of this run."""
    pairs, export = _finished(settings, "data"), _finished(settings, "export")

    def work(out: Path, tracker: Tracker) -> Output:
        from pipeline.score import score

        with spark_session(settings.spark) as spark:
            return score(settings.score, export, pairs, out, spark)

    return _run(settings, "score", work)


RUNNERS: dict[str, Callable[[PipelineConfig], StageRecord]] = {
    "data": run_data,
    "teacher": run_teacher,
    "annotate": run_annotate,
    "student": run_student,
    "export": run_export,
    "score": run_score,
}


def stage_inputs(
    settings: PipelineConfig, name: str, records: Mapping[str, StageRecord] | None = None
) -> dict[str, str]:
    """Fingerprints of all that a stage reads; raises `ContractError` when a stage that it needs has not completed.

    `records` are the stages it needs, where they are not (or not yet) those of this run's folder.
    """
    inputs: dict[str, str] = {}
    for needed in STAGES[name].needs:
        record = (records or {}).get(needed) or read_record(stage_folder(settings, needed))
        if record is None:
            raise ContractError(f"run '{settings.run}' has no {STAGES[needed].folder} yet; {name} needs them")
        inputs[needed] = record.fingerprint
        if needed == "data" and name in _READS_LABELS_ONLY:
            inputs[needed] = str(record.figures.get("fingerprint_labelled", record.fingerprint))
    if name == "data":
        from data.sources import input_fingerprint

        inputs["source"] = input_fingerprint(settings.data)
    base = {"teacher": settings.teacher.model, "student": settings.student.base}.get(name, "")
    if base.startswith("path:"):
        # The other kinds of names are pinned by what they say; a folder of one's own can change under its name.
        inputs["base"] = _folder_stamp(Path(base.removeprefix("path:")).expanduser())
    return inputs


def stage_sources(settings: PipelineConfig, name: str) -> dict[str, str | Path]:
    """Where each of a stage's inputs lies: a folder or file, or what it is called where there is none."""
    sources: dict[str, str | Path] = {needed: stage_folder(settings, needed) for needed in STAGES[name].needs}
    if name == "data":
        sources["source"] = settings.data.path or settings.data.source_name
    base = {"teacher": settings.teacher.model, "student": settings.student.base}.get(name, "")
    if base.startswith("path:"):
        sources["base"] = Path(base.removeprefix("path:"))
    return sources


def _replay(out: Path, tracker: Tracker) -> None:
    for line in metric_lines(out / "metrics.jsonl"):
        phase, step = line.pop("phase"), line.pop("step")
        line.pop("time", None)
        tracker.log(step, {f"{phase}/{name}": value for name, value in line.items()})


@contextmanager
def spark_session(config: SparkConfig) -> Iterator[SparkSession]:
    """A session for one stage, stopped after it: training must not share the memory with an idle JVM."""
    from pipeline.spark import start_spark

    before = signal.getsignal(signal.SIGINT)
    session = start_spark(config)
    if threading.current_thread() is threading.main_thread():
        # PySpark's own handler talks to the JVM in the middle of another call, which fails with pages of tracebacks.
        signal.signal(signal.SIGINT, before)
    try:
        yield session
    finally:
        session.stop()


def _run(
    settings: PipelineConfig,
    name: str,
    work: Work,
    register: Callable[[Path, Tracker, Output], None] | None = None,
) -> StageRecord:
    """`run_stage` with tracking around the work, so that a reused stage is not tracked again."""
    if (held := held_record(settings, name)) is not None:
        note_reused(name, held.folder)
        logger.info("%s: kept as it is (hold)", name, extra={"stage": name, "state": "reused"})
        return held
    stage, config, inputs = STAGES[name], stage_config(settings, name), stage_inputs(settings, name)
    gpus = own_gpus(60 * settings.wait_minutes) if _on_this_gpu(settings, name) else nullcontext()

    def tracked(out: Path) -> Output:
        logger.info("%s: starting in %s", name, out, extra={"stage": name, "state": "running"})
        with gpus, track(settings, name, config, inputs, out, stage_sources(settings, name)) as tracker:
            result = work(out, tracker)
            tracker.figures(result.figures)
            tracker.tags({"fingerprint": result.fingerprint})
            if register is not None:
                register(out, tracker, result)
        return result

    record = run_stage(
        stage_folder(settings, name),
        Recipe(name, config, inputs, stage.version),
        tracked,
        incremental=stage.incremental,
        share=settings.share,
    )
    told = f"done in {record.seconds:.0f} s"
    if record.reused:
        note_reused(name, record.folder)
        told = f"reused, made by run '{record.made_by}'" if record.made_by else "reused, nothing changed"
    logger.info("%s: %s", name, told, extra={"stage": name, "state": "reused" if record.reused else "done"})
    return record


def _with_key(settings: PipelineConfig, annotations: Path) -> StudentConfig:
    """The student's config with the key of this run's own annotations, unless one is chosen.

    The table grows over the runs of one name, so the key written last need not be the one that these settings mean.
    """
    record = read_record(annotations)
    key = str(record.figures.get("annotation_key", "")) if record else ""
    if settings.student.annotation_key or not key:
        return settings.student
    return settings.student.model_copy(update={"annotation_key": key})


def _finished(settings: PipelineConfig, name: str) -> Path:
    """The folder of a stage that has completed; raises `ContractError` when it has not."""
    folder = stage_folder(settings, name)
    if read_record(folder) is None:
        raise ContractError(f"run '{settings.run}' has no {STAGES[name].folder} yet; run the stage {name} first")
    return folder


def _folder_stamp(folder: Path) -> str:
    def stamp(path: Path) -> list[Any]:
        found = path.stat()
        return [path.name, found.st_size, found.st_mtime_ns]

    return digest([stamp(path) for path in sorted(folder.glob("*")) if path.is_file()])
