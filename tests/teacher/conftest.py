"""A tiny prepared pairs folder, and a tiny untrained decoder made from it."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import PAIRS, RATIONALES


def write_pairs(folder, rows=300):
    """Pairs of the synthetic source, split by a hash of the query, in the layout of data-prepare."""
    from data.sources.synthetic import SCALE, generate

    pairs, reasons = {}, []
    for made in generate(rows, seed=0):
        key = hashlib.sha256(f"{made['query']}|{made['ad_title']}|{made['ad_text']}".encode()).hexdigest()[:16]
        place = int(hashlib.sha256(made["query"].encode()).hexdigest()[:8], 16) % 4
        split = ("train", "train", "valid", "test")[place]
        if key not in pairs and split == "train":
            reasons.append({"pair_id": key, "reasoning": made["rationale"]})
        pairs[key] = {
            **{name: made[name] for name in ("query", "ad_title", "ad_text", "grade", "grade_raw")},
            "attributes": list(made["attributes"].items()),
            "pair_id": key,
            "query_id": made["query"],
            "split": split,
            "source": "synthetic",
        }
    for name, content, schema in (("pairs", list(pairs.values()), PAIRS), ("rationales", reasons, RATIONALES)):
        (folder / name).mkdir()
        pq.write_table(pa.Table.from_pylist(content, schema=schema), folder / name / "part.parquet")
    SCALE.save(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory, pairs):
    from teacher.scratch import make_decoder

    return make_decoder(pairs, tmp_path_factory.mktemp("decoder"), "tiny", 0)
