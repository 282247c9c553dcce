"""Engines that turn prompts into completions: vLLM in this process, OpenAI-compatible servers, transformers."""

from __future__ import annotations

from pathlib import Path

from data.contracts import ContractError
from teacher.engines.base import Engine
from teacher.engines.config import EngineConfig, ServerConfig, TransformersConfig


def open_engine(config: EngineConfig, model: Path) -> Engine:
    """Load `model` (a transformers folder) in the engine that `config` names; only that engine's libraries are imported.

    Raises `ContractError` when the engine is not installed or cannot load the model.
    """
    if not (model / "config.json").is_file():
        raise ContractError(f"{model} has no config.json: it is not a model folder")
    if isinstance(config, ServerConfig):
        from teacher.engines.openai_engine import OpenAIEngine

        return OpenAIEngine(config, model)
    if isinstance(config, TransformersConfig):
        from teacher.engines.transformers_engine import load_transformers

        return load_transformers(config, model)
    from teacher.engines.vllm_engine import VLLMEngine

    return VLLMEngine(config, model)
