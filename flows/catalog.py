"""The flows by name: one line of help and the stages each one is about. Imports nothing, so that listing is instant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A flow; the stages that its own need are run or reused first. `function` is its name in `flows/relevance.py`."""

    name: str
    function: str
    stages: tuple[str, ...]
    help: str


FLOWS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("data-prepare", "data_prepare", ("data",), "Turn a source into checked pairs with leak-free splits."),
        Entry("teacher-train", "teacher_train", ("teacher",), "Train the reasoning teacher: warm start, then AGPO."),
        Entry("annotate", "annotate", ("annotate",), "Label the pool with the teacher: Spark over an engine."),
        Entry("student-distill", "student_distill", ("student",), "Distil the annotations into a small cross-encoder."),
        Entry("student-export", "student_export", ("export",), "Export the student to ONNX, with a parity check."),
        Entry("student-score", "student_score", ("score",), "Score the whole pairs table with the exported student."),
        Entry(
            "relevance-pipeline",
            "relevance_pipeline",
            ("data", "teacher", "annotate", "student", "export"),
            "The whole way: pairs, teacher, annotations, student, export.",
        ),
    )
}
