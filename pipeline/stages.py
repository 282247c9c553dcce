"""The six stages of a run: what each one is, and the call into its room.

A room's heavy modules are imported when its stage has work to do, so that a run that reuses everything starts neither
Spark nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.contracts import (
    HUMAN_LABELS_FILE,
    ContractError,
    GradeScale,
    StageOutput,
    digest,
    read_human_labels,
    read_json,
)
from pipeline import drift, drift_profile
from pipeline.artifacts import StageRecord, read_record
from pipeline.executions import Registration
from pipeline.settings import PipelineConfig
from pipeline.spark import spark_session
from pipeline.stage import Input, Stage
from teacher.config import REASONS_METHOD

Folders = Mapping[str, Path]
"""Of the stages that one needs, by name."""


def _prepare(settings: PipelineConfig, folders: Folders, out: Path) -> StageOutput:
    from data.prepare import prepare

    with spark_session(settings.spark) as spark:
        output = prepare(settings.data, out, spark)
    checks = drift.check_pairs(settings.drift, settings.folder, out, output.figures["fingerprint_labelled"])
    return output.model_copy(update={"figures": output.figures | drift.figures(checks, settings.drift)})


def _train_teacher(settings: PipelineConfig, folders: Folders, out: Path) -> StageOutput:
    from teacher.train import train_teacher

    config, pairs, reasons = settings.teacher, folders["data"], settings.teacher.warm_start.reason_model
    base = _base(settings, config.model, "decoder", pairs, config.seed)
    reason_model = _base(settings, reasons, "decoder", pairs, config.seed) if reasons else None
    cache = settings.weights_cache / "reasons"
    output = train_teacher(config, base, pairs, out, reason_model=reason_model, cache=cache)
    drift_profile.remember(pairs, out)
    return output


def _annotate(settings: PipelineConfig, folders: Folders, out: Path) -> StageOutput:
    from pipeline.annotation.job import annotate

    config, pairs = settings.annotate, folders["data"]
    diverse = "diverse" in config.select.shares
    encoder = _base(settings, config.select.encoder, "encoder", pairs, config.seed) if diverse else None
    with spark_session(settings.spark) as spark:
        output = annotate(config, folders["teacher"] / "model", pairs, out, spark, encoder=encoder)
    checks = drift.check_annotations(settings.drift, settings.folder, out, output.figures["annotation_key"])
    return output.model_copy(update={"figures": output.figures | drift.figures(checks, settings.drift)})


def _distil(settings: PipelineConfig, folders: Folders, out: Path) -> StageOutput:
    from student.distill import distill

    config, pairs, annotations = settings.student, folders["data"], folders.get("annotate")
    record = read_record(annotations) if annotations else None
    if record is not None and not config.annotation_key:
        # The table grows over the runs of one name, so the key written last need not be the one that these settings mean.
        config = config.model_copy(update={"annotation_key": str(record.figures.get("annotation_key", ""))})
    base, cache = _base(settings, config.base, "encoder", pairs, config.seed), settings.weights_cache / "warm_up"
    scored_by = config.warm_up.encoder if config.warm_up.pairs else ""
    encoder = _base(settings, scored_by, "encoder", pairs, config.seed) if scored_by else None
    human_labels = settings.folder / "audit" / HUMAN_LABELS_FILE
    output = distill(config, base, pairs, annotations, out, cache, encoder, human_labels)
    checks = [check for check in drift.load(annotations or out) if check.annotation_key == config.annotation_key]
    drift.save(out, checks, drift.STUDENT_FILE)  # when this student is registered, the table may have others
    return output


def _export(settings: PipelineConfig, folders: Folders, out: Path) -> StageOutput:
    from student.ladder import export_sizes

    return export_sizes(settings.export, folders["student"], folders["data"], out)


def _score(settings: PipelineConfig, folders: Folders, out: Path) -> StageOutput:
    from pipeline.score import score

    with spark_session(settings.spark) as spark:
        return score(settings.score, folders["export"], folders["data"], out, spark)


def _base(settings: PipelineConfig, model: str, role: Any, pairs: Path, seed: int) -> Any:
    from pipeline.weights import resolve_model

    return resolve_model(model, role=role, pairs=pairs, cache=settings.weights_cache, seed=seed)


def _source(settings: PipelineConfig) -> dict[str, Input]:
    from data.sources import input_fingerprint

    config = settings.data
    return {"source": Input(input_fingerprint(config), config.path or config.source_name)}


def _own_models(**names: str) -> dict[str, Input]:
    """Of these models those given by `path:`. The other kinds of names are pinned by what they say; a folder can change."""
    inputs = {}
    for role, name in names.items():
        if name.startswith("path:"):
            folder = Path(name.removeprefix("path:")).expanduser()
            files = [(path.name, path.stat()) for path in sorted(folder.glob("*")) if path.is_file()]
            fingerprint = digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in files])
            inputs[role] = Input(fingerprint, folder)
    return inputs


def _teacher_models(settings: PipelineConfig) -> dict[str, Input]:
    """The models that a teacher starts from, and how they are asked for reasons, where they are."""
    config = settings.teacher
    models = _own_models(base=config.model, reason_model=config.warm_start.reason_model)
    asked = {"reasons": Input(str(REASONS_METHOD), "teacher.reasons")} if config.warm_start.asks_a_model else {}
    return models | asked


def _annotating_student(settings: PipelineConfig) -> dict[str, Input]:
    """The exported student that the annotation job has beside the teacher, where there is one."""
    folder = settings.annotate.student
    if folder is None:
        return {}
    if not (folder / "student.json").exists():
        raise ContractError(f"annotate.student: {folder} holds no exported student (no student.json)")
    return {"annotating_student": Input(str(read_json(folder / "student.json").get("fingerprint")), folder)}


def _human_labels(settings: PipelineConfig) -> dict[str, Input]:
    """Labels that people gave since, where there are any on the scale of the pairs."""
    path, pairs = settings.folder / "audit" / HUMAN_LABELS_FILE, DATA.path(settings)
    if not path.exists() or not (pairs / "scale.json").exists():
        return {}
    labels = read_human_labels(path, GradeScale.load(pairs)).grades
    return {"human_labels": Input(digest(labels), path)} if labels else {}


DATA = Stage(
    name="data",
    folder="pairs",
    experiment="data-prepare",
    work=_prepare,
    version=3,
    reads_besides=_source,
    headline=("rows", "rows_train", "rows_valid", "rows_test", "rows_pool", "rejected", "drift", "drift_not_judged"),
    artifacts=("card.json", "card.md", "scale.json"),
)
TEACHER = Stage(
    name="teacher",
    folder="teacher",
    experiment="teacher-train",
    work=_train_teacher,
    needs=(DATA,),
    reads_only_labelled=True,
    reads_besides=_teacher_models,
    uses_gpus=lambda settings: True,
    headline=("stopped", "base/accuracy", "warm_start/accuracy", "agpo/accuracy", "agpo/parse_rate", "test/accuracy"),
    artifacts=("metrics.jsonl", "evaluation.json", "reasons.json", "model/model_card.md"),
    registers=lambda out, folders: Registration(role="teacher", folder=out / "model"),
)
ANNOTATE = Stage(
    name="annotate",
    folder="annotations",
    experiment="annotate",
    work=_annotate,
    version=2,
    needs=(DATA, TEACHER),
    reads_besides=lambda settings: (
        _own_models(encoder=settings.annotate.select.encoder) | _annotating_student(settings)
    ),
    uses_gpus=lambda settings: settings.annotate.engine.kind != "openai" and settings.spark.master.startswith("local"),
    incremental=True,
    headline=(
        *("pairs", "n_new", "ok_share", "accuracy", "agreement", "n_spared", "pairs_per_s"),
        *("drift", "drift_not_judged"),
    ),
)
STUDENT = Stage(
    name="student",
    folder="student",
    experiment="student-distill",
    work=_distil,
    version=5,
    needs=(DATA, ANNOTATE),
    spares=lambda settings: () if settings.student.use_annotations else ("annotate",),
    reads_besides=lambda settings: (
        _own_models(base=settings.student.base, warm_up_encoder=settings.student.warm_up.encoder)
        | _human_labels(settings)
    ),
    uses_gpus=lambda settings: True,
    headline=(
        *("below_floor", "test_roc_auc", "gold_only_roc_auc", "teacher_roc_auc", "teacher_kept", "bm25_roc_auc"),
        *("untrained_cosine_roc_auc", "warm_up_roc_auc", "test_f1", "test_ece", "human_labels_skipped"),
    ),
    artifacts=("metrics.jsonl", "evaluation.json", "curves.json", "test_predictions.parquet", "model/model_card.md"),
)
EXPORT = Stage(
    name="export",
    folder="export",
    experiment="student-export",
    work=_export,
    version=2,
    needs=(DATA, STUDENT),
    reads_only_labelled=True,
    headline=("fp32_max_abs_dp", "int8_auc_loss", "fp32_pairs_per_second", "int8_pairs_per_second"),
    artifacts=("export.json", "model_card.md"),
    registers=lambda out, folders: Registration(role="student", folder=out, student=folders["student"]),
)
SCORE = Stage(
    name="score",
    folder="scores",
    experiment="student-score",
    work=_score,
    needs=(DATA, EXPORT),
    incremental=True,
    headline=("rows", "rows_new", "pairs_per_second"),
)

# In the order in which they run.
STAGES: dict[str, Stage] = {stage.name: stage for stage in (DATA, TEACHER, ANNOTATE, STUDENT, EXPORT, SCORE)}


def finished_stages(folder: Path) -> dict[str, StageRecord]:
    """The records of the stages that have completed in a run's folder, in running order."""
    found = {name: read_record(folder / stage.folder) for name, stage in STAGES.items()}
    return {name: record for name, record in found.items() if record is not None}


def with_upstream(names: tuple[str, ...], settings: PipelineConfig) -> tuple[str, ...]:
    """The stages with all that they need under these settings, in the order in which they run."""
    chosen = set(names)
    for name in reversed(STAGES):
        if name in chosen:
            chosen |= {needed.name for needed in STAGES[name].needed(settings)}
    return tuple(name for name in STAGES if name in chosen)
