"""What a stage reads, as MLflow datasets: name, fingerprint, place, columns and counts; never a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.contracts import ANNOTATIONS, PAIRS, ContractError
from pipeline.artifacts import read_record
from pipeline.redact import redact_text

if TYPE_CHECKING:
    import pyarrow as pa

MAX_DIGEST = 36  # MLflow's limits
MAX_SOURCE = 60_000
SCHEMAS = {"data": PAIRS, "annotate": ANNOTATIONS}
NAMES = {"data": "pairs", "annotate": "annotations", "source": "source", "base": "base model"}
MODELS = ("teacher", "student", "export", "base")
_COUNTS = ("rows", "rows_train", "rows_valid", "rows_test", "rows_pool", "queries", "pairs", "ok", "unparsed", "failed")
_TYPES = {"string": "string", "int32": "integer", "int64": "long", "double": "double"}


def dataset_inputs(inputs: dict[str, str], sources: dict[str, str | Path]) -> list[dict[str, Any]]:
    """Fields of an MLflow `Dataset` for each of `inputs` (fingerprints by name); `sources` says where they lie.

    A digest is the fingerprint; the profile has the counts of the stage that made it. A name of a model, or a generator of
    rows, that no file stands behind has `unchanging` as its digest.
    """
    return [_dataset(name, fingerprint, sources.get(name, "")) for name, fingerprint in inputs.items()]


def _dataset(name: str, fingerprint: str, source: str | Path) -> dict[str, Any]:
    place = str(source.expanduser().resolve()) if isinstance(source, Path) else source
    schema = SCHEMAS.get(name)
    profile = _profile(source) if isinstance(source, Path) else {}
    return {
        "name": NAMES.get(name, name),
        "digest": (fingerprint or "unchanging")[:MAX_DIGEST],
        "source_type": "local" if isinstance(source, Path) else "name",
        "source": json.dumps({"uri": redact_text(place)})[:MAX_SOURCE],
        "schema": json.dumps({"mlflow_colspec": _columns(schema)}) if schema is not None else None,
        "profile": json.dumps(profile) if profile else None,
        "context": "model" if name in MODELS else "data",
    }


def _profile(folder: Path) -> dict[str, Any]:
    try:
        record = read_record(folder)
    except (ContractError, OSError):
        return {}
    return {name: record.figures[name] for name in _COUNTS if name in record.figures} if record else {}


def _columns(schema: pa.Schema) -> list[dict[str, Any]]:
    return [{"name": field.name, "type": _TYPES.get(str(field.type), str(field.type))} for field in schema]
