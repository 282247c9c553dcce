"""Keeps secrets out of everything that is recorded or shown: tracking, summaries, reports, command lines."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

HIDDEN = "***"

# `token` counts at the end of a name only: `hf_token` is a secret, `max_completion_tokens` and `token_budget` are not.
_SECRET_WORDS = {
    "authorization", "credential", "credentials", "pass", "pat", "pwd", "secrets", "sas",
}  # fmt: skip
_SECRET_ENDINGS = ("apikey", "passphrase", "passwd", "password", "secret")  # of a word: PGPASSWORD
_SECRET_KEYS = {"access", "account", "api", "encryption", "private", "secret", "shared"}
_URL_LOGIN = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s]+@")
_URL_PARAMETER = re.compile(
    r"(?P<name>[?&;][^=&;\s]*(?:token|password|secret|signature|sig|key)=)[^&;\s]+", re.IGNORECASE
)

_JAVA_OPTION = re.compile(r"(?P<name>-D\S*(?:password|passphrase|secret|token)\S*=)\S+", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret; the name may be dotted, dashed or in camel case."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = [word for word in re.split(r"[^A-Za-z0-9]+", split.lower()) if word]
    if not words:
        return False
    if words[-1] == "env":  # the name of an environment variable, not its value
        return False
    named_key = any(first in _SECRET_KEYS and second == "key" for first, second in pairwise(words))
    if any(word.endswith(_SECRET_ENDINGS) for word in words):
        return True
    return bool(_SECRET_WORDS & set(words)) or words[-1] in {"token", "bearer"} or named_key


def redact_text(text: str) -> str:
    """`text` without the logins and signed parameters of the URLs in it, nor the secrets among Java's options."""
    text = _JAVA_OPTION.sub(rf"\g<name>{HIDDEN}", text)
    text = _URL_LOGIN.sub(rf"\g<scheme>{HIDDEN}@", text)
    return _URL_PARAMETER.sub(rf"\g<name>{HIDDEN}", text)


def holds_secret(url: str) -> bool:
    """Whether a URL has a password or a token in it; the user name of a database alone is none."""
    login = _URL_LOGIN.match(url)
    if login and (":" in login.group(0).removeprefix(login["scheme"]) or url.startswith("http")):
        return True
    return bool(_URL_PARAMETER.search(url))


def redact(value: Any, name: str = "") -> Any:
    """A JSON-able copy of `value` in which secrets are hidden, whatever their depth."""
    if isinstance(value, dict):
        return {key: redact(inner, str(key)) for key, inner in value.items()}
    if name and is_secret(name) and value not in (None, "", False):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [redact(inner, name) for inner in value]
    return redact_text(value) if isinstance(value, str) else value


def hidden_keys(values: dict[str, Any]) -> list[str]:
    """The dotted keys of a tree whose values `redact` hides or changes."""
    before, after = flatten(values), flatten(redact(values))
    return [key for key, value in before.items() if after[key] != value]


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one of dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            flat |= flatten(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat
