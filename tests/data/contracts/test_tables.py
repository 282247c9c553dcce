"""Tables of another version or shape are refused in one sentence."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import PAIRS, ContractError, read_table

ROW = {"pair_id": "p", "query_id": "q", "query": "a", "ad_title": "b", "split": "pool", "source": "test"}


def write(path: Path, columns: list[pa.Field]) -> Path:
    pq.write_table(pa.Table.from_pylist([ROW], schema=pa.schema(columns)), path)
    return path


def test_pairs_from_before_there_was_a_query_id_ask_for_data_prepare(tmp_path: Path) -> None:
    old = write(tmp_path / "old.parquet", [field for field in PAIRS if field.name != "query_id"])
    with pytest.raises(ContractError, match="'query_id'; run data-prepare again"):
        read_table(old, PAIRS)


def test_a_table_is_exactly_its_schema(tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "a.parquet", list(PAIRS)), PAIRS, columns=["query"]).to_pylist() == [
        {"query": "a"}
    ]
    with pytest.raises(ContractError, match="'grade' is missing"):
        read_table(write(tmp_path / "b.parquet", [f for f in PAIRS if f.name != "grade"]), PAIRS)
    changed = [pa.field("grade", pa.string()) if field.name == "grade" else field for field in PAIRS]
    with pytest.raises(ContractError, match="'grade' is string, expected int32"):
        read_table(write(tmp_path / "c.parquet", changed), PAIRS)
    with pytest.raises(ContractError, match="unexpected column 'x'"):
        read_table(write(tmp_path / "d.parquet", [*PAIRS, pa.field("x", pa.string())]), PAIRS)
