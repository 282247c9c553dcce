from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data.contracts import ContractError, GradeScale, read_json, read_table
from data.sources.labels import json_attributes
from student import export as export_module
from student import scorer
from student.config import ExportConfig, ScoreConfig
from student.export import export_student
from student.model import load_classifier
from student.scorer import Scorer

from .conftest import make_rows


def test_the_export_is_complete_and_within_its_limits(exported):
    out, result = exported
    files = {path.name for path in out.iterdir()}
    assert files == {
        *("model.onnx", "model.int8.onnx", "model.fp16.onnx", "tokenizer.json", "scale.json", "student.json"),
        *("export.json", "model_card.md", "score.py"),
    }
    assert result.figures["fp32_max_abs_dp"] <= 1e-4
    assert result.figures["parity_rows"] == 96
    assert (out / "model.int8.onnx").stat().st_size < (out / "model.onnx").stat().st_size
    assert json.loads((out / "export.json").read_text())["passed"] is True


def assert_scores_as_evaluated(export, trained):
    evaluated = pq.read_table(trained / "test_predictions.parquet").to_pandas().set_index("pair_id")["p_relevant"]
    rows = [row for row in make_rows() if row["split"] == "test"]
    scorer = Scorer(export)
    scored = scorer.p_relevant(scorer.grade_probs(rows, batch_tokens=70))
    np.testing.assert_allclose(scored, evaluated[[row["pair_id"] for row in rows]], atol=1e-4)


def test_the_scorer_gives_the_evaluated_probabilities_from_raw_rows(exported, distilled):
    assert_scores_as_evaluated(exported[0], distilled)


