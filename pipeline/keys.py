"""The dotted keys of a typed tree of settings: written as `key=value`, and explained to people when one is wrong."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from data.contracts import ContractError
from pipeline.redact import flatten, is_secret, redact
from teacher.engines.config import with_kind

# What pydantic finds wrong, in the words of people who write settings.
_WORDS = {
    "bool": "must be true or false",
    "dict": "must be a table of settings",
    "finite_number": "must be a number",
    "float": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int": "must be a whole number",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "list": 'must be a list, such as ["a", "b"]',
    "literal_error": "must be one of {expected}",
    "missing": "is missing",
    "model": "must be a table of settings",
    "path": "must be a path, in quotes",
    "string_pattern_mismatch": "is not written as it must be",
    "string_too_long": "must have at most {max_length} character(s)",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_type": "must be text, in quotes",
    "too_long": "must have at most {max_length} value(s)",
    "too_short": "must have at least {min_length} value(s)",
    "tuple": 'must be a list, such as ["a", "b"]',
    "union_tag_invalid": "must have a {discriminator} of {expected_tags}",
    "union_tag_not_found": "must have a {discriminator}",
}
_NO_TOML = (
    "; what stands in { } or [ ] is read as TOML or JSON, where texts are in quotes, and so are names that have other "
    "characters than letters, digits, - and _"
)
# A key whose last name is in quotes, as in TOML.
_QUOTED = re.compile(r'\s*(?P<table>[\w.-]+)\.(?P<name>"(?:[^"\\]|\\.)*")\s*=(?P<text>.*)', re.DOTALL)


def fields(model: type[BaseModel], prefix: str = "", of: type = object) -> dict[str, FieldInfo]:
    """The fields of a config (those that take values of a class) by dotted keys, depth first; a table's own stand for it."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        kinds = _kinds(field)
        tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not tables and (of is object or of in kinds):
            found[f"{prefix}{name}"] = field
        for table in tables:
            found |= fields(table, f"{prefix}{name}.", of)
    return found


def parse_overrides(model: type[BaseModel], overrides: Iterable[str]) -> dict[str, Any]:
    """A tree of values from `a.b=value`, later ones over earlier ones. Keys are not checked: the values' validation does.

    The last name of a key may be in quotes, as in `data.grade_labels."a=b"=1`. Raises `ContractError` for what is not of
    that form.
    """
    known, tree = fields(model), dict[str, Any]()
    for override in overrides:
        parts, text = _split(override, known)
        table, key = ".".join(parts[:-1]), ".".join(parts)
        kinds = _free_values(known[table]) if table in known else _kinds(known.get(key))
        value = parse_value(text)
        if (
            not isinstance(value, str | list | dict | None)
            and {str, Path} & {*kinds}
            and not {int, float, bool} & {*kinds}
        ):
            value = text  # 2026 is a good name of a run
        for part in reversed(parts):
            value = {part: value}
        tree = _joined(tree, value)
    return tree


def _split(override: str, known: dict[str, FieldInfo]) -> tuple[list[str], str]:
    """The names that a key consists of, and the text of its value."""
    tables = _free_tables(known)
    quoted = _QUOTED.fullmatch(override)
    if quoted and not quoted["table"].startswith(tuple(f"{table}." for table in tables)):
        try:
            return [*quoted["table"].split("."), json.loads(quoted["name"])], quoted["text"].strip()
        except ValueError:  # no text in quotes after all
            pass
    key, separator, text = (part.strip() for part in override.partition("="))
    if not separator or not key:
        raise ContractError(f"'{override}' is not of the form key=value, for example teacher.seed=3")
    for table in tables:
        if key.startswith(f"{table}."):  # the keys of a free table hold dots themselves, as Spark's do
            return [*table.split("."), key.removeprefix(f"{table}.")], text
    return key.split("."), text


