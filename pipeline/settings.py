"""The settings of a whole run: one typed tree, filled from a preset file, changed by dotted keys.

One mechanism serves the command line, Prefect's form, its API and `prefect.yaml`: whatever is not given comes from the
file named by `preset`, and then from the fields' own defaults. What was left out: presets that build on each other.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from datetime import date, time
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator

from data.config import DataConfig, without_source
from data.contracts import Config, ContractError
from pipeline.annotation.config import AnnotateConfig
from pipeline.redact import holds_secret, is_secret
from pipeline.spark import SparkConfig
from student.config import ExportConfig, ScoreConfig, StudentConfig
from teacher.config import TeacherConfig

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "sample"
StageName = Literal["data", "teacher", "annotate", "student", "export", "score"]
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class TrackingConfig(Config):
    """Where runs and models are recorded with MLflow."""

    enabled: bool = True
    """Record runs and models with MLflow; metrics are kept in the run's folder either way."""
    uri: str = ""
    """MLflow tracking server or store; empty means the SQLite file `mlflow.db` in the folder of runs. Without a password or
    token: MLflow reads them from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""
    experiment_prefix: str = Field(default="ads-relevance", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    """Experiments are named PREFIX/STAGE, registered models PREFIX-teacher and PREFIX-student."""
    log_weights: bool = False
    """Upload the teacher's weights too. Off, its version points at a folder of card, figures and settings."""
    promotion_margin: float = Field(default=0.005, ge=0, le=1)
    """A new student becomes champion if the lower 95 % limit of its ROC-AUC minus the champion's, by paired bootstrap on the
    test pairs that both were measured on, is at least minus this."""

    @model_validator(mode="after")  # of the table, not the field: a message about a field repeats its value
    def _uri_holds_no_secret(self) -> Self:
        if holds_secret(self.uri):
            raise ValueError(
                "uri must not hold a password or token, since settings are recorded: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN (for a database PGPASSWORD or its own file), in the "
                "environment, and give the address alone"
            )
        return self


class PipelineConfig(Config):
    """Everything a flow needs: where the data is, what each stage does, and where the results go."""

    preset: str = DEFAULT_PRESET
    """Preset that fills in every value not given here; empty uses the fields' own defaults instead."""
    run: str = Field(default="run", pattern=RUN_NAME, max_length=80)
    """Name of the run, and of its folder; unless given, the preset's name. The same name resumes and reuses."""
    runs: Path = Path("runs")
    """Folder that holds all runs."""
    weights_cache: Path = Path("~/.cache/ads-relevance/weights")
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
            filled = read_preset(preset)
            if isinstance(given_data := values.get("data"), dict):
                filled["data"] = without_source(filled.get("data", {}), given_data)
            values = merge(filled, values) | {"preset": preset}
            values.setdefault("run", preset)
        return values

    @property
    def folder(self) -> Path:
        """The folder of this run."""
        return self.runs.expanduser() / self.run

    @property
    def tracking_uri(self) -> str:
        """The MLflow store in use."""
        return self.tracking.uri or f"sqlite:///{self.runs.expanduser().resolve() / 'mlflow.db'}"


