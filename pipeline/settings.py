"""The settings of a whole run: one typed tree, filled from a preset file, changed by dotted keys.

One mechanism serves the command line, Prefect's form, its API and `prefect.yaml`: whatever is not given comes from the
file named by `preset`, and then from the fields' own defaults. What was left out: presets that build on each other; and
pydantic-settings, which knows neither the nearest key for one that is wrong nor which variable of a file is not set.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from data.config import DataConfig, data_of_preset
from data.contracts import Config, ContractError, UserPath
from pipeline.annotation.config import AnnotateConfig, SelectConfig
from pipeline.drift import DriftConfig
from pipeline.keys import explain, fields, merge, nearest, parse_overrides
from pipeline.spark import SparkConfig
from pipeline.tracking.config import TrackingConfig
from student.config import ExportConfig, ScoreConfig, StudentConfig
from teacher.config import TeacherConfig

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "sample"
StageName = Literal["data", "teacher", "annotate", "student", "export", "score"]
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class LoopConfig(Config):
    """Flow relevance-loop: rounds of choosing, annotating, distilling and measuring."""

    rounds: int = Field(default=4, ge=1, le=100)
    """Rounds with annotations; each has an equal share of the budget."""
    select: SelectConfig = SelectConfig()
    """The budget of all rounds together (in pairs), and how they are chosen; `uncertain` goes by the student of the round
    before."""
    min_gain: float = Field(default=0.0, ge=-1, le=1)
    """The loop ends after a round whose student is not by so much better on `valid` (ROC-AUC) than the best before; -1 goes
    on until the budget is spent."""
    compare_random: bool = False
    """Also run the rounds with pairs chosen by chance, to compare: up to twice the annotations."""


class PipelineConfig(Config):
    """Everything a flow needs: where the data is, what each stage does, and where the results go."""

    preset: str = DEFAULT_PRESET
    """Preset that fills in every value not given here; empty uses the fields' own defaults instead."""
    run: str = Field(default="run", pattern=RUN_NAME, max_length=80)
    """Name of the run, and of its folder (letters, digits, dots, dashes and underscores); unless given, the preset's name.
    The same name resumes and reuses."""
    runs: UserPath = Path("runs")
    """Folder that holds all runs."""
    weights_cache: UserPath = Field(default=Path("~/.cache/ads-relevance/weights"), validate_default=True)
    """Folder for downloaded model weights, shared by all runs."""
    wait_minutes: float = Field(default=0, ge=0)
    """How long to wait while another process holds the run's folder or this machine's GPUs; 0 refuses at once."""
    hold: tuple[StageName, ...] = ()
    """Stages that stay as they are once they have completed in this run, whatever has changed before them: with
    `hold=["teacher"]` new labels wait for the next training, and new pairs are annotated with the teacher that is there."""
    share: bool = True
    """Take a stage that another run in the same folder of runs has made from the same inputs and settings."""
    data: DataConfig = DataConfig()
    """The source of pairs, and how they are split."""
    teacher: TeacherConfig = TeacherConfig()
    """The reasoning model and its training."""
    annotate: AnnotateConfig = AnnotateConfig()
    """Labelling the pool with the teacher."""
    student: StudentConfig = StudentConfig()
    """The small model and its distillation."""
    export: ExportConfig = ExportConfig()
    """The deployable folder and the checks on it."""
    score: ScoreConfig = ScoreConfig()
    """Scoring whole tables with the exported student."""
    loop: LoopConfig = LoopConfig()
    """The rounds of flow relevance-loop."""
    drift: DriftConfig = DriftConfig()
    """When new pairs are too unlike those that teacher and student learned from."""
    spark: SparkConfig = SparkConfig()
    """The Spark session of the data, annotation and scoring jobs."""
    tracking: TrackingConfig = TrackingConfig()
    """Where runs and models are recorded."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        values = {key: value.model_dump() if isinstance(value, BaseModel) else value for key, value in given.items()}
        preset = values.get("preset", DEFAULT_PRESET)
        if isinstance(preset, str) and preset:
            given_data = values.get("data")
            filled = _filled(preset, given_data if isinstance(given_data, dict) else {})
            values = merge(filled, values) | {"preset": preset}
            values.setdefault("run", preset)
        return values

    @property
    def folder(self) -> Path:
        """The folder of this run."""
        return self.runs / self.run

    @property
    def tracking_uri(self) -> str:
        """The MLflow store in use."""
        return self.tracking.uri or f"sqlite:///{self.runs.resolve() / 'mlflow.db'}"


def preset_names() -> list[str]:
    """Names of the preset files, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """The values of a preset file; raises `ContractError` naming the nearest presets when there is none."""
    if name not in preset_names():
        raise ContractError(f"no preset '{name}'{nearest(name, preset_names())}")
    return read_toml(PRESETS / f"{name}.toml")


