"""What a flow would do, without doing it: which stages would be reused, which would run, and why."""

from __future__ import annotations

from pydantic import BaseModel

from data.contracts import ContractError
from pipeline.artifacts import StageRecord, reason_to_run, reusable
from pipeline.settings import PipelineConfig
from pipeline.stages import STAGES


class Planned(BaseModel):
    """One stage: `action` is `reuse` or `run`, `reason` why."""

    stage: str
    action: str
    reason: str


def plan(settings: PipelineConfig, names: tuple[str, ...], *, student_first: bool = False) -> list[Planned]:
    """The fate of every stage in `names` (in running order). Reads manifests only, starts nothing.

    With `student_first` the exported student of `annotate.student` need not be there: it would be made before them.
    """
    from data.sources import source_label

    done: dict[str, StageRecord] = {}  # stages that have an output, here or in another run, and so a fingerprint
    rows = [_planned(settings, name, done, student_first) for name in names]
    for row in rows:
        if row.stage == "data":
            row.reason += f"; source: {source_label(settings.data)}"
    return rows


def refuse_impossible(settings: PipelineConfig, names: tuple[str, ...]) -> None:
    """Raises `ContractError` when a stage that would run is told to compute in what this machine does not have."""
    bf16 = {"export": settings.export.bf16, "score": settings.score.precision == "bf16"}
    if not any(bf16.get(name) for name in names):
        return
    from student.scorer import refuse_bf16

    if any(row.action == "run" and bf16.get(row.stage) for row in plan(settings, names)):
        try:
            refuse_bf16()
        except ValueError as error:
            raise ContractError(str(error)) from None


def _planned(settings: PipelineConfig, name: str, done: dict[str, StageRecord], student_first: bool) -> Planned:
    """The fate of one stage; where it would be reused, its record goes into `done`."""
    stage = STAGES[name]
    if (held := stage.held(settings)) is not None:
        done[name] = held
        return Planned(stage=name, action="reuse", reason=f"held as it is since {held.finished_at:%F %T} UTC")
    if waiting := [needed.name for needed in stage.needed(settings) if needed.name not in done]:
        return Planned(stage=name, action="run", reason=f"{' and '.join(waiting)} would run before it")
    student = settings.annotate.student
    if name == "annotate" and student_first and student and not (student / "student.json").exists():
        return Planned(stage=name, action="run", reason="its student is made before it")
    folder, recipe = stage.path(settings), stage.recipe(settings, stage.inputs(settings, done))
    record = reusable(folder, recipe, incremental=stage.incremental, share=settings.share)
    if record is None:
        return Planned(stage=name, action="run", reason=reason_to_run(folder, recipe))
    done[name] = record
    reason = "unchanged since" if record.folder == folder else f"run '{record.made_by}' has made the same on"
    return Planned(stage=name, action="reuse", reason=f"{reason} {record.finished_at:%F %T} UTC")
