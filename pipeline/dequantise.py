"""From a GGUF file to a plain transformers folder, tensor by tensor: memory holds a shard and one tensor.

`AutoModelForCausalLM.from_pretrained(gguf_file=…)` holds all tensors and the model at once, 2.6 GB for 1.3 GB of bfloat16.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data.contracts import ContractError, first_line, write_json

log = logging.getLogger(__name__)

SHARD_BYTES = 200_000_000
_ELEMENTS = 4_000_000  # dequantised at a time


def dequantise(gguf: Path, out: Path, dtype: str = "float32") -> None:
    """Write the model in `gguf` to `out` as safetensors of `dtype`, with its config, tokenizer and chat template.

    Raises `ContractError` when transformers does not know the file's architecture or a tensor is missing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    log.info("dequantising %s to %s", gguf.name, dtype)
    try:
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        _write_shards(gguf, model, out)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ContractError(f"{gguf.name} cannot be dequantised: {first_line(error)}") from error
    # The converted tokenizer guesses its special tokens; the file's own metadata, which the config has, is right.
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token_id = getattr(config, f"{name}_id", None)
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False  # the old default, which damages byte-level text
    model.config.architectures, model.config.name_or_path = [type(model).__name__], ""
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _write_shards(gguf: Path, model: Any, out: Path) -> None:
    """Write the tensors of `model` (which is on the meta device) in shards with an index, as transformers names them."""
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import modeling_gguf_pytorch_utils as conversion

    reader, expected = GGUFReader(gguf), model.state_dict()
    architecture = reader.fields["general.architecture"].contents()
    kind = conversion.TENSOR_PROCESSORS.get(architecture, conversion.TensorProcessor)
    processor = kind(config=model.config.to_dict())
    names = conversion.get_gguf_hf_weights_map(model, processor)
    weight_map: dict[str, str] = {}
    shard: dict[str, Any] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for tensor in reader.tensors:
        weights, gguf_name, _ = processor.process(weights=_floats(tensor), name=tensor.name, tensor_key_mapping=names)
        name = names.get(gguf_name)
        if name not in expected:  # such as rope_freqs, which transformers computes
            continue
        if weights.shape != tuple(expected[name].shape):
            raise ValueError(f"tensor {tensor.name} has shape {weights.shape}, expected {tuple(expected[name].shape)}")
        shard[name] = torch.from_numpy(weights).to(expected[name].dtype, copy=True).contiguous()
        del weights  # a large one, and writing a shard takes memory too
        if sum(each.nbytes for each in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if missing := sorted(expected.keys() - weight_map.keys() - tied):
        raise ValueError(f"it lacks {', '.join(missing[:3])}")
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _floats(tensor: Any) -> np.ndarray:
    """A tensor of a GGUF file as float32, some rows at a time: `dequantize` needs several times their memory."""
    from gguf import dequantize

    floats = np.empty(tensor.shape[::-1], dtype=np.float32)
    rows = max(1, _ELEMENTS // floats[0].size)

    def fill(start: int) -> None:
        floats[start : start + rows] = dequantize(tensor.data[start : start + rows], tensor.tensor_type)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # numpy computes outside Python's lock
        list(threads.map(fill, range(0, len(floats), rows)))
    return floats
