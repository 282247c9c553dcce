"""A model whose weights are too many for one file: the second one is measured, fingerprinted, copied and removed with it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from data.contracts import ContractError, read_json
from pipeline.artifacts import LINKED, Recipe, run_stage
from pipeline.tracking.registry import WEIGHTS
from student.config import ExportConfig
from student.export import export_student
from student.onnx_files import data_file, files_of, remove
from student.scorer import MODEL_FILES, Scorer

from .conftest import make_rows

LIMITS = {"max_int8_auc_loss": 0.2, "max_decisions_changed": 0.2, "threads": 1, "fp16": True}
PRECISIONS = ("fp32", "int8", "fp16")


@pytest.fixture(scope="module")
def in_two_files(distilled, tiny, tmp_path_factory):
    """The export of the tiny student with its weights beside the models, and the stage's result."""
    out = tmp_path_factory.mktemp("two")
    return out, export_student(ExportConfig(**LIMITS), distilled / "model", tiny["pairs"], out, inline_bytes=10_000)


def test_both_files_are_written_and_count(in_two_files, exported):
    out, result = in_two_files
    inline = exported[1].figures
    for precision in PRECISIONS:
        model = out / MODEL_FILES[precision]
        assert [path.name for path in files_of(model)] == [model.name, f"{model.name}.data"]
        size = sum(path.stat().st_size for path in files_of(model)) / 1e6
        assert result.figures[f"{precision}_megabytes"] == pytest.approx(size)
        assert size == pytest.approx(inline[f"{precision}_megabytes"], rel=0.05)
        assert data_file(model).stat().st_size > 40_000
        assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # whoever may read one file may read all
    assert read_json(out / "export.json")["int8"]["file"] == "model.int8.onnx, model.int8.onnx.data"
    assert "| model.onnx, model.onnx.data |" in (out / "model_card.md").read_text()


def test_the_fingerprint_covers_the_second_file(distilled, tiny, in_two_files, tmp_path, monkeypatch):
    """The same export again has the same fingerprint, and one with another byte of weights has not."""
    out, result = in_two_files
    again = export_student(ExportConfig(**LIMITS), distilled / "model", tiny["pairs"], tmp_path, inline_bytes=10_000)
    assert again.fingerprint == result.fingerprint
    seen = []
    monkeypatch.setattr("student.export.digest_files", lambda files: seen.extend(files) or "")
    export_student(ExportConfig(**LIMITS), distilled / "model", tiny["pairs"], tmp_path, inline_bytes=10_000)
    assert {path.name for path in seen} >= {path.name for path in out.glob("*.data")}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_copy_of_the_folder_scores_alike(in_two_files, exported, tmp_path, precision):
    copy = tmp_path / "elsewhere"
    shutil.copytree(in_two_files[0], copy)
    rows = make_rows()[:20]
    scores = Scorer(copy, precision).grade_probs(rows)
    np.testing.assert_allclose(scores, Scorer(exported[0], precision).grade_probs(rows), atol=1e-6)
    data_file(copy / MODEL_FILES[precision]).unlink()
    with pytest.raises(Exception, match=rf"External data path does not exist: .*{MODEL_FILES[precision]}\.data"):
        Scorer(copy, precision)


def test_another_run_links_the_weights_and_the_registry_knows_them(in_two_files, tmp_path):
    out, _ = in_two_files
    recipe = Recipe("export", ExportConfig(), {})
    for run in ("a", "b"):
        run_stage(
            tmp_path / run / "export",
            recipe,
            lambda folder: shutil.copytree(out, folder, dirs_exist_ok=True) and in_two_files[1],
        )
    for path in (data_file(out / name) for name in MODEL_FILES.values()):
        assert path.name.endswith(LINKED)
        assert any(path.match(pattern) for pattern in WEIGHTS)
        assert (tmp_path / "a" / "export" / path.name).samefile(tmp_path / "b" / "export" / path.name)


def test_a_smaller_export_in_the_same_folder_leaves_no_second_file(in_two_files, distilled, tiny, tmp_path):
    shutil.copytree(in_two_files[0], tmp_path / "export")
    export_student(ExportConfig(**LIMITS), distilled / "model", tiny["pairs"], tmp_path / "export")
    assert not list((tmp_path / "export").glob("*.data"))


def test_a_refused_export_leaves_no_weights(distilled, tiny, tmp_path):
    strict = ExportConfig(**LIMITS, max_probability_difference=1e-30)
    with pytest.raises(ContractError, match="the exported fp32 model differs"):
        export_student(strict, distilled / "model", tiny["pairs"], tmp_path, inline_bytes=10_000)
    assert not list(tmp_path.glob("model*.onnx*"))


def test_removing_what_is_not_there_is_no_error(tmp_path):
    (tmp_path / "a.onnx.data").touch()
    remove([tmp_path / "a.onnx", tmp_path / "b.onnx"])
    assert not list(tmp_path.iterdir())
