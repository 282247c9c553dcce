"""The rooms import one way: data ← teacher, student ← pipeline ← flows; teacher and student see the schema of data only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "data": {"data"},
    "teacher": {"teacher", "data"},
    "student": {"student", "data"},
    "pipeline": {"pipeline", "data", "teacher", "student"},
    "flows": {"flows", "pipeline", "data", "teacher", "student"},
    "benchmarks": {"benchmarks", "pipeline", "data", "teacher", "student"},
}
FILES = [file for room in MAY_IMPORT for file in sorted((ROOT / room).rglob("*.py"))]


def imported(file):
    """Full names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_import_points_up(file):
    room = file.relative_to(ROOT).parts[0]
    ours = {name for name in imported(file) if name.split(".")[0] in MAY_IMPORT}
    assert {name.split(".")[0] for name in ours} <= MAY_IMPORT[room]
    if room in ("teacher", "student"):
        assert {name for name in ours if name.startswith("data")} <= {"data.contracts"}
