"""Whether a pool of another query topic is flagged, and a random half is not, on a folder of prepared pairs.

    python -m benchmarks.drift_topics --pairs runs/home_depot/pairs [--draws 20]

The queries are cut into two halves `draws` times: at random, and by topic (k-means over the TF-IDF vectors of their words,
whole clusters dealt out until a half is full). The models learn from one half, the nightly pool is the other, or `--batch`
of its queries. Prints one JSON line: how many of the random and of the topical halves got each level, and the highest index
of each draw.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

CLUSTERS = 40


def topics(queries: list[str], seed: int) -> np.ndarray:
    """The number of each query's cluster."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import normalize

    vectors = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), TruncatedSVD(64, random_state=seed))
    clusters = MiniBatchKMeans(CLUSTERS, n_init=3, random_state=seed)
    return np.asarray(clusters.fit_predict(normalize(vectors.fit_transform(queries))))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--batch", type=int, default=0, help="queries of the pool; 0 takes all of its half")
    parser.add_argument(
        "--known", type=int, default=0, help="queries that the models learn from; 0 takes all of their half"
    )
    options = parser.parse_args()
    import pyarrow.dataset as pads

    from pipeline.drift import Check, DriftConfig, compare
    from pipeline.drift_profile import profile, read_texts

    texts = read_texts(options.pairs, pads.scalar(True))
    ids, limits = sorted(texts), DriftConfig()
    levels: dict[str, Counter[str]] = {"random": Counter(), "topic": Counter()}
    worst: dict[str, list[Any]] = {"random": [], "topic": []}
    for draw in range(options.draws):
        rng = np.random.default_rng(draw)
        cluster = topics([texts[each].query for each in ids], draw)
        rank = rng.permutation(CLUSTERS)[cluster]
        for kind, order in (("random", rng.permutation(len(ids))), ("topic", np.argsort(rank, kind="stable"))):
            halves = [{ids[i]: texts[ids[i]] for i in part} for part in np.array_split(order, 2)]
            for half, count in enumerate((options.known, options.batch)):
                if count:
                    halves[half] = {each: halves[half][each] for each in rng.permutation(list(halves[half]))[:count]}
            measures = compare(profile(halves[0]), halves[1])
            check = Check.model_validate(
                {"against": "teacher", "at": 0, "pairs": 0, "queries": len(halves[1]), "measures": measures}
            )
            levels[kind][check.level(limits)] += 1
            worst[kind].append([round(check.worst.psi, 4), check.worst.name])
    print(json.dumps({"queries": len(ids), "draws": options.draws, "levels": levels, "worst": worst}))


if __name__ == "__main__":
    main()
