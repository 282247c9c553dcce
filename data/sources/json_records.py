"""JSON files, record by record: one object for each line, or an array of objects, which is read as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, ClassVar

from data.contracts import ContractError
from data.sources.encodings import propose_encoding
from data.sources.paths import Row, open_text

_SAMPLED_RECORDS = 1000


@dataclass(frozen=True)
class JsonFile:
    """One file, and the keys that are read."""

    kind: ClassVar[str] = "json"
    path: Path
    encoding: str
    columns: Mapping[str, str]

    def rows(self) -> Iterator[Row]:
        """The records; what is no object, or holds a list or an object for a text, has its fault."""
        with open_text(self.path, self.encoding) as file:
            for record, text in _records(file):
                if not isinstance(record, dict):
                    yield (*[None] * len(self.columns), "the line is not a JSON object", text[:1000])
                    continue
                values = {ours: record.get(theirs) for ours, theirs in self.columns.items()}
                nested = [
                    ours for ours, value in values.items() if isinstance(value, dict | list) and ours != "attributes"
                ]
                problem = f"the {nested[0].replace('_', ' ')} is a list or an object, not text" if nested else None
                yield (*map(_as_text, values.values()), problem, None)


def json_names(path: Path, encoding: str) -> list[str]:
    """The keys of the first records, in the order in which they appear; raises `ContractError` when there is no object."""
    with open_text(path, encoding) as file:
        records = [record for record, _ in islice(_records(file), _SAMPLED_RECORDS)]
    names = dict.fromkeys(key for record in records if isinstance(record, dict) for key in record)
    if not names:
        hint = propose_encoding(path)
        hint = hint and f"; {hint}, so set `data.encoding`"
        raise ContractError(f"{path} holds no JSON object; one for each line, or an array of them, is needed{hint}")
    return list(names)


def _records(file: IO[str]) -> Iterator[tuple[Any, str]]:
    """Each record, None where it cannot be parsed, and its text; raises `JSONDecodeError` for a damaged array."""
    first = next((line for line in file if line.strip()), "")
    record = _parsed(first)
    if first.lstrip().startswith("[") and (record is None or any(isinstance(item, dict) for item in record)):
        yield from ((record, str(record)) for record in json.loads("".join([first, *file])))
        return
    yield from ((_parsed(line), line.strip()) for line in chain([first], file) if line.strip())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # nested deeper than Python can follow
        return None


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | bool) else str(value)
