"""`prefect run compare`: two runs side by side. Light to import, as the command line is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

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
    from pipeline.report.compare import compare_runs, find_run
    from pipeline.report.compare_page import save_comparison

    try:
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
        found = compare_runs(first, second, n_boot=resamples, seed=seed)
    except ContractError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    data, text = save_comparison(found, folder)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text.read_text(encoding="utf-8")))
    else:
        _lines(found)
    print(f"\n{found.result}\nkept in {data} and {text.name}")


def _lines(found: RunComparison) -> None:
    from pipeline.report.compare_page import difference_rows, figure_rows, measure_rows

    for name, a, b, change, limits, verdict in measure_rows(found):
        print(f"{name}: {a} and {b}, difference {change} {limits} ({verdict})")
    for stage, figure, a, b in figure_rows(found, equal=False):
        print(f"figure {stage}.{figure}: {a} and {b}")
    for kind, name, a, b in difference_rows(found):
        print(f"{kind} {name}: {a} and {b}")