def test_the_folder_scores_without_the_product(exported, tmp_path):
    """In another interpreter, with imports of the product, torch and transformers forbidden, as the card shows it."""
    out, _ = exported
    shutil.copytree(out, tmp_path / "export")
    code = re.search(r"```python\n(.*?)```", (out / "model_card.md").read_text(), re.S).group(1)
    assert len(code.strip().splitlines()) <= 10
    forbidden = ("torch", "transformers", "data", "student", "pydantic", "pyarrow")
    guard = f"import sys\nsys.modules.update(dict.fromkeys({forbidden!r}))\n"
    done = subprocess.run(
        [sys.executable, "-c", guard + code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"\[0\.\d+\] \[ ?(True|False)\]", done.stdout.strip())
    lines = '{"query": "red kettle", "ad_title": "red kettle"}\n\n{"query": "red kettle", "ad_title": "blue sofa \\ud800"}\n'
    piped = subprocess.run(
        [sys.executable, str(tmp_path / "export" / "score.py"), "int8", "--at", "grade 0:recall=0.9"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    scored = [json.loads(line) for line in piped.stdout.splitlines()]
    assert len(scored) == 2
    assert all(sum(row["grades"]) == pytest.approx(1) for row in scored)
    curve = json.loads((out / "student.json").read_text())["decisions"][0]
    threshold = next(t for t, recall in zip(curve["threshold"], curve["recall"], strict=True) if recall >= 0.9)
    assert [row["decision"] for row in scored] == [row["grades"][0] >= threshold for row in scored]


@pytest.mark.parametrize("read", [0, 1])
def test_the_command_ends_without_a_word_when_nobody_reads_on(exported, tmp_path, read):
    """As in `score.py < pairs.jsonl | head -1`."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "red kettle", "ad_title": "red kettle"}\n' * 3000)
    command = [sys.executable, str(exported[0] / "score.py"), "int8"]
    with (
        pairs.open() as stdin,
        subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
    ):
        lines = [process.stdout.readline() for _ in range(read)]
        process.stdout.close()
        assert process.stderr.read() == ""
    assert all("p_relevant" in json.loads(line) for line in lines)
    assert process.returncode == -signal.SIGPIPE


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"query,ad_title", "line 2 is not JSON"),
        (b'{"query": "a", "ad_title": "b\xff"}', "line 2 is not JSON"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'["query", "ad_title"]', "line 2 is no pair: it needs the texts"),
        (b'{"query": "red kettle"}', "line 2 is no pair: it needs the texts"),
        (b'{"query": "red kettle", "ad_title": 3}', "line 2 is no pair: it needs the texts"),
        (b'{"query": "a", "ad_title": "b", "attributes": "c"}', "line 2 is no pair: `ad_text` must be a text"),
        (
            b'{"query": "a", "ad_title": "b", "attributes": {"c": ' + b"[" * 5000 + b"]" * 5000 + b"}}",
            "line 2 is not JSON",
        ),
    ],
)
def test_the_command_names_a_line_that_is_no_pair_and_keeps_what_came_before(
    exported, monkeypatch, capsys, line, message
):
    good = b'{"query": "red kettle", "ad_title": "red kettle", "ad_text": null, "attributes": {"colour": "red"}}'
    monkeypatch.setattr(scorer, "__file__", str(exported[0] / "score.py"))
    monkeypatch.setattr(sys, "argv", ["score.py"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(good + b"\n" + line + b"\n" + good)))
    with pytest.raises(SystemExit, match=re.escape(message)) as stopped:
        scorer.main()
    assert "\n" not in str(stopped.value)
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (0, "0"),
        (True, "true"),
        (False, "false"),
        (1.5, "1.5"),
        (["rot", "grün"], '["rot", "grün"]'),
        ({"w": 3}, '{"w": 3}'),
        ("as it is", "as it is"),
        ("", ""),
        (None, None),
    ],
)
def test_attributes_count_as_the_data_stage_stores_them(value, stored):
    kept = json_attributes(json.dumps({"a": value, "b": "c"}))
    assert kept == ({} if stored is None else {"a": stored}) | {"b": "c"}
    row = scorer.parse_pair(json.dumps({"query": "q", "ad_title": "t", "attributes": {"a": value, "b": "c"}}).encode())
    read = [scorer.ad_text("t", None, attributes) for attributes in (kept, row["attributes"], {"a": value, "b": "c"})]
    assert len(set(read)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["int4"], "no precision 'int4'; give fp32 or int8 or fp16 or bf16"),
        (["--at", "precision"], "'precision' is no decision; write precision=0.95"),
        (["--at", "best:recall=0.5"], "no grade 'best'; the grades are grade 0, grade 1, grade 2"),
    ],
)
def test_the_command_names_what_it_cannot_do(exported, monkeypatch, arguments, message):
    monkeypatch.setattr(scorer, "__file__", str(exported[0] / "score.py"))
    monkeypatch.setattr(sys, "argv", ["score.py", *arguments])
    with pytest.raises(SystemExit, match=message):
        scorer.main()


def test_the_limits_of_the_export():
    def fault(value, low, moved=1e-6, changed=0.0, precision="int8"):
        parity = {"fp32": {"max_abs_dp": moved}, precision: {}, f"{precision}_auc_loss": {"value": value, "low": low}}
        decisions = {"bad": {"value": 0.5, "low": 0.0}, "good": {"value": 0.1, "low": changed}}
        return export_module.parity_fault(parity | {f"{precision}_decisions_changed": decisions}, ExportConfig())

    assert fault(0.009, 0.005) is None
    assert "int8 model loses 0.0200" in fault(0.02, 0.001)
    assert fault(0.02, -0.001) is None  # more than the limit, and no more than chance
    assert "one class" in fault(None, None)
    assert "fp32 model differs" in fault(0.0, 0.0, moved=2e-4)
    assert "fp16 model decides otherwise than fp32 on 10.0%" in fault(0.0, 0.0, changed=0.06, precision="fp16")
    assert "of grade 'good'" in fault(0.0, 0.0, changed=0.06)
    assert "fp32 model differs" in fault(0.0, 0.0, moved=float("nan"))


def test_a_student_beyond_the_range_of_fp16_is_refused_with_what_to_do(distilled, tiny, tmp_path):
    source = tmp_path / "student"
    shutil.copytree(distilled / "model", source)
    scale, card = GradeScale.load(source), read_json(source / "student.json")
    model = load_classifier(source, scale, max_length=card["max_length"], seed=0)
    with torch.no_grad():  # one activation of 1e5, which the next layer takes back
        for layer in model.base_model.encoder.layer:
            layer.intermediate.dense.bias[0] = 1e5
            layer.intermediate.dense.weight[0] = 0
            layer.output.dense.weight[:, 0] *= 1e-4
            layer.output.dense.bias -= 1e5 * layer.output.dense.weight[:, 0]
    model.save_pretrained(source)
    limits = ExportConfig(
        max_probability_difference=0.1, max_int8_auc_loss=1, max_decisions_changed=1, threads=1, fp16=True
    )
    with pytest.raises(ContractError, match=r"in fp16 .* no numbers .*; set export.fp16 = false"):
        export_student(limits, source, tiny["pairs"], tmp_path / "export")
    assert not list((tmp_path / "export").glob("*.onnx"))


def test_a_folder_that_is_no_student_is_refused(tiny, tmp_path):
    with pytest.raises(ContractError, match="student-distill"):
        export_student(ExportConfig(), tmp_path, tiny["pairs"], tmp_path / "out")


@pytest.mark.spark
def test_spark_scores_a_table_once(spark, exported, tiny, tmp_path):
    from data.contracts import SCORES
    from pipeline.score import score

    export, _ = exported
    rows = make_rows()
    config = ScoreConfig(precision="fp32", window=50, partitions=3, splits=("test", "pool"))
    out = tmp_path / "scores"
    result = score(config, export, tiny["pairs"], out, spark)
    assert (result.figures["rows_new"], result.figures["rows"]) == (96, 96)
    table = read_table(out, SCORES).to_pandas().set_index("pair_id")
    expected = [row for row in rows if row["split"] in ("test", "pool")]
    assert sorted(table.index) == sorted(row["pair_id"] for row in expected)
    scorer = Scorer(export)
    probs = scorer.grade_probs(expected)
    np.testing.assert_allclose(
        table.loc[[row["pair_id"] for row in expected], "p_relevant"], scorer.p_relevant(probs), atol=1e-6
    )
    # As after a kill: some files are gone; then with more splits; then with nothing to do.
    lost = sorted(out.glob("part-*.parquet"))[0]
    lost.unlink()
    left = len(read_table(out, SCORES))
    assert left < 96
    again = score(
        config.model_copy(update={"splits": ("train", "valid", "test", "pool")}), export, tiny["pairs"], out, spark
    )
    assert again.figures == again.figures | {"rows": 192, "rows_before": left, "rows_new": 192 - left}
    assert read_table(out, SCORES)["pair_id"].to_pandas().is_unique
    idle = score(config, export, tiny["pairs"], out, spark)
    assert idle.figures["rows_new"] == 0


@pytest.mark.spark
def test_spark_refuses_what_is_not_an_export_or_a_table(spark, exported, tiny, tmp_path):
    from pipeline.score import score

    with pytest.raises(ContractError, match="student-export"):
        score(ScoreConfig(), tmp_path, tiny["pairs"], tmp_path / "out", spark)
    (tmp_path / "student.json").write_text("{")
    with pytest.raises(ContractError, match="damaged"):
        score(ScoreConfig(), tmp_path, tiny["pairs"], tmp_path / "out", spark)
    with pytest.raises(ContractError, match="does not exist"):
        score(ScoreConfig(), exported[0], tmp_path / "nothing", tmp_path / "out", spark)
    with pytest.raises(ContractError, match="column"):
        score(ScoreConfig(), exported[0], tiny["annotations"], tmp_path / "out", spark)
