"""The teacher's model folder: loading, adapters, saving, and the fingerprint of its weights.

Weights that are trained are in float32 whatever the computation is in: at usual learning rates bfloat16 would round most of
their updates away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data.contracts import ContractError, digest_files, write_json
from teacher.chat_template import plain_chat_template
from teacher.config import TeacherConfig
from teacher.distributed import is_main, local_rank
from teacher.reading import end_tokens

# What transformers raises for a folder that it cannot read, a config with wrong values, a package that is not installed.
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, StrictDataclassError)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def load_model(folder: Path, config: TeacherConfig) -> tuple[Any, Any]:
    """See `load_causal_lm`; in the number format that it is to be trained in."""
    # Below LoRA adapters, which are in float32 themselves, the weights stay as they are.
    return load_causal_lm(folder, config.dtype if config.lora_rank else "float32")


def load_causal_lm(folder: Path, dtype: str) -> tuple[Any, Any]:
    """The causal language model and tokenizer in `folder`, on a GPU where there is one; no remote code, safetensors only.

    The model ends a completion at every token of `end_tokens`. Raises `ContractError` when the folder holds no such model.
    """
    tokenizer = load_tokenizer(folder)
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text, options = settings.get_text_config(), {}
        if getattr(text, "attn_logit_softcapping", None):  # Gemma 2's, which transformers' sdpa attention leaves out
            options["attn_implementation"] = "eager"
        if getattr(text, "output_router_logits", False):  # a loss over the whole mask, which breaks while decoding
            text.output_router_logits = False
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=settings, trust_remote_code=False, use_safetensors=True, dtype=dtype, **options
        )
        if torch.cuda.is_available():
            model = model.to(f"cuda:{local_rank()}")
    except _LOADING_ERRORS as error:
        raise _unloadable(folder, error) from error
    name_the_body(model)
    # The model's own sampling settings are not ours, and some of them cannot even be saved again.
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(end_tokens(folder, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return model, tokenizer


def name_the_body(model: Any) -> None:
    """Make `model.base_model` the model without its head, in place, where the class gives that another name than it has.

    Llama 4 does, and TRL's fused head and ours look for it there.
    """
    if model.base_model is model and isinstance(getattr(model, "model", None), torch.nn.Module):
        model.base_model_prefix = "model"


def without_dropout(model: Any) -> None:
    """Turn off, in place, the dropout that modules keep as a number; `torch.nn.Dropout` keeps it in `p`."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _unloadable(folder: Path, error: Exception) -> ContractError:
    """With a remedy that is ours where transformers proposes another, or lists all that it knows."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        reason = (
            "it needs code out of its own folder (`auto_map` in its config), and such code is never run; choose a model of "
            "a type that transformers itself has"
        )
    elif "Unrecognized configuration class" in reason:
        reason = (
            "transformers cannot load a model of its type as a decoder of text; choose another model, or save its language "
            "model by itself"
        )
    return ContractError(f"{folder} cannot be loaded as a causal language model: {reason:.500}")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, with padding and a chat template; raises `ContractError` when there is none that can do."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except _LOADING_ERRORS as error:
        raise _unloadable(folder, error) from None
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise ContractError(f"the tokenizer in {folder} has no end-of-sequence token; choose another model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = plain_chat_template(tokenizer)
    return tokenizer


def stored_dtype(folder: Path) -> torch.dtype:
    """The number format of the weights in a model folder, as its config.json says; float32 where it does not.

    Raises `ContractError` when the folder holds no such file.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype or torch.float32
    except _LOADING_ERRORS as error:
        raise _unloadable(folder, error) from error


def number_format(asked: str, folder: Path) -> str:
    """`asked`, or for `auto` what this machine computes fastest for the model in `folder` without a loss: bfloat16 for
    weights that are stored in 16 bits, on a GPU or CPU with units for it, and float32 otherwise."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported()
    else:  # without such units the CPU's kernels for bfloat16 are slower than those for float32
        units = torch.cpu.get_capabilities()
        fast = any(units.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return "bfloat16" if fast and stored_dtype(folder).itemsize == 2 else "float32"


def add_adapters(model: Any, config: TeacherConfig) -> Any:
    """`model` with LoRA adapters on all linear layers, or as it is when the config asks for none."""
    if not config.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def merge_adapters(model: Any) -> Any:
    """The plain model, with what its adapters learnt added to its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def plain_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a model's weights as its folder has them, with what adapters have learnt so far."""
    adapted = hasattr(model, "merge_adapter")
    base = model.get_base_model() if adapted else model
    if adapted:
        model.merge_adapter()
    for name, parameter in base.named_parameters():
        if not (adapted and model.prefix in name):
            yield name.replace(".base_layer", ""), parameter.data
    if adapted:
        model.unmerge_adapter()


def save_model(
    model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype | None = None, note: dict[str, Any] | None = None
) -> None:
    """Write a model folder under a temporary name, then rename: its existence means that it is whole.

    With `dtype` the model is converted to it first, in place. `note` holds further JSON files, by name. In a training of
    several processes only the main one writes.
    """
    if not is_main():
        return
    if dtype is not None:
        model.to(dtype)
    for leftover in folder.parent.glob(f"{folder.name}.*.tmp"):  # of processes that were killed here
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for name, content in (note or {}).items():
        write_json(temporary / name, content)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 (16 hex digits) over names and bytes of a model folder's weights and tokenizer files."""
    return digest_files(f for f in sorted(folder.iterdir()) if f.suffix == ".safetensors" or f.name in _TOKENIZER_FILES)
