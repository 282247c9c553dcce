"""The settings of an engine: a union by `kind`, so that a setting belongs to the engines that it has an effect on."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from data.contracts import Config


def base_url(url: str, remedy: str = "") -> str:
    """A server's URL without a last slash; raises `ValueError` where it is none, or has a login: it is kept with the run."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"'{url}' is not a URL; it must start with http:// or https://")
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise ValueError(f"a base URL has no login and no `?…`{remedy}")
    return url.rstrip("/")


class _AnyEngine(Config):
    max_model_len: int = Field(default=0, ge=0, le=10_000_000)
    """Longest prompt plus completion in tokens; 0 takes the model's own limit. A small value saves memory."""


class LocalEngine(_AnyEngine):
    """What the engines inside this process share."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` is the model's own on a GPU. On a CPU it is bfloat16 for a model that is stored in 16 bits
    where the CPU multiplies it fast (AMX, AVX512-BF16), and float32 otherwise."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of the engine; 0 takes all cores (the annotation job divides them among its engines)."""


class VLLMConfig(LocalEngine):
    kind: Literal["vllm"] = "vllm"
    """`vllm` in this process, `openai` for servers that speak OpenAI's protocol, `transformers` where vLLM has no build.
    A new kind keeps those values of a preset that it has too."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM may take."""
    kv_cache_gib: int = Field(default=1, ge=1, le=4096)
    """Memory for vLLM's key-value cache on a CPU, in GiB."""
    max_num_seqs: int = Field(default=256, ge=1, le=65_536)
    """Completions that vLLM decodes at the same time."""
    enforce_eager: bool | None = None
    """Skip graph capture and compilation in vLLM; unset, it is skipped on a CPU and done on a GPU."""


class ServerConfig(_AnyEngine):
    kind: Literal["openai"] = "openai"
    """As for `vllm`."""
    urls: tuple[str, ...] = Field(default=(), validate_default=True)
    """Base URLs of the servers, such as `http://gpu-1:8000/v1`; prompts are spread over them evenly."""
    served_model: str = ""
    """The model's name on the servers; empty asks the server, which must have just one."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the servers' key, if they want one."""
    concurrency: int = Field(default=64, ge=1, le=4096)
    """Requests in flight at each server."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds to wait for one request."""
    retries: int = Field(default=6, ge=0, le=20)
    """How often in a row a server may fail, with growing pauses, before it counts as dead."""

    @field_validator("urls")
    @classmethod
    def _http(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if not urls:
            raise ValueError("kind 'openai' needs `urls`, at least one server")
        return tuple(
            base_url(url, "; put the servers' key into the environment variable that `api_key_env` names")
            for url in urls
        )


class TransformersConfig(LocalEngine):
    kind: Literal["transformers"] = "transformers"
    """As for `vllm`."""
    batch_size: int = Field(default=32, ge=1, le=4096)
    """Sequences decoded at the same time."""


ENGINE_KINDS: dict[str, type[_AnyEngine]] = {
    "vllm": VLLMConfig,
    "openai": ServerConfig,
    "transformers": TransformersConfig,
}


def with_kind(values: dict[str, Any], kind: Any) -> dict[str, Any]:
    """An engine's `values` for an engine of another kind: without the settings that only other kinds have."""
    fields = ENGINE_KINDS[kind].model_fields if kind in list(ENGINE_KINDS) else values
    others = {name for config in ENGINE_KINDS.values() for name in config.model_fields} - set(fields)
    return {name: value for name, value in values.items() if name not in others}


def _only_of_its_kind(values: Any, info: ValidationInfo) -> Any:
    """The kind is vLLM unless it is given; a setting that has no effect on it is refused, but for one in an old record."""
    if not isinstance(values, dict):
        return values
    kind = values.get("kind", "vllm")
    effective = with_kind(values, kind)
    if info.context != "recorded":
        for name in values.keys() - effective.keys():
            owners = " or ".join(other for other, config in ENGINE_KINDS.items() if name in config.model_fields)
            raise ValueError(f"{name} has no effect on kind '{kind}': leave it out, or set the kind to {owners}")
    return {"kind": kind} | effective


def _any_kind(schema: dict[str, Any]) -> None:
    schema["anyOf"] = schema.pop("oneOf")  # settings that leave the kind to the preset may fit several


EngineConfig = Annotated[
    VLLMConfig | ServerConfig | TransformersConfig,
    Field(discriminator="kind", json_schema_extra=_any_kind),
    BeforeValidator(_only_of_its_kind),
]
