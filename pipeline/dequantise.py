"""From a GGUF file to a plain transformers folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from data.contracts import ContractError, first_line

log = logging.getLogger(__name__)


def dequantise(gguf: Path, out: Path, dtype: str = "float32") -> None:
    """Write the model in `gguf` to `out` as safetensors of `dtype`, with its config, tokenizer and chat template.

    Raises `ContractError` when transformers does not know the file's architecture or a tensor is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("dequantising %s to %s", gguf.name, dtype)
    try:
        with _read_once():
            model, loading = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )  # fmt: skip
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if loading["missing_keys"]:
            raise ValueError(f"it lacks {', '.join(sorted(loading['missing_keys'])[:3])}")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ContractError(f"{gguf.name} cannot be dequantised: {first_line(error)}") from error
    # The converted tokenizer guesses its special tokens; the file's own metadata, which the config has, is right.
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token_id = getattr(model.config, f"{name}_id", None)
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False  # the old default, which damages byte-level text
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextmanager
def _read_once() -> Iterator[None]:
    """Inside, a GGUF file's header is parsed once and not four times, which took longer than a small model's weights."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader
