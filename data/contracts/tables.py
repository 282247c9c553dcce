"""The tables that pass between the rooms: their Arrow schemas, and reading one that must match its schema."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads

from data.contracts.errors import ContractError

SPLITS = ("train", "valid", "test", "pool")
STRATA = ("head", "torso", "tail")

PAIRS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("ad_title", pa.string(), nullable=False),
        pa.field("ad_text", pa.string()),
        pa.field("attributes", pa.map_(pa.string(), pa.string())),
        pa.field("grade", pa.int32()),
        pa.field("grade_raw", pa.float64()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)

# Optional companion of `pairs`: the source's own reason for a label. Only rows of split `train` have one.
RATIONALES = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("reasoning", pa.string(), nullable=False),
    ]
)

# Optional companion of `pairs`: what there is to read about the ads' world, none of it a label. A text with a query and a
# title is what can be said of them.
TEXTS = pa.schema(
    [
        pa.field("query", pa.string()),
        pa.field("ad_title", pa.string()),
        pa.field("text", pa.string(), nullable=False),
    ]
)

# What a model said when it was asked for reasons of human grades. `outcome` is right (graded so by itself), hinted (the
# grade was given, and the reason leads there) or dropped; `reasoning` is then null, and `dropped` says why.
REASONS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("grade", pa.int32(), nullable=False),
        pa.field("reasoning", pa.string()),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("dropped", pa.string(), nullable=False),
        pa.field("n_right", pa.int32(), nullable=False),
    ]
)

# Optional companion of `pairs`: what is left of several labels of one pair, or of a source that publishes their variance.
DISAGREEMENT = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("n_labels", pa.int32(), nullable=False),
        pa.field("grade_min", pa.int32()),
        pa.field("grade_max", pa.int32()),
        pa.field("rating_variance", pa.float64()),
    ]
)

# Optional companion of `pairs`: how often a pair from a log was seen, and the stratum of its query.
FREQUENCIES = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("frequency", pa.float64(), nullable=False),
        pa.field("stratum", pa.string(), nullable=False),
    ]
)

ANNOTATIONS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("annotation_key", pa.string(), nullable=False),
        pa.field("grade", pa.int32()),
        pa.field("grade_probs", pa.list_(pa.float64())),
        pa.field("grade_probs_raw", pa.list_(pa.float64())),
        pa.field("reasoning", pa.string()),
        pa.field("votes", pa.list_(pa.int32()), nullable=False),
        pa.field("agreement", pa.float64()),
        pa.field("n_samples", pa.int32(), nullable=False),
        pa.field("n_unparsed", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int64(), nullable=False),
        pa.field("completion_tokens", pa.int64(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("annotator", pa.string()),  # version of the student that graded it, null: the teacher
    ]
)

SCORES = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("p_relevant", pa.float64(), nullable=False),
        pa.field("grade_probs", pa.list_(pa.float64()), nullable=False),
        pa.field("model_version", pa.string(), nullable=False),
    ]
)

# Which pairs a budget of annotations goes to, the first choice first, and why.
SELECTION = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("why", pa.string(), nullable=False),
    ]
)

# Columns that tables of earlier versions lack; they are then null.
_OPTIONAL = frozenset({"grade_probs_raw", "annotator", "scale"})


def check_schema(actual: pa.Schema, expected: pa.Schema, where: str) -> None:
    """Raise `ContractError` naming the first column of `expected` that `actual` lacks or holds with another type.

    Extra columns are refused too: a table is exactly its contract. Nullability is not compared, since Parquet writers
    differ in what they declare.
    """
    for field in expected:
        index = actual.get_field_index(field.name)
        if index < 0 and field.name == "query_id":
            raise ContractError(f"{where} is from a version without the column 'query_id'; run data-prepare again")
        if index < 0 and field.name in _OPTIONAL:
            continue
        if index < 0:
            raise ContractError(f"{where}: column '{field.name}' is missing (expected {field.type})")
        kind = actual.field(index).type
        if kind != field.type and not _same_up_to_child_names(kind, field.type):
            raise ContractError(f"{where}: column '{field.name}' is {kind}, expected {field.type}")
    for name in actual.names:
        if name not in expected.names:
            raise ContractError(f"{where}: unexpected column '{name}'")


def read_table(
    path: Path, schema: pa.Schema, *, columns: list[str] | None = None, where: pads.Expression | None = None
) -> pa.Table:
    """Read a Parquet file or folder that must match `schema`; raises `ContractError` otherwise.

    Parameters: `columns` keeps only those, `where` is an Arrow filter that is pushed down to the files.
    """
    if not path.exists():
        raise ContractError(f"{path} does not exist")
    dataset = open_table(path, schema)
    if not dataset.files:
        return schema.empty_table().select(columns or schema.names)
    return dataset.to_table(columns=columns or schema.names, filter=where)


def open_table(path: Path, schema: pa.Schema) -> pads.FileSystemDataset:
    """A Parquet file or folder that must match `schema`, as a dataset; raises `ContractError` otherwise."""
    # Names starting with "_" or "." are markers and files being written; Arrow skips them.
    dataset = pads.dataset(path, format="parquet")
    if dataset.files:
        check_schema(dataset.schema, schema, str(path))
        # Its schema is that of its first file, which may be an older one.
        for field in schema:
            if field.name not in dataset.schema.names:
                dataset = dataset.replace_schema(dataset.schema.append(field))
    return dataset


def _same_up_to_child_names(a: pa.DataType, b: pa.DataType) -> bool:
    """List and map children are named differently by Spark and Arrow ("element" and "item"): compare their types."""
    if pa.types.is_list(a) and pa.types.is_list(b):
        return a.value_type == b.value_type
    if pa.types.is_map(a) and pa.types.is_map(b):
        return a.key_type == b.key_type and a.item_type == b.item_type
    if pa.types.is_timestamp(a) and pa.types.is_timestamp(b):
        return a.tz == b.tz  # Spark and pandas choose different units
    return False
