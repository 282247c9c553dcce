"""The engine's settings through presets, files and overrides: a new kind of engine takes along what it can."""

import json
from pathlib import Path

import pytest

from data.contracts import ContractError
from pipeline.settings import PipelineConfig, choose, load_preset, merge
from teacher.engines.config import ServerConfig, TransformersConfig, VLLMConfig

URLS = 'annotate.engine.urls=["http://a:1/v1"]'


def test_a_preset_of_another_kind_does_not_stand_in_the_way():
    single = load_preset("single-gpu").annotate.engine
    assert (single.kind, single.max_model_len) == ("vllm", 2048)
    engine = load_preset("single-gpu", ["annotate.engine.kind=transformers"]).annotate.engine
    assert engine == TransformersConfig(max_model_len=2048)
    engine = load_preset("cluster", ["annotate.engine.kind=vllm", "annotate.engine.kv_cache_gib=4"]).annotate.engine
    assert engine == VLLMConfig(kv_cache_gib=4)


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_overrides_does_not_matter(order):
    engine = load_preset("sample", ["annotate.engine.kind=openai", URLS][::order]).annotate.engine
    assert engine == ServerConfig(urls=("http://a:1/v1",), max_model_len=512)
    with pytest.raises(ContractError, match=r"annotate\.engine: kv_cache_gib has no effect on kind 'transformers'"):
        load_preset("sample", ["annotate.engine.kind=transformers", "annotate.engine.kv_cache_gib=4"][::order])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (URLS, "urls has no effect on kind 'vllm': leave it out, or set the kind to openai"),
        ("annotate.engine.batch_size=8", "batch_size has no effect on kind 'vllm'"),
        ("annotate.engine.kind=openai", "annotate.engine.urls: kind 'openai' needs `urls`"),
        ("annotate.engine.kind=vlm", "'vllm', 'openai', 'transformers'"),
        ("annotate.engine.kv_cache_gb=8", "did you mean annotate.engine.kv_cache_gib"),
        ("annotate.engine.kv_cache_gib=0", "annotate.engine.kv_cache_gib: "),
    ],
)
def test_a_setting_that_does_not_fit_is_said_by_its_key(override, sentence):
    with pytest.raises(ContractError) as caught:
        load_preset("sample", [override])
    assert sentence in str(caught.value)


def test_a_file_over_a_preset_and_overrides_over_a_file(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text('[annotate.engine]\nkind = "openai"\nurls = ["http://a:1/v1"]\nretries = 2\n')
    assert choose("sample", file).annotate.engine == ServerConfig(urls=("http://a:1/v1",), retries=2, max_model_len=512)
    back = choose("sample", file, overrides=["annotate.engine.kind=vllm"]).annotate.engine
    assert back == VLLMConfig(max_model_len=512)
    file.write_text('[annotate.engine]\nkind = "transformers"\nretries = 2\n')
    with pytest.raises(ContractError, match="retries has no effect on kind 'transformers'"):
        choose("sample", file)


def test_prefects_form_takes_settings_that_leave_the_kind_to_the_preset():
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


def test_a_kind_is_merged_by_what_it_has():
    cluster = {"engine": {"kind": "openai", "urls": ["u"], "max_model_len": 9}}
    assert merge(cluster, {"engine": {"kind": "vllm"}}) == {"engine": {"kind": "vllm", "max_model_len": 9}}
    assert merge(cluster, {"engine": {"retries": 1}}) == {"engine": cluster["engine"] | {"retries": 1}}


def test_a_run_of_an_earlier_release_that_recorded_all_kinds_settings_resumes(tmp_path: Path):
    from pipeline.resume import remember, resume

    settings = load_preset("sample", [f"runs={tmp_path}"])
    remember(settings, "annotate")
    path = settings.folder / "settings.json"
    record = json.loads(path.read_text())
    record["settings"]["annotate"]["engine"] |= {"urls": [], "retries": 6, "batch_size": 32}
    path.write_text(json.dumps(record))
    assert resume(tmp_path, "sample") == ("annotate", settings)
