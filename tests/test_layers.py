"""Imports point one way: contracts ← data, teacher, student ← pipeline ← flows; no cycle, inside rooms too."""

import ast
from graphlib import CycleError, TopologicalSorter
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
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
SUB_PACKAGES = ("annotation", "audit", "tracking", "report")


def imported(file: Path) -> set[str]:
    """Our modules that a file imports, also inside functions; what only a type checker sees is none."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else node.module)
    return {name for name in names if name.split(".")[0] in MAY_IMPORT}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_import_points_up(file: Path) -> None:
    room = file.relative_to(ROOT).parts[0]
    ours = imported(file)
    assert {name.split(".")[0] for name in ours} <= MAY_IMPORT[room]
    if room in ("teacher", "student"):
        assert {name for name in ours if name.startswith("data")} <= {"data.contracts"}
    if "contracts" in file.parts:
        assert all(name.startswith("data.contracts") for name in ours)


@pytest.mark.parametrize("package", SUB_PACKAGES)
def test_sub_packages_of_the_pipeline_do_not_use_each_others_inside(package: str) -> None:
    # The report names what MLflow lacks, comparisons and audits are recorded there, by the tracker's public functions.
    allowed = {"pipeline.tracking.tracker"} if package in ("report", "audit") else set()
    others = tuple(f"pipeline.{other}" for other in SUB_PACKAGES if other != package)
    for file in sorted((ROOT / "pipeline" / package).rglob("*.py")):
        assert {name for name in imported(file) if name.startswith(others)} <= allowed, file


def test_there_is_no_cycle() -> None:
    graph = {}
    for name, file in MODULES.items():
        # A package stands above its modules, whose import of it loads nothing that they need.
        graph[name] = {other for other in imported(file) if other != name and not name.startswith(f"{other}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' → '.join(error.args[1])}")
