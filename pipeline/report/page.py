"""One HTML file that tells what a run did: metrics, curves, examples, lineage.

It is made from the run's folder alone, so it can be written again at any time, opens offline and asks no server for
anything. The template escapes all text that comes from data. A section is left out only where its stage has not completed.
"""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from data.contracts import ContractError, first_line, read_json, write_json, write_text
from pipeline.artifacts import StageRecord
from pipeline.report.sections.annotation import annotation_section
from pipeline.report.sections.data import pairs_section
from pipeline.report.sections.student import export_section, student_section
from pipeline.report.sections.teacher import teacher_section
from pipeline.report.summary import as_it_is_now, headline, summarise
from pipeline.report.text import interval, number, verdict
from pipeline.settings import PipelineConfig
from pipeline.stages import STAGES, finished_stages

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
# Anchor (and macro), title, the stage whose files it shows, and what reads them.
_SECTIONS = (
    ("pairs", "Pairs", "data", pairs_section),
    ("teacher", "Teacher", "teacher", teacher_section),
    ("annotation", "Annotation", "annotate", annotation_section),
    ("student", "Student", "student", student_section),
    ("export", "Export", "export", export_section),
    ("examples", "Examples", "annotate", annotation_section),
    ("second_look", "For a second look", "annotate", annotation_section),
)
_TILES = ("student", "teacher", "annotation", "export")


def finish_run(settings: PipelineConfig, flow: str, records: list[StageRecord], spent: list[float]) -> dict[str, Any]:
    """Write `summary.json` and `report.html`; return the summary. `spent` is each stage's wall time in this execution.

    A report that cannot be made is an error in the log, and the run is complete without it: the report can be written again
    at any time, the stages cannot.
    """
    summary = summarise(settings, flow, records, spent)
    write_json(settings.folder / "summary.json", summary)
    try:
        report = write_report(settings.folder)
    except (ContractError, OSError) as error:
        logger.error("the report of run '%s' is not written: %s", settings.run, error)
        return summary
    summary |= {"report": str(report), "report_link": report.resolve().as_uri()}
    write_json(settings.folder / "summary.json", summary)
    return summary


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Where a later flow has not finished, `summary.json` first gets the stages as they are now: the page shows these alone.
    Raises `ContractError` when no flow has finished there, and when the files of a finished stage are missing or damaged.
    """
    if not (folder / "summary.json").exists():
        raise ContractError(f"{folder} has no summary.json; run a flow there first")
    recorded = read_json(folder / "summary.json")
    if (summary := as_it_is_now(recorded, folder)) != recorded:
        write_json(folder / "summary.json", summary)
    environment = page_environment()
    sections = _sections(folder, environment)
    page = environment.get_template("report.html").render(
        summary=summary,
        below_floor=summary["stages"].get("student", {}).get("figures", {}).get("below_floor"),
        tiles=[section["tile"] for anchor in _TILES for section in sections if section["anchor"] == anchor],
        stages=[(STAGES[name], stage, headline(name, stage["figures"])) for name, stage in summary["stages"].items()],
        sections=sections,
        command=shell_lines(summary["command"]),
        drifted=[
            (STAGES[name].title, stage["figures"]["drift"])
            for name, stage in summary["stages"].items()
            if stage["figures"].get("drift", "fine") != "fine"
        ],
        since=[(STAGES[name].title, how) for name, how in summary.get("since", {}).items()],
        settings=json.dumps(summary["settings"], indent=2, ensure_ascii=False),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def page_environment() -> jinja2.Environment:
    """The templates of pages: what is put into them is escaped, and must be there; all know the `style` and our filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "interval": interval, "verdict": verdict}
    environment.globals["style"] = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment


def shell_lines(command: str) -> str:
    """A command with each of its options on a line of its own; a shell reads it as the same words.

    >>> print(shell_lines("prefect run data-prepare --preset sample --set data.source=table"))
    prefect run data-prepare \\
      --preset sample \\
      --set data.source=table
    """
    words = map(shlex.quote, shlex.split(command))
    return " ".join(f"\\\n  {word}" if word.startswith("--") else word for word in words)


def _sections(folder: Path, environment: jinja2.Environment) -> list[dict[str, Any]]:
    """Each section's anchor, title and stage, with its body and, if it has one, its tile, where the stage has completed."""
    records, macros = finished_stages(folder), environment.get_template("macros.html").module
    contents: dict[str, dict[str, Any]] = {}
    sections = []
    for anchor, title, name, read in _SECTIONS:
        section = {"anchor": anchor, "title": title, "stage": STAGES[name].title, "body": "", "tile": ""}
        sections.append(section)
        if name not in records:
            continue
        place = folder / STAGES[name].folder
        try:
            content = contents[name] = contents.get(name) or read(place, records[name])
            section["body"] = getattr(macros, anchor)(content)
            if anchor in _TILES:
                section["tile"] = getattr(macros, f"{anchor}_tile")(content)
        except (OSError, LookupError, ValueError, TypeError, jinja2.UndefinedError) as error:
            cause = f"{type(error).__name__}: {first_line(error)}"
            raise ContractError(
                f"its section '{title}' cannot be made from {place} ({cause}); run the stage again"
            ) from error
    return sections
