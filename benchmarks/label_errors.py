"""How many of the suspect labels are wrong: some of a table's training grades are flipped, and the suspects counted.

    python -m benchmarks.label_errors --pairs runs/home_depot/pairs --base FOLDER [--flipped 0.05]

`--base` is an encoder's folder, such as all-MiniLM-L6-v2. Each flipped grade becomes another one by chance. Prints one JSON
line: the share of flipped labels among the first 100, 500 and 1,000 suspects; and, of the same logistic regression in the
student's stead, the ROC-AUC on human test labels when it learns from all labels, without as many suspects as were flipped,
and without the flipped ones. Labels that were wrong before count as right here, so the shares are lower limits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

FIRST = (100, 500, 1000)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--flipped", type=float, default=0.05)
    parser.add_argument("--test-rows", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from dataclasses import replace

    from data.contracts import GradeScale
    from student.config import StudentConfig
    from student.dataset import read_examples
    from student.label_errors import cross_fitted, feature_scorer, ranked
    from student.metrics import roc_auc
    from student.model import save_tokenizer
    from student.setup import Setup

    scale, rng = GradeScale.load(options.pairs), np.random.default_rng(options.seed)
    train, test = (read_examples(options.pairs, scale, split) for split in ("train", "test"))
    test = test.take(rng.permutation(len(test))[: options.test_rows])
    flipped = rng.random(len(train)) < options.flipped
    other = (train.grade + rng.integers(1, scale.size, len(train))) % scale.size
    rows = replace(train, grade=np.where(flipped, other, train.grade)).joined(test)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_tokenizer(options.base, Path(folder), 64)
        setup = Setup(StudentConfig(base=f"path:{options.base}", device="cpu"), options.base, tokenizer, scale, "cpu")
        scorer = feature_scorer(setup, rows)
        suspects, _ = ranked(rows.grade[: len(train)], cross_fitted(len(train), scorer, options.seed))
        held, learned = np.arange(len(train), len(rows)), np.arange(len(train))

        def auc(chosen: np.ndarray) -> float:
            return roc_auc(setup.relevant(test), setup.p_relevant(scorer(chosen, held)))

        without = np.setdiff1d(learned, suspects[: flipped.sum()])
        aucs = {"all": auc(learned), "without_suspects": auc(without), "without_flipped": auc(learned[~flipped])}
    precision = {str(count): float(flipped[suspects[:count]].mean()) for count in FIRST}
    result = {"labels": len(train), "flipped": int(flipped.sum()), "suspects": len(suspects), "precision": precision}
    print(json.dumps(result | {"found": float(flipped[suspects].sum() / flipped.sum()), "roc_auc": aucs}))


if __name__ == "__main__":
    main()
