"""Near-duplicates share a split, splits stay when rows are added, the card counts what it says."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from data.balance import grade_balance
from data.card import card_markdown
from data.config import DataConfig, Shares
from data.contracts import FREQUENCIES, PAIRS, GradeScale, read_table
from data.html import visible_text
from data.prepare import prepare
from data.quality import split_fault, split_warnings
from data.text import near_key, normalise_key

GRADES = [
    {"name": "n<o", "definition": "It is not."},
    {"name": "s|o", "definition": "So."},
    {"name": "yes", "definition": "Yes."},
]
COLUMNS = {"query": "q", "ad_title": "t", "grade": "g"}


def config(path: Path, **more: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "table", "path": path, "columns": COLUMNS, "grades": GRADES} | more)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def pairs(out: Path) -> dict[str, dict[str, Any]]:
    return {row["pair_id"]: row for row in read_table(out / "pairs", PAIRS).to_pylist()}


@pytest.mark.parametrize(
    "group",
    [
        ["red shoes", "Red  Shoes", "shoes red", "red shoe", "ＲＥＤ shoes", "red-shoes", "redshoes", "shoe, red!"],
        ["air conditioner", "airconditioner", "air conditioners", "conditioner  AIR"],
        ["berries", "berry"],
        ["glass boxes", "glass box", "boxes glass"],
        ["咳嗽 感冒", "感冒咳嗽", "咳嗽，感冒"],
        ["🎄 lights", "lights", "light"],
        ["हिन्दी", "हिन्दी!"],
    ],
)
def test_near_duplicates_have_one_near_key(group: list[str]) -> None:
    assert len({near_key(normalise_key(text)) for text in group}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("red shoes", "blue shoes"), ("bus", "bu"), ("glass", "glas"), ("🎄", "🎁"), ("4 x 6", "4 x 8"), ("की", "का")],
)
def test_other_texts_have_other_near_keys(one: str, other: str) -> None:
    assert near_key(normalise_key(one)) != near_key(normalise_key(other))
    assert near_key(normalise_key(one))


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("Briggs &amp; Stratton", "Briggs & Stratton"),
        ("<p>One</p><p>two<br/>three</p><ul><li>four</li></ul>", "One two three four"),
        ("a<b>bold</b>word", "aboldword"),
        ("x<!-- gone --><script>if (a < b) alert('&amp;')</script><style>p {}</style>y", "xy"),
        ("3 < 5 and 5 > 3", "3 < 5 and 5 > 3"),
        ("I <3 this & that; <5mm>", "I <3 this & that; <5mm>"),
        ("a <brand> tag", "a <brand> tag"),
        ("&lt;b&gt; stays", "<b> stays"),
        ("小米 <em>手机</em> 👍🏽", "小米 手机 👍🏽"),
        ("two  spaces\n& a line", "two  spaces\n& a line"),
        ("<a href='x'", "<a href='x'"),
        ("", ""),
    ],
)
def test_visible_text_of_html(html: str, text: str) -> None:
    assert visible_text(html) == text


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs whose queries come in several spellings; a quarter has no label."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        words = [f"thing{rng.randrange(60)}s", rng.choice(["red", "blue"])]
        query = rng.choice(["{0} {1}", "{1} {0}", "{1}{0}", "{1}-{0}"]).format(*words)
        made.append(
            {"q": rng.choice([query, query.upper()]), "t": f"Ad {rng.randrange(80)}", "g": rng.choice([0, 1, 2, None])}
        )
    return made


@pytest.mark.e2e
@pytest.mark.spark
def test_added_rows_move_no_pair_and_near_duplicates_stay_together(spark: Any, tmp_path: Path) -> None:
    old = rows(400, 1)
    prepare(config(write(tmp_path / "old.jsonl", old)), tmp_path, spark)
    before = pairs(tmp_path)
    # A tenth more: new queries, new spellings and ads of old queries, labels for pairs that had none.
    relabelled = [{**row, "g": 1} for row in old if row["g"] is None][:20]
    grown = rows(20, 2) + relabelled + old
    result = prepare(config(write(tmp_path / "new.jsonl", grown)), tmp_path, spark)
    after = pairs(tmp_path)
    assert len(after) > len(before)
    assert {key: after[key]["split"] for key in before} == {key: row["split"] for key, row in before.items()}
    together: dict[str, set[str]] = {}
    for row in after.values():
        together.setdefault(near_key(normalise_key(row["query"])), set()).add(row["split"])
    assert all(len(splits) == 1 for splits in together.values())
    card = json.loads((tmp_path / "card.json").read_text())
    leaks = card["leakage"]
    assert leaks["near-duplicate queries"]["distinct"] == len(together) < leaks["queries"]["distinct"]
    assert leaks["queries"]["in_several_splits"] == leaks["near-duplicate queries"]["in_several_splits"] == 0
    by_ad: dict[str, set[str]] = {}
    for row in after.values():
        by_ad.setdefault(row["ad_title"], set()).add(row["split"])
    several = {ad for ad, splits in by_ad.items() if len(splits) > 1}
    assert (leaks["ads"]["distinct"], leaks["ads"]["in_several_splits"]) == (len(by_ad), len(several))
    in_train = {ad for ad in several if "train" in by_ad[ad]}
    for split in ("valid", "test", "pool"):
        shared = sum(row["ad_title"] in in_train for row in after.values() if row["split"] == split)
        assert leaks["ads"]["also_in_train"][split] == shared
    figures = result.figures
    assert figures["unlabelled_left_out"] > 0
    parts = ("rejected", "duplicates", "unlabelled_left_out", "not_sampled", "beyond_limits", "rows")
    assert figures["rows_in"] == len(grown) == sum(figures[name] for name in parts)
    assert sum(sum(counts.values()) for counts in card["grades_by_split"].values()) == len(after)
    assert card["lengths"]["query"]["max"] == max(len(row["query"]) for row in after.values())
    markdown = (tmp_path / "card.md").read_text()
    assert markdown == card_markdown(card)
    assert "n&lt;o" in markdown
    assert "s\\|o" in markdown


@pytest.mark.spark
def test_a_log_is_sampled_by_stratum(spark: Any, tmp_path: Path) -> None:
    labelled = write(tmp_path / "a.jsonl", [{"q": f"query {i}", "t": f"title {i % 9}", "g": i % 3} for i in range(60)])
    # Two queries carry a third of the traffic each; the rest is seen once. Some rows are also labelled, some are faulty.
    seen = [{"query": q, "title": f"log ad {i}", "n": 10} for q in ("head one", "torso one") for i in range(10)]
    for row in seen[10:]:
        row["n"] = 9
    seen += [{"query": f"tail {i}", "title": "log ad", "n": 1} for i in range(80)]
    seen += [
        {"query": "query 1", "title": "title 1", "n": 5},
        {"query": "x", "title": "y", "n": 0},
        {"query": "x", "title": "y", "n": "?"},
    ]
    log = {
        "path": write(tmp_path / "log.jsonl", seen),
        "columns": {"query": "query", "ad_title": "title", "frequency": "n"},
    }
    shares = {"train": 0.1, "valid": 0.1, "test": 0.1, "pool": 0.7}
    figures = prepare(config(labelled, shares=shares, log=log | {"head": 4, "tail": 15}), tmp_path, spark).figures
    assert (figures["rows_in"], figures["rejected"]) == (60 + 103, 2)
    card = json.loads((tmp_path / "card.json").read_text())
    strata = card["strata"]
    taken = {name: found["taken"] for name, found in strata.items()}
    assert taken["tail"] == 15 < strata["tail"]["pairs"]
    assert taken.get("head", 0) == min(4, strata.get("head", {"pairs": 0})["pairs"])
    assert taken.get("torso", 0) == strata.get("torso", {"pairs": 0})["pairs"]
    assert figures["not_sampled"] == sum(found["pairs"] - found["taken"] for found in strata.values())
    found = pairs(tmp_path)
    frequencies = {row["pair_id"]: row for row in read_table(tmp_path / "frequencies", FREQUENCIES).to_pylist()}
    unlabelled = {key for key, row in found.items() if row["grade"] is None}
    assert unlabelled
    assert unlabelled == {key for key in frequencies if found[key]["grade"] is None}
    assert all(found[key]["split"] == "pool" for key in unlabelled)
    for key, row in frequencies.items():
        name = found[key]["query"].split()[0]
        assert row["stratum"] == (name if name in ("head", "torso", "tail") else "tail")


def test_balance_is_measured_in_standard_deviations_of_chance() -> None:
    rng = random.Random(0)

    def counts(skewed: float) -> dict[str, dict[str, int]]:
        found = {}
        for split, groups in (("train", 600), ("test", 300)):
            sums = dict.fromkeys(["rows", "groups", "n", "nn", "n0", "n1", "xx0", "xx1", "xn0", "xn1"], 0)
            for _ in range(groups):
                n = rng.randrange(1, 6)
                ones = sum(rng.random() < 0.4 + (skewed if split == "test" else 0) for _ in range(n))
                for name, value in {
                    "rows": n, "groups": 1, "n": n, "nn": n * n, "n0": n - ones, "n1": ones, "xx0": (n - ones) ** 2,
                    "xx1": ones**2, "xn0": (n - ones) * n, "xn1": ones * n,
                }.items():  # fmt: skip
                    sums[name] += value
            found[split] = sums
        return found

    fair = [max(row["deviations"] for row in grade_balance(counts(0.0), 2).values()) for _ in range(100)]
    assert 0.4 < sum(fair) / len(fair) < 1.4  # |z| of a normal has the mean 0.8
    skewed = counts(0.2)
    balance = grade_balance(skewed, 2)
    assert max(row["deviations"] for row in balance.values()) > 5
    scale = GradeScale.model_validate({"grades": GRADES[:2], "relevant_from": 1})
    texts = split_warnings(skewed | {"valid": skewed["test"]}, balance, DataConfig(), scale)
    assert any(text.startswith("The grades of split test") and "try another `data.seed`" in text for text in texts)
    assert len(texts) == sum(row["deviations"] > 5 for row in balance.values())


def test_splits_of_one_class_are_faults_and_small_ones_warnings() -> None:
    scale = GradeScale.model_validate({"grades": GRADES, "relevant_from": 2})
    counts = {split: {"n0": 40, "n1": 30, "n2": 50} for split in ("train", "valid", "test")}
    assert split_fault(counts, DataConfig(), scale) == ""
    assert split_warnings(counts, {}, DataConfig(), scale) == []
    assert split_fault(counts | {"train": {"n0": 1}}, DataConfig(), scale) == ""
    for split, found in (("valid", {"n2": 1}), ("test", {"n0": 9, "n1": 9}), ("valid", {}), ("train", {"rows": 5})):
        assert split_fault(counts | {split: found}, DataConfig(), scale).startswith(f"split {split} has ")
        no_share = DataConfig(shares=Shares(**dict.fromkeys(("train", "valid", "test"), 0.0), pool=1.0))
        assert split_fault(counts | {split: found}, no_share, scale) == ""
    without_labels = config(Path("a"), columns={"query": "q", "ad_title": "t"})
    assert "name the column of the labels as `grade`" in split_fault({}, without_labels, scale)
    (text,) = split_warnings(counts | {"valid": {"n0": 3, "n2": 12}}, {}, DataConfig(), scale)
    assert text.startswith("Split valid has 12 relevant and 3 other labelled pairs")
