"""What the student's stage reads: rows to learn from, to be chosen by and to be measured on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from data.contracts import ContractError, GradeScale, read_human_labels
from student.calibration import one_class
from student.config import StudentConfig
from student.dataset import Annotated, Examples, read_annotated, read_examples, read_training
from student.peers import with_soft

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """What the student learns from, is chosen by and is measured on; `annotations` by pair_id and their key; `judged` is
    valid with the soft labels that annotated pairs teach."""

    training: Examples
    valid: Examples
    test: Examples
    annotation_key: str
    annotations: dict[str, Annotated]
    judged: Examples
    skipped: dict[str, int] = field(default_factory=dict)
    """`human_labels_skipped`: labels of another scale that are left out, where there are any."""


def read_rows(
    config: StudentConfig, pairs: Path, annotations: Path | None, scale: GradeScale, human_labels: Path | None = None
) -> Rows:
    """All rows of the stage; raises `ContractError` as `student.distill.distill` does."""
    reasons = config.contrastive_weight > 0 or config.suspects != "off"
    key, annotated = read_annotated(annotations, config.annotation_key, reasons=reasons)
    labels = read_human_labels(human_labels, scale)
    for remark in labels.remarks:
        logger.warning("student: %s", remark)
    training = read_training(pairs, annotated, scale, config, labels.grades)
    valid, test = read_examples(pairs, scale, "valid"), read_examples(pairs, scale, "test")
    for split, examples in (("valid", valid), ("test", test)):
        if not len(examples):
            raise ContractError(f"split '{split}' has no human grades; the student needs some to be measured against")
        if remark := one_class(examples.grade >= scale.relevant_from, split):
            logger.warning("student: %s", remark)
    counts = training.n_gold, training.n_annotated
    logger.info("student: %d rows to learn from (%d human grades, %d annotations)", len(training), *counts)
    skipped = {"human_labels_skipped": labels.skipped} if labels.skipped else {}
    return Rows(training, valid, test, key, annotated, with_soft(valid, annotated), skipped)