def _filled(preset: str, data: dict[str, Any]) -> dict[str, Any]:
    """The values of a preset file, of its data settings those that hold beside the `data` given."""
    values = read_preset(preset)
    return values | {"data": data_of_preset(values.get("data", {}), data)}


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's values, with `${NAME:-default}` in texts replaced from the environment.

    Raises `ContractError` when the file cannot be read, is not TOML in UTF-8, or names a variable that is not set.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ContractError(f"config file {path} cannot be read ({error.strerror}); name a TOML file") from None
    except UnicodeDecodeError:
        raise ContractError(f"config file {path} is not text in UTF-8; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        quotes = "; texts stand in quotes" if "Invalid value" in str(error) else ""
        raise ContractError(f"config file {path} is not TOML: {error}{quotes}") from None
    return _expand(values, path)


def load_preset(name: str = DEFAULT_PRESET, overrides: Iterable[str] = ()) -> PipelineConfig:
    """The settings of a preset, with `key=value` overrides; raises `ContractError` for anything that is not valid."""
    return apply_overrides(build_settings({"preset": name}), overrides)


def build_settings(values: dict[str, Any]) -> PipelineConfig:
    """Validate a tree of values (preset included); raises `ContractError` with the first fault in one line."""
    if isinstance(preset := values.get("preset") or DEFAULT_PRESET, str):
        read_preset(preset)  # its own message is clearer than one wrapped by pydantic
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise ContractError(explain(error, PipelineConfig)) from None


def choose(
    preset: str = "",
    config: Path | None = None,
    run: str = "",
    runs: Path | None = None,
    overrides: Iterable[str] = (),
    base: PipelineConfig | None = None,
) -> PipelineConfig:
    """Settings as a command line names them: the preset, over it a TOML file, over it `key=value` overrides.

    All of them come over the settings of `base`, where there is one. A run without a name gets the name of the file, else
    that of the preset. Raises `ContractError` for anything that is not valid.
    """
    values = base.model_dump() if base is not None else {}
    if base is not None and preset:
        filled = _filled(preset, base.data.model_dump(exclude_defaults=True))
        if base.data.source_name != "synthetic":  # whose data it is stays
            filled["data"].pop("source", None)
        values = merge(values, filled)
    if config is not None:
        config = config.expanduser()
        given = _beside(config, read_toml(config))
        if not run and "run" not in values | given:
            if not re.fullmatch(RUN_NAME, config.stem):
                raise ContractError(f"'{config.stem}' cannot name a run; give one with --name")
            given["run"] = config.stem
        values = merge(values, given)
    named = {"preset": preset, "run": run, "runs": "" if runs is None else str(runs)}
    return apply_overrides(build_settings(values | {key: value for key, value in named.items() if value}), overrides)


def apply_overrides(config: PipelineConfig, overrides: Iterable[str]) -> PipelineConfig:
    """Settings with `a.b=value` applied in order; values are read as TOML, and as plain text where they are not TOML.

    Raises `ContractError` naming the nearest keys for an unknown key, and the reason for a value that is refused.
    """
    values = parse_overrides(PipelineConfig, overrides)
    if "preset" in values:  # its values lie below those of `config`, and would come too late
        raise ContractError(f"a preset is named with --preset: --preset {values['preset']} instead of --set preset=…")
    return build_settings(merge(config.model_dump(), values))


def _beside(file: Path, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A file's values, in which relative paths start at the file's folder."""
    paths = fields(PipelineConfig, of=Path)

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _beside(file, value, f"{key}.")
        if not isinstance(value, str) or not (value.startswith("path:") or key in paths):
            return value
        path = value.removeprefix("path:")
        return value if path.startswith("~") else f"{value.removesuffix(path)}{file.parent / path}"

    return {name: moved(f"{prefix}{name}", value) for name, value in values.items()}


def _expand(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _expand(inner, path) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, path) for inner in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name) or default
        if found is None:
            raise ContractError(f"{path} needs the environment variable {name}, which is not set")
        return found

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}", variable, value)
