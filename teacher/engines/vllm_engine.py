"""vLLM inside this process, on a GPU or (the CPU build) without one.

What was left out: weight updates. vLLM's CPU build packs float32 weights when it loads them, so later updates do not
arrive unless `vllm._custom_ops._supports_onednn = False` is set before the engine is built; the trainer does that for
its own engine, and this one only ever reads a finished folder.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.contracts import ContractError
from teacher.engines.base import (
    Completion,
    EngineConfig,
    Result,
    Sampling,
    check_lengths,
    generate_all,
    prompt_seed,
)

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


class VLLMEngine:
    """See `Engine`. Prefixes that prompts share (the guideline) are computed once.

    `prompt_tokens` and `cached_tokens` count the tokens of all finished prompts (once for a prompt, not for each of its
    samples) and those of them that came from the prefix cache, which keeps whole blocks of `block_size` tokens.
    """

    def __init__(self, config: EngineConfig, model: Path) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # about its own code
        try:
            import torch
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ContractError(
                f"vLLM is not usable here ({error}): install the extra `cpu` or `gpu`, or set the engine's kind to "
                "`transformers` or `openai`"
            ) from error
        on_cpu = current_platform.is_cpu()
        options: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
        if on_cpu:
            # A prompt is never prefilled in parts: after a part vLLM 0.31 rewinds the request's own generator, which a
            # CPU generator cannot do ("CPU Generator does not use offset"), and the whole batch is lost.
            options = {"kv_cache_memory_bytes": config.kv_cache_gib << 30, "enable_chunked_prefill": False}
        set_num_threads = torch.set_num_threads
        if config.threads:
            set_num_threads(config.threads)
        self._owns_group = not torch.distributed.is_initialized()
        try:
            self._llm = LLM(
                model=str(model),
                load_format="safetensors",  # never a pickle
                trust_remote_code=False,
                dtype="float32" if config.dtype == "auto" and on_cpu else config.dtype,
                max_model_len=config.max_model_len or -1,  # −1: the model's own limit, or what memory allows
                max_num_seqs=config.max_num_seqs,
                use_tqdm_on_load=False,
                enforce_eager=on_cpu if config.enforce_eager is None else config.enforce_eager,
                **options,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ContractError(
                f"vLLM cannot load {model}: {error}; a smaller max_model_len or max_num_seqs, or more memory "
                "(kv_cache_gib, gpu_memory_utilization), helps when it does not fit"
            ) from error
        finally:
            torch.set_num_threads = set_num_threads  # the CPU worker replaces it for the whole process
        self.max_model_len: int = self._llm.model_config.max_model_len
        self.block_size: int = self._llm.llm_engine.vllm_config.cache_config.block_size
        self.prompt_tokens = self.cached_tokens = 0
        self._numbers = itertools.count()
        self._running: dict[str, tuple[Any, list[int], Sampling]] = {}
        self._refused: list[tuple[Any, Result]] = []

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """See `Engine.generate`."""
        check_lengths(prompts, self.max_model_len)
        return generate_all(self, prompts, sampling)

    def submit(self, tag: Any, prompt: list[int], sampling: Sampling) -> None:
        """See `Engine.submit`."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            n=_copies(sampling),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=prompt_seed(sampling.seed, prompt),
            logprobs=sampling.logprobs or None,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = str(next(self._numbers))
        try:
            check_lengths([prompt], self.max_model_len)
            self._llm.llm_engine.add_request(name, tokens_input(list(prompt)), parameters)
        except (ValueError, TypeError) as error:
            self._refused.append((tag, error))
        else:
            self._running[name] = (tag, prompt, sampling)

    def finished(self) -> list[tuple[Any, Result]]:
        """See `Engine.finished`."""
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
        """See `Engine.cancel`."""
        self._llm.llm_engine.abort_request(list(self._running))
        self._running, self._refused = {}, []

    def _take(self, output: Any) -> tuple[Any, Result]:
        tag, prompt, sampling = self._running.pop(output.request_id)
        self.prompt_tokens += len(prompt)
        self.cached_tokens += output.num_cached_tokens or 0
        samples = [_completion(sample) for sample in output.outputs]
        return tag, samples * (sampling.n // len(samples))

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


def _copies(sampling: Sampling) -> int:
    return 1 if sampling.temperature == 0 else sampling.n  # vLLM refuses n > 1 when greedy: all are the same


def _completion(sample: Any) -> Completion:
    return Completion(
        text=sample.text,
        token_ids=list(sample.token_ids),
        finish_reason="length" if sample.finish_reason == "length" else "stop",
        top_logprobs=None if sample.logprobs is None else _by_token(sample.logprobs),
    )


def _by_token(flat: Any) -> list[dict[int, float]]:
    """vLLM's flat arrays as one dict for each step; building its own objects instead costs as much as a small model."""
    spans = zip(flat.start_indices, flat.end_indices, strict=True)
    return [dict(zip(flat.token_ids[a:b], flat.logprobs[a:b], strict=True)) for a, b in spans]