def preset_names() -> list[str]:
    """Names of the preset files, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """The values of a preset file; raises `ContractError` naming the nearest presets when there is none."""
    if name not in preset_names():
        raise ContractError(f"no preset '{name}'{nearest(name, preset_names())}")
    return read_toml(PRESETS / f"{name}.toml")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's values, with `${NAME:-default}` in texts replaced from the environment.

    Raises `ContractError` when the file is missing, is not TOML, or names a variable that is not set.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ContractError(f"config file {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ContractError(f"config file {path} is not TOML: {error}") from None
    return _expand(values, path)


def load_preset(name: str = DEFAULT_PRESET, overrides: Iterable[str] = ()) -> PipelineConfig:
    """The settings of a preset, with `key=value` overrides; raises `ContractError` for anything that is not valid."""
    return apply_overrides(build_settings({"preset": name}), overrides)


def build_settings(values: dict[str, Any]) -> PipelineConfig:
    """Validate a tree of values (preset included); raises `ContractError` with the first fault in one line."""
    read_preset(values.get("preset") or DEFAULT_PRESET)  # its own message is clearer than one wrapped by pydantic
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise ContractError(_explain(error)) from None


def choose(
    preset: str = "", config: Path | None = None, run: str = "", runs: Path | None = None, overrides: Iterable[str] = ()
) -> PipelineConfig:
    """Settings as a command line names them: the preset, over it a TOML file, over it `key=value` overrides.

    A run without a name gets the name of the file, else that of the preset. Raises `ContractError` for anything that is
    not valid.
    """
    values = read_toml(config) if config is not None else {}
    if config is not None and not run and "run" not in values:
        if not re.fullmatch(RUN_NAME, config.stem):
            raise ContractError(f"'{config.stem}' cannot name a run; give one with --name")
        values["run"] = config.stem
    chosen = {"preset": preset, "run": run, "runs": "" if runs is None else str(runs)}
    return apply_overrides(build_settings(values | {key: value for key, value in chosen.items() if value}), overrides)


def apply_overrides(config: PipelineConfig, overrides: Iterable[str]) -> PipelineConfig:
    """Settings with `a.b=value` applied in order; values are read as TOML, and as plain text where they are not TOML.

    Raises `ContractError` naming the nearest keys for an unknown key, and the reason for a value that is refused.
    """
    values = config.model_dump()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ContractError(f"'{override}' is not of the form key=value, for example teacher.seed=3")
        _set(values, key.strip(), text.strip())
    return build_settings(values)


def parse_value(text: str) -> Any:
    """A TOML value, else a JSON one, else the text itself: `3`, `1e-4`, `true`, `["a"]`, `"3"`, `path:models/x`.

    `none` and `null` give None, which TOML lacks.
    """
    if text.lower() in {"none", "null"}:
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        try:
            return json.loads(text) if text[:1] in "[{" else text
        except ValueError:
            return text
    # A date is text to every field of ours, and a line break would smuggle in a second key.
    return text if len(parsed) > 1 or isinstance(parsed["value"], date | time) else parsed["value"]


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a config, depth first."""
    for name, field in model.model_fields.items():
        inner = _models(field.annotation)
        if not inner:
            yield f"{prefix}{name}"
        for each in inner:
            yield from field_names(each, f"{prefix}{name}.")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; tables are merged key by key, all else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        mine = merged.get(key)
        merged[key] = merge(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return merged


def nearest(name: str, valid: Iterable[str]) -> str:
    """`: did you mean …` for a message about an unknown name, or all the names where none is near."""
    names = list(dict.fromkeys(valid))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f": did you mean {', '.join(near)}?" if near else f"; there are {', '.join(names)}"


def _set(values: dict[str, Any], key: str, text: str) -> None:
    """Set the dotted `key` in the tree `values` to the value written as `text`."""
    models: list[type[BaseModel]] = [PipelineConfig]
    table, parts = values, key.split(".")
    for depth, part in enumerate(parts):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if depth and not models:
            raise ContractError(f"unknown key '{key}': '{'.'.join(parts[:depth])}' is a single value")
        if not fields:
            raise ContractError(f"unknown key '{key}'{nearest(key, _keys_near(parts[:depth], models))}")
        annotations = [field.annotation for field in fields]
        models = [model for annotation in annotations for model in _models(annotation)]
        rest = parts[depth + 1 :]
        if not rest:
            value = _typed(text, annotations)
            if isinstance(value, dict) and isinstance(table.get(part), dict):
                value = merge(table[part], value)
            table[part] = value
            return
        if not models and any(_is_dict(annotation) for annotation in annotations):
            # Keys of a free table hold dots themselves, as Spark's do.
            table[part] = {**(table.get(part) or {}), ".".join(rest): _typed(text, [_dict_value(annotations)])}
            return
        table[part] = dict(table.get(part) or {})
        table = table[part]


def _keys_near(parts: list[str], models: list[type[BaseModel]]) -> list[str]:
    """Valid keys to compare an unknown one with: those beside it, and below them."""
    prefix = "".join(f"{part}." for part in parts)
    names = [key for model in models for key in field_names(model, prefix)]
    top = [prefix + name for model in models for name in model.model_fields]
    return top + names if parts else names + top


def _typed(text: str, annotations: list[Any]) -> Any:
    """`text` as a value for a field: one that takes text but no number gets it as it is written."""
    value = parse_value(text)
    kinds = {kind for annotation in annotations for kind in _plain(annotation)}
    if not isinstance(value, str | type(None) | list | dict) and kinds & {str, Path} and not kinds & {int, float, bool}:
        return text
    return value


def _plain(annotation: Any) -> list[Any]:
    """The classes in an annotation, out of its unions and `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _plain(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for argument in get_args(annotation) for kind in _plain(argument)]
    return [annotation]


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [kind for kind in _plain(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _is_dict(annotation: Any) -> bool:
    return any(get_origin(kind) is dict or kind is dict for kind in _plain(annotation))


def _dict_value(annotations: list[Any]) -> Any:
    for annotation in annotations:
        for kind in _plain(annotation):
            if get_origin(kind) is dict:
                return get_args(kind)[1]
    return Any


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


def _explain(error: ValidationError) -> str:
    """The first fault of a validation in one line, and how many more there are."""
    faults = error.errors(include_url=False)
    first = faults[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"unknown key '{key}'{nearest(key, field_names(PipelineConfig))}"
    else:
        given = "" if isinstance(first["input"], dict) or is_secret(key) else f" (given: {first['input']!r:.100})"
        text = f"{key or 'settings'}: {first['msg'].removeprefix('Value error, ')}{given}"
    return text if len(faults) == 1 else f"{text}; and {len(faults) - 1} more like it"
