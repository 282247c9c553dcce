"""Loading, running and keeping the cross-encoder and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from data.contracts import ContractError, GradeScale, first_line
from student.scorer import load_tokenizer


def pick_device(name: str) -> str:
    """`cpu` or `cuda`; raises `ContractError` when a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ContractError("student.device is 'cuda' but PyTorch sees no GPU; set it to 'auto' or 'cpu'")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def load_classifier(base: Path, scale: GradeScale, *, max_length: int, seed: int) -> PreTrainedModel:
    """The encoder in `base` with a head of K grades, in float32 on the CPU, ready to be evaluated.

    A head of another size is replaced by a new one, whose weights come from `seed`. Raises `ContractError` when the
    folder holds no encoder in safetensors, or one with too few positions for `max_length`.
    """
    names = {i: grade.name for i, grade in enumerate(scale.grades)}
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        try:
            config = AutoConfig.from_pretrained(base)
            config.num_labels, config.id2label = scale.size, names
            config.label2id = {name: i for i, name in names.items()}
            config.problem_type = "single_label_classification"
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                base,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ContractError(
                f"{base} cannot be loaded as an encoder ({first_line(error)}); choose a folder with the config and "
                "safetensors weights of an encoder that transformers can classify with"
            ) from None
    _check_weights(model, loaded, base)
    positions = longest_text(model)
    if positions is not None and positions < 1:
        raise ContractError(
            f"the encoder in {base} is a {model.config.model_type}, which has no numbered positions and is not supported; "
            "choose one like BERT, RoBERTa, MPNet, DeBERTa or ModernBERT"
        )
    if positions is not None and max_length > positions:
        raise ContractError(
            f"student.max_length is {max_length}, but the encoder in {base} has {positions} positions; lower it to that"
        )
    _check_classifies(model.eval(), base)
    return model


def _check_weights(model: PreTrainedModel, loaded: dict[str, Any], base: Path) -> None:
    """Raises `ContractError` when weights of the encoder itself are not in its file, and random ones took their place."""
    encoder = f"{model.base_model_prefix}."
    names = [*loaded["missing_keys"], *(mismatched[0] for mismatched in loaded["mismatched_keys"])]
    absent = sorted(name for name in names if name.startswith(encoder) and ".pooler." not in name)
    if absent:
        others = f" and {len(absent) - 1} others" if len(absent) > 1 else ""
        raise ContractError(
            f"the weights in {base} lack {absent[0]}{others}, or have them in other sizes than its config.json says; save "
            "the encoder itself with save_pretrained, not a wrapper around it"
        )


def _check_classifies(model: PreTrainedModel, base: Path) -> None:
    """Raises `ContractError` when `model` does not read a batch as an encoder does: one vector for each token, K logits."""
    ids = torch.ones(2, 4, dtype=torch.long)
    given = {name: ids if name != "token_type_ids" else torch.zeros_like(ids) for name in input_names(model)}
    reason = ""
    try:
        with torch.inference_mode():
            logits, vectors = model(**given).logits, model.base_model(**given).last_hidden_state
        if logits.shape != (2, model.config.num_labels) or vectors.shape[:2] != ids.shape:
            reason = (
                f"it gives logits {tuple(logits.shape)} and vectors {tuple(vectors.shape)} for two texts of four tokens"
            )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error)
    if reason:
        raise ContractError(
            f"the encoder in {base} is a {model.config.model_type}, which cannot grade pairs ({reason}); choose one like "
            "BERT, RoBERTa, MPNet, DeBERTa or ModernBERT"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and the report that a new head has new weights, which is what we ask for."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def save_tokenizer(base: Path, out: Path, max_length: int) -> Tokenizer:
    """Write the tokenizer of `base` into `out` and return the one that `out/tokenizer.json` gives.

    Raises `ContractError` when there is none that the tokenizers library can run.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ContractError(f"{base} holds no usable tokenizer ({first_line(error)}); add its tokenizer.json") from None
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):  # transformers makes one of a folder that has none
        raise ContractError(f"{base} holds no tokenizer; add its tokenizer.json")
    tokenizer.save_pretrained(out)
    if not (out / "tokenizer.json").exists():
        raise ContractError(f"the tokenizer in {base} cannot be saved as tokenizer.json; choose an encoder with one")
    return load_tokenizer(out / "tokenizer.json", max_length)


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The inputs the model is given; segment ids only where it has more than one segment."""
    segments = getattr(model.config, "type_vocab_size", 0) > 1
    return ("input_ids", "attention_mask", "token_type_ids") if segments else ("input_ids", "attention_mask")


def first_position(model: PreTrainedModel) -> int:
    """Number of a text's first position; RoBERTa's family counts from pad_token_id + 1."""
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def longest_text(model: PreTrainedModel) -> int | None:
    """Tokens that the model has positions for; None where there is no limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return None if positions is None else int(positions) - first_position(model)


def head_bias(model: PreTrainedModel) -> torch.nn.Parameter | None:
    """The bias (K,) of the layer that makes the logits; None where it has none."""
    k = model.config.num_labels
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == k]
    return heads[-1].bias if heads else None


def model_folder(path: Path) -> Path:
    """The model folder at `path` or in its `model/`; raises `ContractError` when there is neither."""
    for folder in (path, path / "model"):
        if (folder / "student.json").exists():
            return folder
    raise ContractError(f"{path} holds no student (no student.json); run student-distill first")


def pad_token_id(config: Any) -> int:
    """The padding token, 0 where the model names none."""
    return int(getattr(config, "pad_token_id", None) or 0)
