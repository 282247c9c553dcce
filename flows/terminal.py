"""What a person at a terminal sees: each stage with its progress while a flow runs, and the closing table.

Progress comes from ordinary log records. One with the attributes `stage` and `state` says where a stage is; one with
`progress`, a pair (done, total), how far the running stage's present work is. Without a terminal there are the log's plain
lines and nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flows.runtime import ROOMS

if TYPE_CHECKING:
    from rich.console import Console

_END = "\x00\n"
MARKS = {"waiting": "[dim]·[/]", "running": "[cyan]▸[/]", "done": "[green]✔[/]", "reused": "[green]=[/]"}


@contextmanager
def progress_view(stages: tuple[str, ...]) -> Iterator[None]:
    """Show the flow's stages, and those they need, below the log while the body runs; nothing when stderr is no terminal."""
    if not sys.stderr.isatty() or os.environ.get("CI"):
        yield
        return
    from prefect.logging.handlers import PrefectConsoleHandler
    from rich.console import Console

    from pipeline.stages import with_upstream

    with os.fdopen(os.dup(2), "w", encoding="utf-8") as terminal:
        console = Console(file=terminal, force_terminal=True)
        view = StagesView(with_upstream(stages), console)
        # Straight to the console, so that Prefect's lines keep their colours.
        loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
        handlers = {each for logger in loggers for each in logger.handlers if isinstance(each, PrefectConsoleHandler)}
        before = {handler: handler.console for handler in handlers}
        for handler in handlers:
            handler.console = console
        for name in ROOMS:
            logging.getLogger(name).addHandler(view)
        try:
            with view.progress, _stderr_above(console, terminal.fileno()):
                yield
        finally:
            for name in ROOMS:
                logging.getLogger(name).removeHandler(view)
            for handler, console_before in before.items():
                handler.console = console_before


@contextmanager
def _stderr_above(console: Console, terminal: int) -> Iterator[None]:
    """All that this process and its children write to stderr appears above the console's bars, line by line.

    The JVM and the engines write there behind Python's back, and would write into the bars.
    """
    from rich.text import Text

    read_end, write_end = os.pipe()

    def pass_on() -> None:
        with os.fdopen(read_end, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.endswith(_END):
                    if line != _END:  # a last line that nobody ended
                        console.print(Text.from_ansi(line.removesuffix(_END)))
                    return
                console.print(Text.from_ansi(line.rstrip()))

    reader = threading.Thread(target=pass_on, daemon=True)
    os.dup2(write_end, 2)
    os.close(write_end)
    reader.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.write(2, _END.encode())  # the pipe itself stays open as long as a child that has it
        os.dup2(terminal, 2)
        reader.join(timeout=5)


class StagesView(logging.Handler):
    """One line for each stage, with a bar for the one that runs; fed with log records."""

    def __init__(self, stages: tuple[str, ...], console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        super().__init__()
        self.progress = Progress(
            TextColumn("{task.fields[mark]} {task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        self.rows = {
            name: self.progress.add_task(f"{name:<9}", total=None, start=False, mark=MARKS["waiting"], count="")
            for name in stages
        }
        self.running = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Take what the record says of a stage; other records pass."""
        state, stage = getattr(record, "state", ""), getattr(record, "stage", "")
        if state in MARKS and stage in self.rows:
            row = self.rows[stage]
            self.progress.update(row, mark=MARKS[state])
            if state == "running":
                self.running = stage
                self.progress.start_task(row)
            else:
                self.progress.start_task(row)
                self.progress.update(row, total=1, completed=1, count="" if state == "done" else "reused")
                self.progress.stop_task(row)
        progress = getattr(record, "progress", None)
        if progress is not None and self.running in self.rows:
            done, total = progress
            self.progress.update(self.rows[self.running], completed=done, total=total, count=f"{done:,}/{total:,}")


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
