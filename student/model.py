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

from data.contracts import ContractError, GradeScale, first_line, out_of_memory
from student.scorer import load_tokenizer
from student.separator import separate

_REMEDY = "choose one like BERT, RoBERTa, MPNet, DeBERTa or ModernBERT"
# Of vectors and logits, relative to their size. Rounding moves those of a MiniLM by 4e-6 and of a Qwen2 with 0.5 billion
# weights by 7e-5; padding moves those of tiny encoders with new weights by 5e-3 at least where it moves them at all.
_MOVED = 2e-3


def pick_device(name: str) -> str:
    """`cpu` or `cuda`; raises `ContractError` when a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ContractError("student.device is 'cuda' but PyTorch sees no GPU; set it to 'auto' or 'cpu'")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def load_classifier(base: Path, scale: GradeScale, *, max_length: int, seed: int) -> PreTrainedModel:
    """The encoder in `base` with a head of K grades, in float32 on the CPU, ready to be evaluated.

    A head of another size is replaced by a new one, whose weights come from `seed`. Raises `ContractError` when the
    folder holds no encoder in safetensors, one with too few positions for `max_length`, or one whose vectors of a text
    depend on what shares its batch.
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
            f"{_REMEDY}"
        )
    if positions is not None and max_length > positions:
        raise ContractError(
            f"student.max_length is {max_length}, but the encoder in {base} has {positions} positions; lower it to that"
        )
    _check_classifies(model.eval(), base)
    check_batches(model, base, max_length)
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
            f"the encoder in {base} is a {model.config.model_type}, which cannot grade pairs ({reason}); {_REMEDY}"
        )


def check_batches(model: PreTrainedModel, base: Path, max_length: int) -> None:
    """Raise `ContractError` when what `model`, on the CPU, makes of a text depends on its padding or on the texts beside it.

    A pair's score would then be another one in each batch. So it is where tokens are mixed without a mask: FNet, or the
    convolutions of ConvBERT and Nystromformer.
    """
    generator, pad_id = torch.Generator().manual_seed(0), pad_token_id(model.config)
    lengths = torch.tensor([min(5, max_length), max_length // 2, max_length])
    ids = torch.randint(getattr(model.config, "vocab_size", 1000) - 1, (3, max_length), generator=generator)
    ids += ids >= pad_id  # any token but the padding
    mask = (torch.arange(max_length) < lengths.unsqueeze(1)).long()
    ids[mask == 0] = pad_id
    moved, reason = 0.0, ""
    try:
        together = _outputs(model, ids, mask)
        for row, length in enumerate(lengths.tolist()):
            alone = _outputs(model, ids[row, None, :length], mask[row, None, :length])
            for one, in_batch in zip(alone, together, strict=True):
                size = one.square().mean().sqrt().clamp(min=1e-12)
                moved = max(moved, float((one[0] - in_batch[row, : len(one[0])]).abs().max() / size))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        reason = f"which cannot read texts of {max_length} tokens in a batch ({first_line(error)})"
    if not moved <= _MOVED:
        reason = f"whose vectors of a text depend on the others of a batch and on padding (they moved by {moved:.1%})"
    if reason:
        raise ContractError(f"the encoder in {base} is a {model.config.model_type}, {reason}; {_REMEDY}")


def _outputs(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Vectors (B, W, D) of token ids (B, W) and, of a model with a head, logits (B, K)."""
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    given = {name: inputs[name] for name in input_names(model)}
    with torch.inference_mode():
        vectors = model.base_model(**given).last_hidden_state
        return [vectors] if model.base_model is model else [vectors, model(**given).logits]


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

    One that puts nothing between the texts of a pair gets a separator, see `student.separator`. Raises `ContractError`
    when there is no tokenizer that the tokenizers library can run, or none that has a token to separate by.
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
    special = (tokenizer.sep_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.cls_token)
    # Rather not the padding token, whose vector is not trained; Qwen2's base models have the same one for both.
    tokens = sorted((token for token in special if token), key=lambda token: token == tokenizer.pad_token)
    if not separate(out / "tokenizer.json", tokens):
        raise ContractError(
            f"the tokenizer in {base} puts no token between query and ad, and has no special token that could stand there; "
            'name one of its vocabulary as "eos_token" in its tokenizer_config.json'
        )
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
