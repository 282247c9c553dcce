"""What the teacher takes from TRL, without vLLM.

TRL imports vLLM wherever it is installed, which takes 7 seconds and 170 MB; most trainings do not sample with it.
"""

from __future__ import annotations

import importlib

import trl.import_utils as import_utils

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
    "add_fused_lm_head",
    "load_vllm",
    "unwrap_model_for_generation",
    "vllm_generation",
]


def load_vllm() -> None:
    """Let TRL's trainers sample with vLLM after all."""
    importlib.reload(vllm_client)
    importlib.reload(vllm_generation)
    grpo_trainer.VLLMGeneration = vllm_generation.VLLMGeneration
