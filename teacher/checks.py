"""What can be known of a model and its tokenizer before any training: what would fail late, or make unreadable answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from data.contracts import ContractError
from teacher.chat_template import render
from teacher.engines.base import position_limit
from teacher.verifier import ANSWER

_MAX_LOSSY_SHARE = 0.05  # of the reasons; a model is not refused for an odd character in some
_ANSWER_LENGTH = len(ANSWER.format(grade=0))


def check_tokenizer(tokenizer: Any, targets: Sequence[str]) -> None:
    """Raise `ContractError` for a tokenizer that cannot write `targets`, the completions of real examples.

    What comes back from `decode(encode(target))` must be the target, up to case and Unicode compatibility forms, which a
    tokenizer may normalise: the answer always, the reason nearly always.
    """
    lossy: list[tuple[str, str]] = []
    for target in targets:
        ids = tokenizer(target, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        before, after = _folded(target), _folded(text)
        if before[-_ANSWER_LENGTH:] != after[-_ANSWER_LENGTH:]:
            raise _cannot_write(target, text)
        if before != after:
            lossy.append((target, text))
    if len(lossy) > _MAX_LOSSY_SHARE * len(targets):
        raise _cannot_write(*lossy[0])


def check_decoder(model: Any, tokenizer: Any, longest: int) -> None:
    """Raise `ContractError` for a causal language model that could not be trained, saved or used.

    `longest` is the number of tokens of the longest prompt together with its longest completion.
    """
    if model.base_model is model:  # the loss takes a model without its head
        raise ContractError(
            f"models of type {model.config.model_type} cannot be trained: transformers does not say which part of one comes "
            "before its head; choose another model"
        )
    limit = position_limit(model.config)
    if longest > limit:
        raise ContractError(
            f"the longest prompt with its completion has {longest} tokens, and the model only {limit} positions; lower "
            "prompt.max_text_chars or max_completion_tokens, shorten the guideline, or choose another model"
        )
    _check_embedding(tokenizer, rows=model.get_input_embeddings().weight.shape[0])


def _check_embedding(tokenizer: Any, rows: int) -> None:
    """Every token that a prompt or a completion can hold must have its row in the model's embedding."""
    prompt = render(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], {})
    used = {
        "ordinary text": tokenizer.vocab_size - 1,
        "the chat template": max(tokenizer(prompt, add_special_tokens=False)["input_ids"]),
        "padding": tokenizer.pad_token_id,
        "the end of a text": tokenizer.eos_token_id,
    }
    for use, token in used.items():
        if token is not None and token >= rows:
            raise ContractError(
                f"the tokenizer uses token {token} for {use}, and the model's embedding has {rows} rows; give the model its "
                "own tokenizer, or resize its embedding to this one (resize_token_embeddings) and save it again"
            )


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def _cannot_write(target: str, text: str) -> ContractError:
    return ContractError(
        f"the model's tokenizer cannot write the answers: {target[-80:]!r} comes back as {text[-80:]!r}; choose another "
        "model, or correct tokenizer_class in tokenizer_config.json if it is not the class that the model was trained with"
    )
