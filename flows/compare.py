"""`prefect run compare`: two runs side by side. Light to import, as the command line is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.runtime import printing, refusals

if TYPE_CHECKING:
    from pipeline.report.compare import RunComparison


def compare(
    *,
    runs: Annotated[list[str], Parameter(consume_multiple=True, negative=())],
    folder: Path = Path("runs"),
    resamples: int = 1000,
    seed: int = 0,
) -> None:
    """Compare two runs: is the second one's student better, and what differs between them.

    On the test pairs that both students were measured on, ROC-AUC, PR-AUC, NDCG@10 and F1 are compared by a paired bootstrap
    over queries; settings, inputs, versions and key figures are shown side by side. The result is also written to
    FOLDER/compare/A-vs-B.json and .md, and to MLflow, in the experiment PREFIX/compare of the second run's store.

    Example: prefect run compare --runs sample tuned

    Exit codes: 0 compared, 2 a wrong command or no such run.

    Parameters
    ----------
    runs
        Two runs, by name or by the path of their folder: the one to compare with, and the one in question.
    folder
        Folder that holds all runs.
    resamples
        Bootstrap resamples for each interval.
    seed
        Seed of the resampling.
    """
    from data.contracts import ContractError
    from pipeline.report.compare import compare_runs, find_run, save_comparison

    with refusals():
        if len(runs) != 2:
            raise ContractError(
                f"compare takes two runs, as in --runs sample tuned; given: {', '.join(runs) or 'none'}"
            )
        if resamples < 100 or seed < 0:
            raise ContractError("--resamples is at least 100, and --seed at least 0")
        folder = folder.expanduser()
        first, second = (find_run(name, folder) for name in runs)
        if first.resolve() == second.resolve():
            raise ContractError(f"both are the same run, {first}; name two")
        comparison = compare_runs(first, second, n_boot=resamples, seed=seed)
    data, text = save_comparison(comparison, folder)
    with printing():
        _print(comparison)
        print(f"\n{comparison.result}\nwritten to {data} and {text.name}")


def _print(comparison: RunComparison) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else None
    for title, header, rows in comparison.tables(equal=False):
        if console is None:  # one line for each row, to be searched by other programs
            print(f"{title}:", *("  ".join(cell for cell in row if cell) for row in rows), sep="\n  ")
            continue
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
