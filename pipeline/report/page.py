"""One HTML file that tells what a run did: figures, curves, audited examples, lineage.

It is made from the run's folder alone, so it can be written again at any time, opens offline and asks no server for
anything. All text that comes from data is escaped by the template. A part whose files are missing is left out, and the
report says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from data.contracts import ContractError
from pipeline.artifacts import StageRecord
from pipeline.report import annotation as report_annotation
from pipeline.report import parts as report_parts
from pipeline.report.head import tiles
from pipeline.report.plots import share_bar
from pipeline.report.student import student
from pipeline.report.summary import headline, number
from pipeline.stages import STAGES, finished_stages

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """One part of the report: its macro (and anchor), and what the macro shows (or why there is nothing)."""

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
    records = finished_stages(folder)
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    html = (
        _environment()
        .get_template("report.html")
        .render(
            summary=summary,
            untracked=summary.get("untracked"),
            tiles=tiles(records, folder / STAGES["student"].folder),
            stages=[
                (name, STAGES[name].title, stage, headline(name, stage["figures"]))
                for name, stage in summary["stages"].items()
            ],
            sections=_sections(folder, records),
            command=shell_lines(summary["command"]),
            settings=json.dumps(summary["settings"], indent=2, ensure_ascii=False),
            style=Markup(style),
            style_hash=style_hash(style),
        )
    )
    path = folder / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)
    return path


def style_hash(style: str) -> str:
    """The source expression by which a content security policy allows this style sheet and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(style.encode('utf-8')).digest()).decode()}"


def shell_lines(command: str) -> str:
    """A long command with each of its options on a line of its own; a shell reads it as the same words.

    >>> print(shell_lines("prefect run data-prepare --preset sample --set data.source=table"))
    prefect run data-prepare \\
      --preset sample \\
      --set data.source=table
    """
    lines: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(map(shlex.join, lines)) if len(lines) > 2 else command


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "bar": share_bar}
    return environment


def _sections(folder: Path, records: dict[str, StageRecord]) -> list[Section]:
    pairs, annotations = folder / STAGES["data"].folder, folder / STAGES["annotate"].folder
    annotated = records.get("annotate")

    @cache
    def rows() -> report_annotation.Rows:
        return report_annotation.looked_at(annotations, pairs, key()) if annotated else []

    def key() -> str:
        return str(annotated.figures["annotation_key"]) if annotated else ""

    return [
        _section("funnel", "Pairs", lambda: report_parts.funnel(pairs)),
        _section("teacher", "Teacher", lambda: report_parts.teacher(folder / STAGES["teacher"].folder)),
        _section(
            "annotation",
            "Annotation",
            lambda: report_annotation.annotation(annotations, pairs, annotated, rows()) if annotated else {},
        ),
        _section("student", "Student", lambda: student(folder / STAGES["student"].folder)),
        _section("export", "Export", lambda: report_parts.export(folder / STAGES["export"].folder)),
        _section(
            "examples", "Audited examples", lambda: report_annotation.examples(rows(), pairs) if annotated else {}
        ),
        _section(
            "second_look",
            "For a second look",
            lambda: report_annotation.second_look(annotations, pairs, key()) if annotated else {},
        ),
    ]


def _section(macro: str, title: str, make: Callable[[], Any]) -> Section:
    try:
        content = make()
    except FileNotFoundError as error:
        return Section(macro, title, missing=f"{Path(error.filename or '').name or 'a file'} is not there yet")
    except (ContractError, ValueError, KeyError, TypeError) as error:  # a file that is not what this module knows
        return Section(macro, title, missing=f"its files cannot be read ({type(error).__name__}: {error})")
    return Section(macro, title, content) if content else Section(macro, title, missing="the stage has not run")
