"""Splits by hash: shares are met, nothing moves, limits cut in hash order."""

from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from data.config import DataConfig, Shares
from data.split import split_bounds, split_of, split_point, within_limits

SHARES = Shares(train=0.25, valid=0.1, test=0.15, pool=0.5)


def test_shares_are_met() -> None:
    counts = Counter(split_of(split_point(f"query {i}", 0), SHARES) for i in range(20_000))
    for name in ("train", "valid", "test", "pool"):
        assert counts[name] / 20_000 == pytest.approx(getattr(SHARES, name), abs=0.015)


def test_the_seed_matters_and_is_all_that_does() -> None:
    queries = [f"query {i}" for i in range(2_000)]
    first = [split_of(split_point(q, 0), SHARES) for q in queries]
    assert first == [split_of(split_point(q, 0), SHARES) for q in queries]
    other = [split_of(split_point(q, 1), SHARES) for q in queries]
    agree = sum(a == b for a, b in zip(first, other, strict=True)) / len(queries)
    assert agree == pytest.approx(0.25**2 + 0.1**2 + 0.15**2 + 0.5**2, abs=0.05)


@pytest.mark.parametrize("point", [0, (1 << 63) - 1])
def test_every_point_has_a_split_that_has_a_share(point: int) -> None:
    third = 0.3333333
    for shares in (
        Shares(train=third, valid=third, test=third, pool=0),
        Shares(train=0, valid=0, test=0, pool=1),
        Shares(train=1, valid=0, test=0, pool=0),
    ):
        assert getattr(shares, split_of(point, shares)) > 0
        assert split_bounds(shares)[-1][1] == 1 << 63


def test_shares_that_do_not_sum_to_one_are_refused() -> None:
    with pytest.raises(ValidationError, match="sum to 1"):
        Shares(train=0.5, valid=0.5, test=0.5, pool=0.5)
    with pytest.raises(ValidationError, match="shares"):
        DataConfig.model_validate({"shares": {"train": 2}})


@pytest.mark.spark
def test_limits_cut_in_hash_order(spark: Any) -> None:
    rows = [
        (f"{q}-{p}", split_point(f"query {q}", 3), split_of(split_point(f"query {q}", 3), SHARES))
        for q in range(300)
        for p in range(4)
    ]
    frame = spark.createDataFrame(rows, "pair_id string, point bigint, split string").cache()
    limits = {"train": 50, "test": 1, "pool": 10_000}
    kept = {(row["split"], row["pair_id"]) for row in within_limits(frame, limits).collect()}
    backwards = within_limits(frame.orderBy(frame["pair_id"].desc()).repartition(3), limits)
    assert {(row["split"], row["pair_id"]) for row in backwards.collect()} == kept
    for name in ("train", "valid", "test", "pool"):
        order = sorted((point, pair) for pair, point, split in rows if split == name)
        expected = {(name, pair) for _, pair in order[: limits.get(name)]}
        assert {key for key in kept if key[0] == name} == expected
    frame.unpersist()
