"""Which annotations are meant where nobody names their key."""

from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import ANNOTATIONS, KEY_FILE, ContractError, annotation_key_of, read_annotations, write_json


def write(folder, key, day):
    row = {
        "pair_id": f"p{day}",
        "annotation_key": key,
        "votes": [],
        "n_samples": 1,
        "n_unparsed": 1,
        "status": "unparsed",
    }
    row |= {"error": "", "prompt_tokens": 1, "completion_tokens": 1, "created_at": datetime(2026, 1, day, tzinfo=UTC)}
    pq.write_table(pa.Table.from_pylist([row], schema=ANNOTATIONS), folder / f"{key}-{day}.parquet")


def ids(folder, key=""):
    return [name for batch in read_annotations(folder, ["pair_id"], key) for name in batch["pair_id"].to_pylist()]


def test_the_key_of_a_folder_is_the_one_that_it_was_last_annotated_under(tmp_path):
    write(tmp_path, "old", 1)
    write(tmp_path, "new", 2)
    assert annotation_key_of(tmp_path) == "new"  # made by other means: the row that was created last
    assert (ids(tmp_path), ids(tmp_path, "old")) == (["p2"], ["p1"])
    write_json(
        tmp_path / KEY_FILE, {"annotation_key": "old"}
    )  # as after a run under the old key that had nothing to do
    assert annotation_key_of(tmp_path) == "old"
    assert ids(tmp_path) == ["p1"]


def test_a_folder_without_annotations_has_no_key(tmp_path):
    assert annotation_key_of(tmp_path) == annotation_key_of(tmp_path / "nothing") == ""
    with pytest.raises(ContractError, match="run annotate first"):
        ids(tmp_path)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ContractError, match="column 'pair_id' is missing"):
        annotation_key_of(tmp_path)
