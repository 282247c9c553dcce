"""vLLM inside this process, on a GPU or (the CPU build) without one.

vLLM's CPU build packs float32 weights when it loads them, so that later updates would not arrive: `updatable` prevents it.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import warnings
from collections.abc import Iterable
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.contracts import ContractError, first_line
from teacher.engines.base import Completion, Engine, Result, Sampling, check_lengths, prompt_seed
from teacher.engines.config import VLLMConfig

log = logging.getLogger(__name__)

_ENVIRONMENT = {
    # The engine lives in this process: no second copy of the interpreter, and it dies with its owner.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Leave the threads where they are: binding takes whole cores away from Spark and from other engines.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Spinning threads cost a factor of ten as soon as anything else runs on the machine.
    "OMP_WAIT_POLICY": "passive",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VLLMEngine(Engine):
    """See `Engine`. Prefixes that prompts share (the guideline) are computed once, where the architecture allows it."""

    def __init__(self, config: VLLMConfig, model: Path, *, updatable: bool = False, **options: Any) -> None:
        """`updatable`: `load_weights` will be called; `options`: further ones of vLLM's `EngineArgs`."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # about its own code
        try:
            import torch
            from vllm import LLM, EngineArgs
            from vllm.platforms import current_platform

            from teacher.model import number_format
        except ImportError as error:
            raise ContractError(
                f"vLLM is not usable here ({error}): install the extra `cpu` or `gpu`, or set the engine's kind to "
                "`transformers` or `openai`"
            ) from error
        on_cpu = current_platform.is_cpu()
        options = {
            "model": str(model),
            "load_format": "safetensors",  # never a pickle
            "trust_remote_code": False,
            "dtype": number_format(config.dtype, model) if on_cpu else config.dtype,
            "max_model_len": config.max_model_len or -1,  # −1: the model's own limit, or what memory allows
            "max_num_seqs": config.max_num_seqs,
            "scheduling_policy": "priority",
            "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
            "gpu_memory_utilization": config.gpu_memory_utilization,
        } | options
        set_num_threads = torch.set_num_threads
        if config.threads:
            set_num_threads(config.threads)
        self._owns_group = not torch.distributed.is_initialized()
        registry, logged = logging.getLogger("vllm.model_executor.models.registry"), BufferingHandler(1000)
        registry.addHandler(logged)  # it only logs why a model's class cannot be had, and then raises "check the logs"
        try:
            if on_cpu:
                if updatable:
                    import vllm._custom_ops as ops

                    ops._supports_onednn = False
                # A prompt is never prefilled in parts: after a part vLLM 0.31 rewinds the request's own generator, which a
                # CPU generator cannot do ("CPU Generator does not use offset"), and the whole batch is lost.
                options |= {"kv_cache_memory_bytes": config.kv_cache_gib << 30, "enable_chunked_prefill": False}
                if EngineArgs(**options).create_model_config().has_inner_state:
                    options["enable_prefix_caching"] = False  # of recurrent layers it is only to be had with parts
            self._llm = LLM(**options, use_tqdm_on_load=False)
        except Exception as error:  # of whatever kind: the model's code runs here
            errors = [error, *(record.exc_info[1] for record in logged.buffer if record.exc_info)]
            raise ContractError(f"vLLM cannot load {model}: {_reason(errors[-1] or error)}") from error
        finally:
            torch.set_num_threads = set_num_threads  # the CPU worker replaces it for the whole process
            registry.removeHandler(logged)
        self.max_model_len = self._llm.model_config.max_model_len
        self._numbers = itertools.count()
        self._running: dict[str, tuple[Any, list[int], Sampling]] = {}
        self._refused: list[tuple[Any, Result]] = []
        self._tokens, self._cached = 0, 0

    @property
    def llm(self) -> Any:
        """vLLM's own `LLM`, for a trainer that samples with it."""
        return self._llm

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Go on with other weights of the same model: names and tensors as in its folder. Needs `updatable`."""
        self._llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(weights)
        self._llm.reset_prefix_cache()

    def submit(self, tag: Any, prompt: list[int], sampling: Sampling) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            n=sampling.copies,  # it refuses more than one when greedy
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=prompt_seed(sampling.seed, prompt) + sampling.first,  # vLLM counts up from it
            logprobs=sampling.logprobs or None,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = str(next(self._numbers))
        try:
            check_lengths([prompt], self.max_model_len)
            priority = 0 if sampling.first else 1  # the lower, the earlier
            self._llm.llm_engine.add_request(name, tokens_input(list(prompt)), parameters, priority=priority)
        except (ValueError, TypeError) as error:
            self._refused.append((tag, error))
        else:
            self._running[name] = (tag, prompt, sampling)

    def finished(self) -> list[tuple[Any, Result]]:
        done, self._refused = self._refused, []
        while self._running and not done:
            try:
                outputs = self._llm.llm_engine.step()
            except Exception as error:
                done += self._one_by_one(error)
            else:
                done += [self._take(output) for output in outputs if output.finished]
        return done

    def cancel(self) -> None:
        if self._tokens:
            log.info("prefix cache: %.0f %% of %d prompt tokens", 100 * self._cached / self._tokens, self._tokens)
            self._tokens, self._cached = 0, 0
        self._llm.llm_engine.abort_request(list(self._running))
        self._running, self._refused = {}, []

    def _take(self, output: Any) -> tuple[Any, Result]:
        tag, prompt, sampling = self._running.pop(output.request_id)
        self._tokens += len(prompt)
        self._cached += output.num_cached_tokens or 0
        unfinished = [
            sample.finish_reason for sample in output.outputs if sample.finish_reason not in ("stop", "length")
        ]
        if unfinished:
            return tag, RuntimeError(f"vLLM ended a completion with finish_reason {unfinished[0]!r}")
        return tag, [_completion(sample) for sample in output.outputs] * (sampling.n // sampling.copies)

    def _one_by_one(self, error: Exception) -> list[tuple[Any, Result]]:
        """vLLM's step failed with everything in it: each prompt again, alone, so that only the culprit is lost."""
        waiting = list(self._running.values())
        self.cancel()
        if len(waiting) == 1:
            return [(waiting[0][0], error)]
        log.warning("vLLM failed with %d prompts in flight, trying each alone: %s", len(waiting), error)
        done: list[tuple[Any, Result]] = []
        for request in waiting:
            self.submit(*request)
            done += self.finished()
        return done

    def close(self) -> None:
        """Free the model and the cache."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        if self._owns_group:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        gc.collect()


def _reason(error: BaseException) -> str:
    """The root cause in one line, with what helps when it is memory."""
    while error.__cause__ is not None and "subprocess" not in str(error):
        error = error.__cause__
    if isinstance(error, ValidationError):
        reason = error.errors()[0]["msg"]
    else:  # of a subprocess its last words
        reason = str(error).strip().splitlines()[-1] if "subprocess" in str(error) else first_line(error)
    if "memory" in reason.lower() or "KV cache" in reason:
        return (
            f"{reason}; lower max_model_len or max_num_seqs, or give more with kv_cache_gib or gpu_memory_utilization"
        )
    return f"{reason}; kind `transformers` may load it"


def _completion(sample: Any) -> Completion:
    logprobs = None if sample.logprobs is None else _by_token(sample.logprobs)
    return Completion(sample.text, list(sample.token_ids), sample.finish_reason, logprobs)


def _by_token(flat: Any) -> list[dict[int, float]]:
    """vLLM's flat arrays as one dict for each step; building its own objects instead costs as much as a small model."""
    spans = zip(flat.start_indices, flat.end_indices, strict=True)
    return [dict(zip(flat.token_ids[a:b], flat.logprobs[a:b], strict=True)) for a, b in spans]
