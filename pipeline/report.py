"""One HTML file that tells what a run did: figures, curves, audited examples, lineage.

It is made from the run's folder alone, so it can be written again at any time, opens offline and asks no server for
anything. All text that comes from data is escaped by the template. A part whose files are missing is left out, and the
report says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from data.schema import ContractError
from pipeline import report_parts as parts
from pipeline.artifacts import StageRecord, read_record
from pipeline.stages import STAGES
from pipeline.summary import headline, number

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """One part of the report: its macro in the template, and what the macro shows (or why there is nothing)."""

    macro: str
    title: str
    content: Any = None
    missing: str = ""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path; raises `ContractError` when nothing has run there."""
    summary_file = folder / "summary.json"
    if not summary_file.exists():
        raise ContractError(f"{folder} has no summary.json; run a flow there first")
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    records = {name: record for name in STAGES if (record := read_record(folder / STAGES[name].folder)) is not None}
    sections = [
        _section("funnel", "Pairs", lambda: parts.funnel(folder / "pairs")),
        _section("teacher", "Teacher", lambda: parts.teacher(folder / "teacher")),
        _section("figures", "Annotation", lambda: _figures(records, "annotate")),
        _section("student", "Student", lambda: parts.student(folder / "student")),
        _section("figures", "Export", lambda: _figures(records, "export")),
        _section("examples", "Audited examples", lambda: _of_annotations(parts.examples, folder, records)),
        _section("audit", "For a second look", lambda: _of_annotations(parts.audit, folder, records)),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number}
    html = environment.get_template("report.html").render(
        summary=summary,
        stages=[
            (name, STAGES[name].title, stage, headline(name, stage["figures"]))
            for name, stage in summary["stages"].items()
        ],
        sections=sections,
        settings=json.dumps(summary["settings"], indent=2, ensure_ascii=False),
    )
    path = folder / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)
    return path


def _section(macro: str, title: str, make: Callable[[], Any]) -> Section:
    try:
        content = make()
    except FileNotFoundError as error:
        return Section(macro, title, missing=f"{Path(error.filename or '').name or 'a file'} is not there yet")
    except (ContractError, ValueError, KeyError, TypeError) as error:  # a file that is not what this module knows
        return Section(macro, title, missing=f"its files cannot be read ({type(error).__name__}: {error})")
    return Section(macro, title, content) if content else Section(macro, title, missing="the stage has not run")


def _figures(records: dict[str, StageRecord], name: str) -> dict[str, Any]:
    return records[name].figures if name in records else {}


def _of_annotations(
    make: Callable[[Path, Path, str], dict[str, Any]], folder: Path, records: dict[str, StageRecord]
) -> dict[str, Any]:
    if "annotate" not in records:
        return {}
    return make(folder / "annotations", folder / "pairs", str(records["annotate"].figures["annotation_key"]))
