"""What every room agrees on: errors, the config base, table schemas, the scale, files, the metrics log, progress.

The one package of this room that other rooms import; light on purpose (pyarrow and pydantic only).
"""

from data.contracts.annotations import KEY_FILE, annotation_key_of, read_annotations
from data.contracts.config import Config, UserPath
from data.contracts.errors import ContractError, Unavailable, enough_memory, first_line, out_of_memory
from data.contracts.files import digest, digest_bytes, digest_files, read_json, whole_file, write_json, write_text
from data.contracts.human_labels import (
    HUMAN_LABELS,
    HUMAN_LABELS_FILE,
    HumanLabels,
    grade_names,
    numbered,
    read_human_labels,
)
from data.contracts.metrics_log import MetricsLog, metric_lines
from data.contracts.output import StageOutput
from data.contracts.progress import OnProgress, log_progress, on_progress
from data.contracts.scale import Grade, GradeScale
from data.contracts.tables import (
    ANNOTATIONS,
    DISAGREEMENT,
    FREQUENCIES,
    PAIRS,
    RATIONALES,
    REASONS,
    SCORES,
    SELECTION,
    SPLITS,
    STRATA,
    TEXTS,
    check_schema,
    read_table,
)
from data.contracts.terms import ALONE, words
