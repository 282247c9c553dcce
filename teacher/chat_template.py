"""Chat templates as models bring them: one way to write a prompt with all of them, and what data must not imitate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from jinja2 import TemplateError

from data.contracts import ContractError, first_line

TEMPLATE_DATE = date(2024, 7, 26)
"""What a template that writes today's date gets (the default of Llama 3's own), so that a prompt is the same tomorrow."""

_MARK = "the guideline's place"
_PLAIN = (
    "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Answer:\n{% endif %}"
)


def render(tokenizer: Any, messages: list[dict[str, str]], options: Mapping[str, Any]) -> str:
    """A system and a user message as the tokenizer's template writes them, ready for a completion.

    `options` are variables of the template. Where it has no place for a system message (it refuses or drops it), that text
    stands at the top of the user's turn. Raises `ContractError` when the template fails.
    """
    template = None if tokenizer.chat_template else plain_chat_template(tokenizer)
    variables = {"date_string": f"{TEMPLATE_DATE:%d %b %Y}", "strftime_now": TEMPLATE_DATE.strftime, **options}

    def rendered(system: str, user: str) -> str:
        turns = [{"role": "system", "content": system}] if system else []
        return tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": user}],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
            **variables,
        )

    system, user = (message["content"] for message in messages)
    try:
        shows_system = _MARK in rendered(_MARK, "pair").lower()
    except (TemplateError, TypeError):
        shows_system = False
    try:
        return rendered(system, user) if shows_system else rendered("", f"{system}\n\n{user}")
    except (TemplateError, TypeError) as error:
        raise ContractError(f"the model's chat template cannot write a prompt: {first_line(error)}") from error


def plain_chat_template(tokenizer: Any) -> str:
    """A chat template for a base model that brings none; it keeps the token that the tokenizer begins every text with."""
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return ("{{ bos_token }}" if begins else "") + _PLAIN


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Strings that the tokenizer turns into control tokens, and a template's own `[INST]` and the like; longest first.

    One-character tokens and plain words are not among them: breaking those up would damage ordinary text, and a special
    token without any mark would already be ambiguous to its own tokenizer.
    """
    found = {str(token) for token in tokenizer.added_tokens_encoder} | set(tokenizer.all_special_tokens)
    found |= set(re.findall(r"\[/?[A-Z_]+\]", str(tokenizer.chat_template)))  # plain text to older tokenizers
    marked = {token for token in found if len(token) > 1 and not token.isalnum() and not token.isspace()}
    return tuple(sorted(marked, key=lambda token: (-len(token), token)))
