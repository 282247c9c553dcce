"""The flows by name: one line of help and the stages each one is about. Imports nothing, so that listing is instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.settings import PipelineConfig


@dataclass(frozen=True)
class Entry:
    """A flow; the stages that its own need are run or reused first."""

    name: str
    stages: tuple[str, ...]
    help: str
    from_labels: bool = False
    """Whether its student learns from human labels alone, whatever `student.use_annotations` says."""
    in_rounds: bool = False
    """Whether it runs other flows, round after round."""

    @property
    def function(self) -> str:
        """Its name in `flows/relevance.py`."""
        return self.name.replace("-", "_")

    def own(self, settings: PipelineConfig) -> PipelineConfig:
        """The settings that the flow runs under; in rounds, those of the first with annotations."""
        if self.in_rounds:
            from pipeline.rounds import settings_of_round

            return settings_of_round(settings, 1)
        if not self.from_labels:
            return settings
        student = settings.student.model_copy(update={"use_annotations": False})
        return settings.model_copy(update={"student": student})


FLOWS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("data-prepare", ("data",), "Turn a source into checked pairs with leak-free splits."),
        Entry("teacher-train", ("teacher",), "Train the reasoning teacher: warm start, then AGPO."),
        Entry("annotate", ("annotate",), "Label the pool with the teacher: Spark over an engine."),
        Entry("student-distill", ("student",), "Distil the annotations into a small cross-encoder."),
        Entry("student-export", ("export",), "Export the student to ONNX, with a parity check."),
        Entry(
            "student-from-labels",
            ("data", "student", "export"),
            "A student without a teacher: pairs, student from human labels alone, export.",
            from_labels=True,
        ),
        Entry("student-score", ("score",), "Score the whole pairs table with the exported student."),
        Entry(
            "relevance-pipeline",
            ("data", "teacher", "annotate", "student", "export"),
            "The whole way: pairs, teacher, annotations, student, export.",
        ),
        Entry(
            "relevance-loop",
            ("data", "teacher", "annotate", "student", "export"),
            "Rounds of choosing pairs, annotating, distilling and measuring, within a budget.",
            in_rounds=True,
        ),
    )
}
