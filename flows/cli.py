"""`prefect run`: a verb of Prefect's own command line that runs one of this project's flows here and now.

Exit codes: 0 done; 1 the flow failed; 2 the command was wrong (an unknown flow, preset or key, or a bad value), and
nothing was started; 130 interrupted. Light to import: the flows and the rooms are imported when one is run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import cyclopts
from cyclopts import Parameter

from flows.catalog import FLOWS

if TYPE_CHECKING:
    from pipeline.settings import PipelineConfig

HELP = """Run one of this project's flows here and now. Without a name: list the flows.

Stages whose inputs, settings and code have not changed are reused; an interrupted run resumes when it is run again.
"""

run_app = cyclopts.App(name="run", help=HELP, help_flags=["--help", "-h"], version_flags=[])


@run_app.default
def run(
    name: str = "",
    /,
    *,
    preset: str = "",
    set_: Annotated[list[str], Parameter(name="--set", negative=())] = [],  # noqa: B006 - read only
    config: Path | None = None,
    run_name: Annotated[str, Parameter(name="--name")] = "",
    runs: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Run one of this project's flows here and now. Without a name: list the flows.

    Stages whose inputs, settings and code have not changed are reused; an interrupted run resumes when it is run again.

    Parameters
    ----------
    name
        The flow, such as relevance-pipeline.
    preset
        Settings to start from, a file of pipeline/presets; sample unless given.
    set_
        One setting as key=value, such as teacher.seed=3; may be repeated.
    config
        TOML file with settings; they win over the preset, and --set wins over them.
    run_name
        Name of the run and of its folder; the preset's name unless given.
    runs
        Folder that holds all runs; ./runs unless given.
    dry_run
        Only say which stages would run, which would be reused, and why.
    """
    if not name:
        _list()
        return
    from data.schema import ContractError

    try:
        _known(name)
        settings = _settings(preset, set_, config, run_name, runs)
        if dry_run:
            _show_plan(name, settings)
            return
    except ContractError as error:
        _fail(str(error), 2)
    _run(name, settings)


def main() -> None:
    """`python -m flows.cli`, the same command without Prefect's."""
    run_app()


def _list() -> None:
    width = max(map(len, FLOWS))
    for entry in FLOWS.values():
        print(f"{entry.name:<{width}}  {entry.help}")


def _known(name: str) -> None:
    if name not in FLOWS:
        from data.schema import ContractError
        from pipeline.settings import nearest

        raise ContractError(f"no flow '{name}'{nearest(name, FLOWS)}")


def _settings(
    preset: str, overrides: list[str], config: Path | None, run_name: str, runs: Path | None
) -> PipelineConfig:
    from pipeline.settings import apply_overrides, build_settings, read_toml

    values: dict[str, Any] = read_toml(config) if config is not None else {}
    if preset:
        values["preset"] = preset
    if run_name:
        values["run"] = run_name
    if runs is not None:
        values["runs"] = str(runs)
    return apply_overrides(build_settings(values), overrides)


def _show_plan(name: str, settings: PipelineConfig) -> None:
    from pipeline.plan import plan
    from pipeline.stages import with_upstream

    print(f"{name}, run '{settings.run}' in {settings.folder}:")
    for row in plan(settings, with_upstream(FLOWS[name].stages)):
        print(f"  {row.action:<6} {row.stage:<9} {row.reason}")


def _run(name: str, settings: PipelineConfig) -> None:
    from data.schema import ContractError
    from flows.local_server import ensure_server

    try:
        ensure_server()
        from flows import relevance

        summary = getattr(relevance, FLOWS[name].function)(settings)
    except ContractError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes", 130)
    except Exception as error:  # Prefect has logged it, with its traceback
        _fail(f"{name} failed: {type(error).__name__}: {_first_line(error)}", 1)
    _show(summary)


def _show(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipeline.summary import stage_rows

    table = Table(title=f"{summary['flow']}, run '{summary['run']}'", caption=f"{summary['seconds']:.0f} s in all")
    for heading, justify in (("stage", "left"), ("status", "left"), ("seconds", "right"), ("key figures", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in stage_rows(summary):
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "140")))
    console.print(table)
    for label in ("report", "tracking"):
        if summary.get(label):
            print(f"{label}: {summary[label]}")
    print(f"again: {summary['command']}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
