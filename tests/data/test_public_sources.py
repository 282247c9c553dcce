"""Public sets in exactly the layout of their publishers, on small files made here: grades, raw labels, joins, text."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig, Shares
from data.contracts import DISAGREEMENT, PAIRS, ContractError, read_table
from data.prepare import prepare
from data.sources import input_fingerprint, read_source, source_of
from data.text import pair_id
from data.validation import validated


def checked(spark: Any, config: DataConfig) -> list[dict[str, Any]]:
    """The rows of a source after its checks."""
    return [row.asDict() for row in validated(read_source(spark, config), source_of(config), config).collect()]


def wands_folder(folder: Path) -> Path:
    """Three files as Wayfair publishes them: tabs, whatever the names say."""
    (folder / "query.csv").write_text(
        "query_id\tquery\tquery_class\n0\tsalon chair\tMassage Chairs\n1\tsmart coffee table\t\n"
    )
    header = (
        "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\tproduct_features\trating_count\t"
        "average_rating\treview_count\n"
    )
    products = [
        "0\tsolid wood bed\tBeds\tFurniture / Beds\tgood & <b>solid</b><br>oak\t"
        "overallwidth:64.7|colour : oak|colour:pine|x\t15.0\t4.5\t15.0",
        '1\t"chair 5"" high"\tChairs\tFurniture\t\t\t\t\t',
        "2\ttwice\t\t\t\t\t\t\t",
        "2\ttwice, differently\t\t\t\t\t\t\t",
    ]
    (folder / "product.csv").write_text(header + "\n".join(products) + "\n")
    labels = ["0\t0\t0\tExact", "1\t0\t1\tIrrelevant", "2\t1\t0\tPartial", "3\t1\t9\tExact", "4\t7\t0\tExact"]
    labels += ["5\t1\t2\tExact", "6\t1\t1\tMaybe"]
    (folder / "label.csv").write_text("id\tquery_id\tproduct_id\tlabel\n" + "\n".join(labels) + "\n")
    return folder


@pytest.mark.spark
def test_wands(spark: Any, tmp_path: Path) -> None:
    config = DataConfig(source="wands", path=wands_folder(tmp_path), max_rejected_share=1.0)
    rows = checked(spark, config)
    assert len(rows) == 7
    sound = {(row["query"], row["ad_title"]): row for row in rows if row["reason"] is None}
    assert {key: (row["grade"], row["grade_raw"]) for key, row in sound.items()} == {
        ("salon chair", "solid wood bed"): (2, 1.0),
        ("salon chair", 'chair 5" high'): (0, 0.0),
        ("smart coffee table", "solid wood bed"): (1, 0.5),
    }
    bed = sound["salon chair", "solid wood bed"]
    assert bed["ad_text"] == "good & solid oak"
    assert bed["attributes"] == {"overallwidth": "64.7", "colour": "pine"}
    assert sorted((row["reason"], row["detail"]) for row in rows if row["reason"]) == [
        ("its product has different rows in product.csv", "2"),
        ("its product is not in product.csv", "9"),
        ("its query is not in query.csv", "7"),
        ("the label is not Exact, Partial or Irrelevant", "Maybe"),
    ]
    before = input_fingerprint(config)
    (tmp_path / "query.csv").write_text("query_id\tquery\tquery_class\n")
    assert input_fingerprint(config) != before
    (tmp_path / "product.csv").unlink()
    with pytest.raises(ContractError, match=r"no product\.csv"):
        read_source(spark, config)


def esci_folder(folder: Path) -> Path:
    """Two Parquet files as Amazon publishes them."""
    examples = [
        (0, "revent 80 cfm", 0, "B000MOO21W", "us", "I", 0, 1, "train"),
        (1, "revent 80 cfm", 0, "B07X3Y6B1V", "us", "E", 0, 1, "train"),
        (2, "ventilador", 1, "B000MOO21W", "es", "C", 1, 1, "test"),
        (3, "revent 80 cfm", 0, "missing", "us", "S", 1, 1, "test"),
        (4, "fan", 2, "B07X3Y6B1V", "us", "S", 1, 1, "test"),
        (5, "fan", 2, "B000MOO21W", "us", "X", 1, 1, "test"),
    ]
    names = ["example_id", "query", "query_id", "product_id", "product_locale", "esci_label", "small_version",
             "large_version", "split"]  # fmt: skip
    columns = dict(zip(names, map(list, zip(*examples, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / "shopping_queries_dataset_examples.parquet")
    products = {
        "product_id": ["B000MOO21W", "B07X3Y6B1V", "B000MOO21W"],
        "product_title": ["Panasonic WhisperCeiling Fan", "Homewerks 7141-80 Fan &amp; Light", "Ventilador de techo"],
        "product_description": [None, "<p>Quiet.</p>", "Silencioso."],
        "product_bullet_point": ["WhisperCeiling fans\nfeature a motor", None, None],
        "product_brand": ["Panasonic", "Homewerks", "Panasonic"],
        "product_color": ["White", None, ""],
        "product_locale": ["us", "us", "es"],
    }
    pq.write_table(pa.table(products), folder / "shopping_queries_dataset_products.parquet")
    return folder


@pytest.mark.spark
def test_esci(spark: Any, tmp_path: Path) -> None:
    config = DataConfig(source="esci", path=esci_folder(tmp_path))
    rows = checked(spark, config)
    assert len(rows) == 5
    sound = {(row["query"], row["ad_title"]): row for row in rows if row["reason"] is None}
    assert {key: (row["grade"], row["grade_raw"]) for key, row in sound.items()} == {
        ("revent 80 cfm", "Panasonic WhisperCeiling Fan"): (0, 0.0),
        ("revent 80 cfm", "Homewerks 7141-80 Fan & Light"): (3, 1.0),
        ("fan", "Homewerks 7141-80 Fan & Light"): (2, 0.1),
    }
    light = sound["fan", "Homewerks 7141-80 Fan & Light"]
    assert (light["ad_text"], light["attributes"]) == ("Quiet.", {"brand": "Homewerks"})
    fan = sound["revent 80 cfm", "Panasonic WhisperCeiling Fan"]
    assert (fan["ad_text"], fan["attributes"]) == (
        "WhisperCeiling fans\nfeature a motor",
        {"brand": "Panasonic", "colour": "White"},
    )
    assert sorted(row["reason"] for row in rows if row["reason"]) == [
        "its product is not in shopping_queries_dataset_products.parquet",
        "the label is not E, S, C or I",
    ]
    (spanish,) = checked(spark, config.model_copy(update={"locale": "es"}))
    assert (spanish["grade"], spanish["grade_raw"], spanish["ad_title"]) == (1, 0.01, "Ventilador de techo")
    assert len(checked(spark, config.model_copy(update={"locale": None}))) == 6


@pytest.mark.spark
def test_crowdflower_keeps_the_variance_of_its_raters(spark: Any, tmp_path: Path) -> None:
    lines = [
        '1,bridal shower decorations,Accent Pillow with Heart,"Red satin &amp; <style>p{}</style>heart\n<br />pillow",1,0',
        "2,led christmas lights,Set of 10 Battery Lights,,4,0.471",
        "3,led christmas lights,Set of 10 battery lights,,3,0.943",
        "4,projector,ViewSonic,,2.5,0",
        "5,projector,ViewSonic Pro,,,",
    ]
    file = tmp_path / "train.csv"
    file.write_text(
        '"id","query","product_title","product_description","median_relevance","relevance_variance"\n'
        + "\n".join(lines)
    )
    shares = Shares(train=0, valid=0, test=0, pool=1)
    config = DataConfig(source="crowdflower", path=file, max_rejected_share=0.5, shares=shares)
    result = prepare(config, tmp_path, spark)
    assert (result.figures["rows_in"], result.figures["rows"], result.figures["rejected"]) == (5, 2, 2)
    rows = {row["ad_title"]: row for row in read_table(tmp_path / "pairs", PAIRS).to_pylist()}
    assert rows["Accent Pillow with Heart"]["ad_text"] == "Red satin & heart pillow"
    assert (rows["Accent Pillow with Heart"]["grade"], rows["Accent Pillow with Heart"]["grade_raw"]) == (0, 1.0)
    lights = rows["Set of 10 Battery Lights"]
    assert (lights["grade"], lights["grade_raw"]) == (2, 3.0)  # the lower of two
    spread = {row["pair_id"]: row for row in read_table(tmp_path / "disagreement", DISAGREEMENT).to_pylist()}
    both = spread[lights["pair_id"]]
    assert (both["n_labels"], both["grade_min"], both["grade_max"]) == (2, 2, 3)
    assert both["rating_variance"] == pytest.approx((0.471 + 0.943) / 2 + 0.25)
    assert spread[pair_id("bridal shower decorations", "Accent Pillow with Heart", "Red satin & heart pillow")][
        "rating_variance"
    ] == pytest.approx(0.0)
    assert json.loads((tmp_path / "card.json").read_text())["labels"] == {
        "several": 1,
        "conflicting": 1,
        "far_apart": 0,
    }


@pytest.mark.spark
@pytest.mark.parametrize("label", ["label", "relevant"])
def test_qbqtc_in_both_releases(spark: Any, tmp_path: Path, label: str) -> None:
    records = [
        {"query": "小孩咳嗽感冒", "title": "小孩感冒过后久咳嗽该吃什么药", label: str(grade)} for grade in (0, 1, 2, 3)
    ]
    records.append({"query": "三江汇流是哪三江", "title": "三水西南：三江汇流处", label: ""})
    file = tmp_path / "train.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()))
    rows = checked(spark, DataConfig(source="qbqtc", path=file))
    assert sorted((row["grade"], row["grade_raw"]) for row in rows if row["reason"] is None) == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
    ]
    assert [row["reason"] for row in rows if row["reason"]] == ["the label is not 0, 1 or 2"] * 2
    assert {row["query"] for row in rows} == {"小孩咳嗽感冒", "三江汇流是哪三江"}


@pytest.mark.spark
def test_qadsm_has_no_header_and_its_quotes_are_characters(spark: Any, tmp_path: Path) -> None:
    file = tmp_path / "xglue.qadsm.de.dev"
    file.write_text('fernseher chemnitz\tReparatur?\tBei "Wer liefert was"\tGood\nwlan\t"IT" Magazin\t"Abo\tBad\n')
    rows = checked(spark, DataConfig(source="qadsm", path=file))
    assert [(row["query"], row["ad_title"], row["ad_text"], row["grade"], row["reason"]) for row in rows] == [
        ("fernseher chemnitz", "Reparatur?", 'Bei "Wer liefert was"', 1, None),
        ("wlan", '"IT" Magazin', '"Abo', 0, None),
    ]