def written_keys(values: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """The values of a tree by keys that `parse_overrides` reads; what stands in a table with free keys stays whole."""
    tables, flat = _free_tables(fields(model)), dict[str, Any]()

    def add(table: str, inner: dict[str, Any]) -> None:
        for name, value in inner.items():
            if table in tables:
                plain = name and name == name.strip() and "=" not in name and not name.startswith('"')
                flat[f"{table}.{name if plain else json.dumps(name, ensure_ascii=False)}"] = value
            elif isinstance(value, dict) and value:
                add(f"{table}.{name}" if table else name, value)
            else:
                flat[f"{table}.{name}" if table else name] = value

    add("", values)
    return flat


def parse_value(text: str) -> Any:
    """A TOML value, else a JSON one, else the text itself: `3`, `1e-4`, `true`, `["a"]`, `"3"`, `path:models/x`.

    `none` and `null` give None, which TOML lacks.
    """
    if text.lower() in {"none", "null"}:
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        try:
            return json.loads(text) if text[:1] in "[{" else text
        except ValueError:
            return text
    if len(parsed) > 1 or not isinstance(parsed["value"], str | int | float | list | dict):
        return text  # a second key after a line break; a date, which is text to every field of ours
    return parsed["value"]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`. Tables are merged key by key, all else is replaced.

    Where `over` sets an engine's kind, `base` gives only the settings that this kind has.
    """
    return _joined(base, over, with_kind)


def _joined(
    base: dict[str, Any], over: dict[str, Any], fit: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None
) -> dict[str, Any]:
    joined = fit(base, over["kind"]) if fit is not None and "kind" in over else dict(base)
    for key, value in over.items():
        mine = joined.get(key)
        joined[key] = _joined(mine, value, fit) if isinstance(mine, dict) and isinstance(value, dict) else value
    return joined


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: `: did you mean …?`, or all the names where none is near and few are."""
    names = {each.casefold(): each for each in valid}
    near = [names[each] for each in difflib.get_close_matches(name.casefold(), names, n=3, cutoff=0.6)]
    if near:
        return f": did you mean {', '.join(near)}?"
    return f"; choose one of {', '.join(names.values())}" if 0 < len(names) <= 20 else ""


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault of a validation in one line, and how many more there are."""
    faults, known = error.errors(include_url=False), fields(model)
    kind, given = faults[0]["type"], faults[0]["input"]
    place = [str(part) for part in faults[0]["loc"] if part != "[key]"]
    # The tag of a union's member is no part of the key.
    shorter = [".".join(place[:i] + place[i + 1 :]) for i in range(1, len(place) - 1)]
    key = next((each for each in shorter if each in known), ".".join(place))
    words = _WORDS.get(kind) or _WORDS.get(kind.partition("_")[0]) or faults[0]["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        text = _unknown(key, given, model)
    elif isinstance(given, dict) and given and key in known:
        text = f"unknown key '{key}.{next(iter(given))}': '{key}' is a single value"
    else:
        text = f"{key or 'settings'}: {words.format(**faults[0].get('ctx', {}))}"
        text += "" if isinstance(given, dict) or is_secret(key) else f" (given: {redact(given)!r:.100})"
        if isinstance(given, str) and given[:1] in ("{", "[") and words in (_WORDS["dict"], _WORDS["list"]):
            text += _NO_TOML
        if kind.startswith("string_") and key in known and known[key].description:
            text += f". Help: {' '.join(str(known[key].description).split())}"
    return text if len(faults) == 1 else f"{text}; and {len(faults) - 1} more like it"


def _unknown(key: str, given: Any, model: type[BaseModel]) -> str:
    _, dot, last = key.rpartition(".")
    if isinstance(given, dict):
        key = ".".join([key, *list(flatten(given))[:1]])
    elif dot and last in model.model_fields:
        return f"unknown key '{key}': did you mean {last}? In a file it stands above the first [table]"
    return f"unknown key '{key}'{nearest(key, fields(model)) or '; `prefect run FLOW -h` shows the keys'}"


def _kinds(field: FieldInfo | None) -> list[Any]:
    """The classes that a field's annotation names, out of its unions and `Annotated`."""

    def plain(annotation: Any) -> list[Any]:
        arguments = get_args(annotation)
        if get_origin(annotation) is Annotated:
            return plain(arguments[0])
        if get_origin(annotation) in (Union, UnionType):
            return [kind for argument in arguments for kind in plain(argument)]
        return [annotation]

    return plain(field.annotation) if field is not None else []


def _free_tables(known: dict[str, FieldInfo]) -> list[str]:
    return [key for key, field in known.items() if _free_values(field)]


def _free_values(field: FieldInfo) -> list[Any]:
    """The class of the values of a table with free keys; empty for other fields."""
    return [get_args(kind)[1] for kind in _kinds(field) if get_origin(kind) is dict]
