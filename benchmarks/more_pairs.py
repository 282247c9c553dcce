"""A larger pool for the same labels: pairs whose label is withheld, and pairs mined for the queries of train and pool.

    python -m benchmarks.more_pairs --pairs PAIRS --whole WHOLE --base MINILM --out MORE

PAIRS is a folder of data-prepare with few labels (`data.max_train`), WHOLE one of the same source and seed without limits.
MORE has the rows of PAIRS; the other rows of train in WHOLE, without their grade, in the pool; and for every query of train
and pool the ads that are among the `--nearest` by BM25 or by the encoder's cosine and no pair of it in WHOLE. No query of
valid or test gets a pair. MORE is for teachers and students only: a query of train then has pairs in the pool too, which
the product's own tables never have. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Array = np.ndarray
_CHUNK = 512  # queries at a time


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--whole", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nearest", type=int, default=16)
    options = parser.parse_args()

    from data.contracts import PAIRS, read_table
    from data.text import pair_id

    few, whole = (read_table(folder / "pairs", PAIRS).to_pylist() for folder in (options.pairs, options.whole))
    known = {row["pair_id"] for row in few}
    rest = [row for row in whole if row["split"] == "train" and row["pair_id"] not in known]
    asked = {row["query"]: row for row in [*few, *rest] if row["split"] in ("train", "pool")}
    titles, there = sorted({row["ad_title"] for row in whole}), {(row["query"], row["ad_title"]) for row in whole}
    queries = sorted(asked)
    mined = [
        asked[queries[query]] | {"ad_title": titles[ad], "ad_text": None, "attributes": None}
        for query, ad in near(queries, titles, options.base, options.nearest)
        if (queries[query], titles[ad]) not in there
    ]
    mined = [row | {"pair_id": pair_id(row["query"], row["ad_title"])} for row in mined]
    added = {row["pair_id"]: row | {"split": "pool", "grade": None, "grade_raw": None} for row in [*mined, *rest]}
    shutil.rmtree(options.out, ignore_errors=True)
    (options.out / "pairs").mkdir(parents=True)
    rows = [*few, *(row for key, row in added.items() if key not in known)]
    pq.write_table(
        pa.Table.from_pylist(rows, schema=PAIRS), options.out / "pairs" / "part-0.parquet", compression="zstd"
    )
    shutil.copyfile(options.pairs / "scale.json", options.out / "scale.json")
    counts = {"rows": len(rows), "rest": len(rest), "mined": len(rows) - len(few) - len(rest), "queries": len(queries)}
    print(json.dumps({"benchmark": "more_pairs", **counts}))


def near(queries: list[str], titles: list[str], base: Path, count: int) -> list[tuple[int, int]]:
    """Numbers of query and title: for each query the `count` titles with the most BM25, and those with the most cosine."""
    from student.baselines import Encoder
    from student.model import pick_device, save_tokenizer

    ads, asked = bm25(queries, titles)
    with tempfile.TemporaryDirectory() as folder:
        encoder = Encoder(base, save_tokenizer(base, Path(folder), 64), 128, pick_device("auto"))
        query_vectors, title_vectors = encoder.vectors(queries), encoder.vectors(titles)
    pairs = []
    for start in range(0, len(queries), _CHUNK):
        by_words = (asked[start : start + _CHUNK] @ ads).toarray()
        by_cosine = query_vectors[start : start + _CHUNK] @ title_vectors.T
        for i, (words, cosine) in enumerate(zip(by_words, by_cosine, strict=True)):
            best = [j for j in highest(words, count) if words[j] > 0] + highest(cosine, count)
            pairs += [(start + i, j) for j in dict.fromkeys(best)]
    return pairs


def bm25(queries: list[str], titles: list[str]) -> tuple[Array, Array]:
    """Sparse matrices, ads (words, M) and queries (N, words), whose product has the BM25 of each pair."""
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import CountVectorizer

    from data.contracts import words

    vectoriser = CountVectorizer(analyzer=words)
    counts = vectoriser.fit_transform(titles).astype(np.float32).tocoo()
    often = np.bincount(counts.col, minlength=counts.shape[1])
    idf = np.log(1 + (len(titles) - often + 0.5) / (often + 0.5))
    length = np.bincount(counts.row, counts.data, minlength=len(titles))
    norm = 1.2 * (1 - 0.75 + 0.75 * length / length.mean())
    weight = idf[counts.col] * counts.data * 2.2 / (counts.data + norm[counts.row])
    return csr_matrix((weight, (counts.col, counts.row)), counts.shape[::-1]), vectoriser.transform(queries)


def highest(scores: Array, count: int) -> list[int]:
    """The places of the highest scores, the highest first."""
    places = np.argpartition(-scores, min(count, len(scores) - 1))[:count]
    return places[np.argsort(-scores[places], kind="stable")].tolist()


if __name__ == "__main__":
    main()
