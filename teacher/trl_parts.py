"""What the teacher takes from TRL, without vLLM.

TRL imports vLLM wherever it is installed, which takes 7 seconds and 170 MB; most trainings do not sample with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trl.import_utils as import_utils

from teacher.shared_prefix import causal_lm

_is_vllm_available = import_utils.is_vllm_available
import_utils.is_vllm_available = lambda *unused, **more: False
try:
    from trl import GRPOConfig, GRPOTrainer
    from trl.generation import vllm_client, vllm_generation
    from trl.models import unwrap_model_for_generation
    from trl.trainer import grpo_trainer
    from trl.trainer.utils import add_fused_lm_head
finally:
    import_utils.is_vllm_available = _is_vllm_available

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "load_vllm",
    "untempered_head",
    "unwrap_model_for_generation",
    "vllm_generation",
    "with_forward",
]


def load_vllm() -> None:
    """Let TRL's trainers sample with vLLM after all."""
    importlib.reload(vllm_client)
    importlib.reload(vllm_generation)
    grpo_trainer.VLLMGeneration = vllm_generation.VLLMGeneration


def untempered_head(model: Any) -> Callable[..., Any]:
    """The forward of a model whose fused head divides by no temperature, as that of supervised fine-tuning does."""
    language_model = causal_lm(model)
    tempered = language_model.forward
    add_fused_lm_head(language_model)
    untempered, language_model.forward = language_model.forward, tempered
    return untempered  # type: ignore[no-any-return]


@contextmanager
def with_forward(model: Any, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Inside, the language model of `model` has this forward, if there is one."""
    language_model = causal_lm(model)
    kept = language_model.forward
    language_model.forward = forward or kept
    try:
        yield
    finally:
        language_model.forward = kept
