"""What a person at a terminal sees: each stage with its progress while a flow runs, and the closing table.

Without a terminal there are the log's plain lines and nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.contracts import on_progress

if TYPE_CHECKING:
    from rich.console import Console

MARKS = {"waiting": "[dim]·[/]", "running": "[cyan]▸[/]", "done": "[green]✔[/]", "reused": "[green]=[/]"}
_VIEW: ContextVar[StagesView | None] = ContextVar("view", default=None)


@contextmanager
def progress_view(stages: tuple[str, ...], log: Path) -> Iterator[None]:
    """Show `stages` below the log's lines while the body runs; nothing when stderr is no terminal.

    What the JVM, the engines and other libraries write to stderr behind Python's back goes to the file `log`, since it would
    be lost among the bars.
    """
    if not sys.stderr.isatty() or os.environ.get("CI"):
        yield
        return
    from prefect.logging.handlers import PrefectConsoleHandler
    from rich.console import Console

    log.parent.mkdir(parents=True, exist_ok=True)
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    handlers = {
        each: each.console for one in loggers for each in one.handlers if isinstance(each, PrefectConsoleHandler)
    }
    with os.fdopen(os.dup(2), "w", encoding="utf-8") as terminal, log.open("ab") as file:
        console = Console(file=terminal, force_terminal=True)
        view = StagesView(stages, console)
        token = _VIEW.set(view)
        os.dup2(file.fileno(), 2)
        for handler in handlers:  # straight to the console, so that Prefect's lines keep their colours
            handler.console = console
        try:
            with view.bars, on_progress(view.progress):
                yield
        finally:
            os.dup2(terminal.fileno(), 2)
            if not log.stat().st_size:
                log.unlink()
            _VIEW.reset(token)
            for handler, before in handlers.items():
                handler.console = before


def show(stage: str, state: str) -> None:
    """Mark a stage as `running`, `done` or `reused` in the view, if there is one."""
    if (view := _VIEW.get()) is not None and stage in view.rows:
        view.show(stage, state)


class StagesView:
    """One line for each stage, with a bar for the one that runs."""

    def __init__(self, stages: tuple[str, ...], console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.fields[mark]} {task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        self.rows = {
            name: self.bars.add_task(f"{name:<9}", total=None, start=False, mark=MARKS["waiting"], count="")
            for name in stages
        }
        self.running = ""

    def show(self, stage: str, state: str) -> None:
        """Mark a stage; one that is over has a full bar."""
        row = self.rows[stage]
        self.bars.start_task(row)
        self.bars.update(row, mark=MARKS[state])
        if state == "running":
            self.running = stage
            return
        self.bars.update(row, total=1, completed=1, count="" if state == "done" else "reused")
        self.bars.stop_task(row)

    def progress(self, done: int, total: int) -> None:
        """Set the bar of the stage that runs."""
        if self.running:
            self.bars.update(self.rows[self.running], completed=done, total=total, count=f"{done:,}/{total:,}")


def stages_table(summary: dict[str, Any]) -> None:
    """Print the closing table of a run to stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pipeline.report.summary import stage_rows

    table = Table(title=f"{summary['flow']}, run '{summary['run']}'", caption=f"{summary['seconds']:.0f} s in all")
    for heading, justify in (("stage", "left"), ("status", "left"), ("seconds", "right"), ("key figures", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in stage_rows(summary):
        table.add_row(*(Text(cell) for cell in row))
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "140"))
    Console(width=width).print(table)
