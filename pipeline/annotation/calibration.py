"""Calibration of a teacher's grade probabilities: fitted on human grades of split valid, applied to every annotation.

A teacher is surer than it is right, and says some grades oftener than humans do. A calibration never changes a vote, a grade
or the raw probabilities, which stay beside. Light to import: workers apply what the driver has fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from pydantic import BaseModel

from data.contracts import ANNOTATIONS, PAIRS, read_annotations, read_json, read_table, write_json
from pipeline.annotation.store import commit, files_of, read_file
from student.scorer import probabilities

Array = np.ndarray
Method = Literal["none", "temperature", "isotonic"]
MIN_ROWS = 50  # below it nothing is fitted
MIN_ISOTONIC_ROWS = 1000  # below it isotonic regression overfits (Niculescu-Mizil and Caruana, ICML 2005)
_FLOOR = 1e-3  # added to every probability: a grade that no sample voted for is not impossible


class Calibration(BaseModel):
    """A map from grade probabilities to grade probabilities, and how it was chosen.

    `temperature`: softmax(log p / T + offsets). `isotonic`: a rising curve for each grade on top of that, then normalised.
    `log_loss` is each method's on held-out queries, by cross-validation; `rows` and `queries` are those it was fitted on.
    """

    method: Method = "none"
    temperature: float = 1.0
    offsets: list[float] = []
    curves: list[list[list[float]]] = []
    rows: int = 0
    queries: int = 0
    log_loss: dict[str, float] = {}

    @property
    def metrics(self) -> dict[str, Any]:
        """What a tracker shows of it."""
        losses = {f"valid_log_loss_{method}": value for method, value in self.log_loss.items()}
        return {"calibration": self.method, "n_calibration": self.rows} | losses

    def apply(self, probs: Array) -> Array:
        """Calibrated probabilities (N, K) of raw ones (N, K)."""
        if self.method == "none":
            return probs
        return probabilities(_logits(probs) / self.temperature + np.array(self.offsets), curves=self.curves)


def calibrated(table: pa.Table, calibration: Calibration) -> pa.Table:
    """Rows of `ANNOTATIONS` with `grade_probs` made from `grade_probs_raw`, or, in rows of older tables, from themselves.

    What a student graded stays as it is.
    """
    if table["annotator"].null_count < table.num_rows:
        ours = pc.is_null(table["annotator"])
        return pa.concat_tables([calibrated(table.filter(ours), calibration), table.filter(pc.invert(ours))])
    raw = pc.coalesce(table["grade_probs_raw"], table["grade_probs"]).combine_chunks()
    probs, given = raw, raw.is_valid().to_numpy(zero_copy_only=False)
    if given.any():
        values = calibration.apply(raw.flatten().to_numpy().reshape(given.sum(), -1))
        ends = np.r_[0, np.cumsum(given * values.shape[1])].astype(np.int32)
        probs = pa.ListArray.from_arrays(ends, values.ravel(), mask=pa.array(~given))
    for name, column in {"grade_probs": probs, "grade_probs_raw": raw}.items():
        table = table.set_column(table.schema.get_field_index(name), ANNOTATIONS.field(name), column)
    return table


def calibration_of(out: Path, key: str) -> Calibration:
    """The calibration that the rows of `out` under `key` have."""
    path = _path(out, key)
    return Calibration.model_validate(read_json(path)["calibration"]) if path.exists() else Calibration()


def recalibrate(out: Path, key: str, run: str, pairs: Path, ids: Sequence[str]) -> Calibration:
    """Fit a calibration on the annotations of the pairs `ids` that have a human grade, and give it to all rows under `key`.

    The files are rewritten one by one, each under its own name, only when the calibration has changed since; a kill on the
    way is made good by the next call. `run` must own the folder.
    """
    path = _path(out, key)
    fitted = fit(*_labelled(out, key, pairs, ids))
    state = {"calibration": fitted.model_dump(mode="json"), "applied": True}
    if (read_json(path) == state) if path.exists() else (fitted.method == "none"):
        return fitted
    write_json(path, state | {"applied": False})
    for file in files_of(out, key):
        commit(file, calibrated(read_file(file), fitted), run)
    write_json(path, state)
    return fitted


def fit(probs: Array, grade: Array, query_id: Array) -> Calibration:
    """The calibration of probabilities (N, K) on human grades (N,) that has the least log loss on held-out queries.

    Candidates are none, temperature with offsets and, from `MIN_ISOTONIC_ROWS` on, isotonic curves on top (see
    `student.calibration`, which the student shares).
    """
    from student.calibration import fit_calibration, fit_isotonic, isotonic_losses

    counts = {"rows": len(grade), "queries": len(np.unique(query_id))}
    if len(grade) < MIN_ROWS or counts["queries"] < 2:
        return Calibration(**counts)
    scaled, isotonic = isotonic_losses(_logits(probs), grade, query_id)
    log_loss = {"none": float(-np.log(np.maximum(probs[np.arange(len(grade)), grade], _FLOOR)).mean())}
    log_loss["temperature"] = scaled
    if len(grade) >= MIN_ISOTONIC_ROWS:
        log_loss["isotonic"] = isotonic
    method = min(log_loss, key=lambda name: log_loss[name])
    if method == "none":
        return Calibration(**counts, log_loss=log_loss)
    temperature, offsets = fit_calibration(_logits(probs), grade)
    fitted = Calibration(
        method="temperature", temperature=temperature, offsets=offsets.tolist(), log_loss=log_loss, **counts
    )
    if method == "temperature":
        return fitted
    return fitted.model_copy(update={"method": method, "curves": fit_isotonic(fitted.apply(probs), grade)})


def _labelled(out: Path, key: str, pairs: Path, ids: Sequence[str]) -> tuple[Array, Array, Array]:
    """Raw probabilities (N, K), human grades (N,) and queries (N,) of the usable annotations of `ids`, in their order."""
    wanted = pads.field("pair_id").isin(pa.array(ids, pa.string()))
    columns = ["pair_id", "query_id", "grade"]
    human = {
        row["pair_id"]: row for row in read_table(pairs / "pairs", PAIRS, columns=columns, where=wanted).to_pylist()
    }
    usable = wanted & (pads.field("status") == "ok")
    batches = read_annotations(out, ["pair_id", "grade_probs", "grade_probs_raw"], key, usable) if ids else ()
    rows = sorted((row for batch in batches for row in batch.to_pylist()), key=lambda row: row["pair_id"])
    return (
        np.array([row["grade_probs_raw"] or row["grade_probs"] for row in rows], dtype=np.float64),
        np.array([human[row["pair_id"]]["grade"] for row in rows], dtype=np.int64),
        np.array([human[row["pair_id"]]["query_id"] for row in rows]),
    )


def _logits(probs: Array) -> Array:
    return np.log((probs + _FLOOR) / (1 + _FLOOR * probs.shape[1]))


def _path(out: Path, key: str) -> Path:
    return out / f"_calibration-{key}.json"
