"""Every family of encoders goes the whole way: warm-up, training, fp32, int8, score.py."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from student.config import ExportConfig
from student.distill import distill
from student.export import export_student
from student.scorer import Scorer

from .conftest import FAMILIES, make_base, make_rows


@pytest.mark.e2e
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_of_encoders_trains_exports_and_scores_alike(kind, tiny, quick, tmp_path):
    base = make_base(kind, tiny, tmp_path / "base")
    config = quick(epochs=1, warm_up={"pairs": 60})
    distill(config, base, tiny["pairs"], tiny["annotations"], tmp_path / "student")
    limits = ExportConfig(max_probability_difference=1e-5, max_int8_auc_loss=1.0, threads=1)
    result = export_student(limits, tmp_path / "student", tiny["pairs"], tmp_path / "export")
    assert result.figures["fp32_max_abs_dp"] < 1e-6
    assert result.figures["int8_max_abs_dp"] < 0.1
    written = pq.read_table(tmp_path / "student" / "test_predictions.parquet").to_pandas().set_index("pair_id")
    rows = [row for row in make_rows() if row["split"] == "test"]
    scorer = Scorer(tmp_path / "export")
    found = scorer.p_relevant(scorer.grade_probs(rows))
    np.testing.assert_allclose(found, written.loc[[row["pair_id"] for row in rows], "p_relevant"], atol=1e-5)
