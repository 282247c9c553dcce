"""What a stage is, what it reads, and how it runs: reused where its recipe has been made, else tracked while it works."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.contracts import Config, ContractError, StageOutput
from pipeline.artifacts import Recipe, StageRecord, read_record, run_stage
from pipeline.executions import Registration, executing, reused
from pipeline.locks import own_gpus
from pipeline.settings import PipelineConfig
from pipeline.tracking.tracker import tracking

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Input:
    """Something that a stage reads: its fingerprint, and where it lies (or what it is called, where no file is)."""

    fingerprint: str
    place: Path | str


Work = Callable[[PipelineConfig, Mapping[str, Path], Path], StageOutput]
"""From the settings and the folders of the stages it needs, by name, into the stage's own folder."""


@dataclass(frozen=True)
class Stage:
    """All that is known of one stage. Adding one is such an object in `pipeline.stages`, and its part of the settings."""

    name: str
    """Also the name of its part of the settings."""
    folder: str
    experiment: str
    work: Work
    version: int = 1
    """Raised by hand when the same config and inputs would give an output of another meaning."""
    needs: tuple[Stage, ...] = ()
    spares: Callable[[PipelineConfig], tuple[str, ...]] = lambda settings: ()
    """Those of them, by name, that it does without under these settings."""
    reads_only_labelled: bool = False
    """New pairs in the pool leave it as it is."""
    reads_besides: Callable[[PipelineConfig], dict[str, Input]] = lambda settings: {}
    """What it reads beside the stages that it needs."""
    uses_gpus: Callable[[PipelineConfig], bool] = lambda settings: False
    """Whether it uses the GPUs of the machine that runs it, where there are any."""
    incremental: bool = False
    """Its output is keyed row by row, so that it stays and grows when the recipe changes."""
    headline: tuple[str, ...] = ()
    """The figures that summaries show, in this order, as far as they are there."""
    artifacts: tuple[str, ...] = ()
    """Files of its folder that tracking uploads."""
    registers: Callable[[Path, Mapping[str, Path]], Registration] | None = None
    """The model that it registers, given its folder and those of the stages that it reads."""

    @property
    def title(self) -> str:
        """What people read."""
        return self.folder.capitalize()

    def path(self, settings: PipelineConfig) -> Path:
        """The folder of this stage in a run."""
        return settings.folder / self.folder

    def config(self, settings: PipelineConfig) -> Config:
        """The part of the settings that this stage depends on."""
        return getattr(settings, self.name)

    def needed(self, settings: PipelineConfig) -> tuple[Stage, ...]:
        """The stages that it reads under these settings."""
        return tuple(stage for stage in self.needs if stage.name not in self.spares(settings))

    def inputs(self, settings: PipelineConfig, records: Mapping[str, StageRecord] | None = None) -> dict[str, Input]:
        """All that the stage reads; raises `ContractError` when a stage that it needs has not completed.

        `records` are the stages it needs, where they are not (or not yet) those of this run's folder.
        """
        inputs: dict[str, Input] = {}
        for needed in self.needed(settings):
            folder = needed.path(settings)
            record = (records or {}).get(needed.name) or read_record(folder)
            if record is None:
                raise ContractError(
                    f"run '{settings.run}' has no {needed.folder} yet; {self.name} needs them, so run {needed.name} first"
                )
            labelled = record.figures.get("fingerprint_labelled") if self.reads_only_labelled else None
            inputs[needed.name] = Input(str(labelled or record.fingerprint), folder)
        return inputs | self.reads_besides(settings)

    def recipe(self, settings: PipelineConfig, inputs: Mapping[str, Input]) -> Recipe:
        """What the output depends on."""
        fingerprints = {name: each.fingerprint for name, each in inputs.items()}
        return Recipe(self.name, self.config(settings), fingerprints, self.version)

    def held(self, settings: PipelineConfig) -> StageRecord | None:
        """The record of a stage that `settings.hold` keeps as it is; None where it has never completed or is not held.

        Raises `ContractError` when only its previous output is finished.
        """
        if self.name not in settings.hold:
            return None
        folder = self.path(settings)
        record = read_record(folder)
        if record is None and read_record(previous := folder.with_name(f"{folder.name}.previous")) is not None:
            raise ContractError(
                f"{self.name} is to be held, and {folder} is not finished: finish it without `hold`, or delete it and give "
                f"its name to {previous}"
            )
        return record and record.model_copy(update={"reused": True, "folder": folder})

    def run(self, settings: PipelineConfig) -> StageRecord:
        """The record of this stage's output, reused or made; raises what the work raises."""
        record = held = self.held(settings)
        if record is None:
            inputs = self.inputs(settings)
            record = run_stage(
                self.path(settings),
                self.recipe(settings, inputs),
                partial(self._work_tracked, settings, inputs),
                incremental=self.incremental,
                share=settings.share,
            )
        if record.reused:
            reused(self.name, record.folder)
            origin = f"made by run '{record.made_by}'" if record.made_by else "nothing changed"
            logger.info("%s: reused, %s", self.name, "held as it is" if held else origin)
        else:
            logger.info("%s: done in %.0f s", self.name, record.seconds)
        return record

    def _work_tracked(self, settings: PipelineConfig, inputs: dict[str, Input], out: Path) -> StageOutput:
        """Work within an execution that is recorded; its metrics by step are read from the stage's folder."""
        folders = {needed.name: needed.path(settings) for needed in self.needed(settings)}
        execution = executing(
            settings,
            self.name,
            out,
            config=self.config(settings),
            inputs={name: each.fingerprint for name, each in inputs.items()},
            sources={name: each.place for name, each in inputs.items()},
            experiment=self.experiment,
        )
        gpus = own_gpus(60 * settings.wait_minutes) if self.uses_gpus(settings) else nullcontext()
        with gpus, tracking(settings), execution as running:
            output = self.work(settings, folders, out)
            artifacts = [out / name for name in self.artifacts]
            registration = self.registers(out, folders) if self.registers else None
            running.finish(output.figures, output.fingerprint, artifacts, registration)
        return output
