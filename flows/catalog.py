"""The flows by name: one line of help and the stages each one is about. Imports nothing, so that listing is instant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A flow; the stages that its own need are run or reused first."""

    name: str
    stages: tuple[str, ...]
    help: str

    @property
    def function(self) -> str:
        """Its name in `flows/relevance.py`."""
        return self.name.replace("-", "_")


FLOWS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("data-prepare", ("data",), "Turn a source into checked pairs with leak-free splits."),
        Entry("teacher-train", ("teacher",), "Train the reasoning teacher: warm start, then AGPO."),
        Entry("annotate", ("annotate",), "Label the pool with the teacher: Spark over an engine."),
        Entry("student-distill", ("student",), "Distil the annotations into a small cross-encoder."),
        Entry("student-export", ("export",), "Export the student to ONNX, with a parity check."),
        Entry("student-score", ("score",), "Score the whole pairs table with the exported student."),
        Entry(
            "relevance-pipeline",
            ("data", "teacher", "annotate", "student", "export"),
            "The whole way: pairs, teacher, annotations, student, export.",
        ),
    )
}
