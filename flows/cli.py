"""`prefect run`: a verb of Prefect's own command line that runs one of this project's flows here and now.

Exit codes: 0 done; 1 the flow failed; 2 the command was wrong (an unknown flow, preset or key, or a bad value), and
nothing was started; 130 interrupted. Light to import: the flows and the rooms are imported when one is run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import cyclopts
from cyclopts import Parameter

from flows.catalog import FLOWS
from flows.compare import compare

if TYPE_CHECKING:
    from pipeline.settings import PipelineConfig

HELP = """Run one of this project's flows here and now. Without a name: list the flows.

Stages whose inputs and settings have not changed are reused, those of other runs too; an interrupted run resumes when
it is run again.
"""

run_app = cyclopts.App(name="run", help=HELP, help_flags=["--help", "-h"], version_flags=[])


def _preset_names(context: object) -> list[str]:
    from pipeline.settings import preset_names

    return preset_names()


def _setting_keys(context: object) -> list[str]:
    from pipeline.settings import PipelineConfig, field_names

    return [f"{key}=" for key in field_names(PipelineConfig)]


def _started_runs(context: object) -> list[str]:
    from pipeline.resume import started_runs

    return started_runs(Path("runs"))


@Parameter(name="*", show_default=False)
@dataclass(frozen=True)
class Options:
    """What every flow takes."""

    preset: Annotated[
        str,
        Parameter(
            help="Settings to start from, a file of pipeline/presets; sample unless given.", completer=_preset_names
        ),
    ] = ""
    set_: Annotated[
        tuple[str, ...],
        Parameter(
            name="--set",
            negative=(),
            help="One setting as key=value, such as teacher.seed=3; may be repeated.",
            completer=_setting_keys,
        ),
    ] = ()
    config: Annotated[
        Path | None, Parameter(help="TOML file with settings; they win over the preset, and --set wins over them.")
    ] = None
    name: Annotated[
        str, Parameter(help="Name of the run and of its folder; unless given, the preset's name, or the config file's.")
    ] = ""
    runs: Annotated[Path | None, Parameter(help="Folder that holds all runs; ./runs unless given.")] = None
    resume: Annotated[
        str,
        Parameter(help="Name of a run to continue with the settings it was started with.", completer=_started_runs),
    ] = ""
    dry_run: Annotated[
        bool, Parameter(negative=(), help="Only say which stages would run, which would be reused, and why.")
    ] = False


NO_OPTIONS = Options()


@run_app.default
def run(flow: Annotated[str, Parameter(show=False)] = "", /, *, options: Options = NO_OPTIONS) -> None:
    """Run one of this project's flows here and now. Without a name: list the flows.

    Stages whose inputs and settings have not changed are reused, those of other runs too; an interrupted run resumes
    when it is run again.
    """
    if flow or options.resume:
        _start(flow, options)
    else:
        width = max(map(len, FLOWS))
        for entry in FLOWS.values():
            print(f"{entry.name:<{width}}  {entry.help}")


def _command(name: str) -> Callable[..., None]:
    def command(
        *,
        options: Options = NO_OPTIONS,
        help_: Annotated[
            bool,
            Parameter(
                name=("--help", "-h"), negative=(), show_default=False, help="Show this help, with the flow's settings."
            ),
        ] = False,
    ) -> None:
        if help_:
            _help(name, options)
        else:
            _start(name, options)

    return command


for _entry in FLOWS.values():
    run_app.command(
        _command(_entry.name),
        name=_entry.name,
        help=_entry.help,
        help_flags=[],
        usage=f"Usage: prefect run {_entry.name} [OPTIONS]",
    )


run_app.command(compare)


@run_app.command
def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes Prefect's commands, and these, in a shell: source it, or keep it where yours looks."""
    try:
        from prefect.cli._app import _app as whole
    except ImportError:
        whole = run_app
    print(whole.generate_completion(prog_name="prefect", shell=shell))


def main() -> None:
    """`python -m flows.cli`, the same command without Prefect's."""
    run_app()


def _start(flow: str, options: Options) -> None:
    from data.contracts import ContractError

    try:
        flow, settings = _chosen(flow, options)
        if options.dry_run:
            _show_plan(flow, settings)
            return
    except ContractError as error:
        _fail(str(error), 2)
    _run(flow, settings)


def _chosen(flow: str, options: Options) -> tuple[str, PipelineConfig]:
    """The flow and its settings; raises `ContractError` for a command that is wrong."""
    from data.contracts import ContractError
    from pipeline.settings import apply_overrides, build_settings, choose, nearest

    if flow and flow not in FLOWS:
        raise ContractError(f"no flow '{flow}'{nearest(flow, FLOWS)}")
    if not options.resume:
        return flow, choose(options.preset, options.config, options.name, options.runs, options.set_)
    from pipeline.resume import recall

    clash = [name for name in ("preset", "config", "name") if getattr(options, name)]
    if clash:
        raise ContractError(f"--resume takes the settings of the run, so leave --{clash[0]} out; --set can change some")
    given = {override.partition("=")[0].strip() for override in options.set_}
    last, values = recall(options.runs or Path("runs"), options.resume, given)
    return flow or last, apply_overrides(build_settings(values), options.set_)


def _help(flow: str, options: Options) -> None:
    """The options, then every setting of the flow's own stages with its type, its value and its help."""
    from data.contracts import ContractError
    from flows.settings_help import show_settings

    run_app.help_print([flow])
    try:
        show_settings(flow, _chosen(flow, options)[1])
    except ContractError as error:
        _fail(str(error), 2)


def _show_plan(flow: str, settings: PipelineConfig) -> None:
    from pipeline.plan import plan
    from pipeline.stages import with_upstream

    print(f"{flow}, run '{settings.run}' in {settings.folder}:")
    for row in plan(settings, with_upstream(FLOWS[flow].stages)):
        print(f"  {row.action:<6} {row.stage:<9} {row.reason}")


def _run(flow: str, settings: PipelineConfig) -> None:
    from data.contracts import ContractError, first_line
    from flows.local_server import ensure_server
    from flows.terminal import progress_view

    try:
        ensure_server()
        from flows import relevance

        with progress_view(FLOWS[flow].stages):
            summary = getattr(relevance, FLOWS[flow].function)(settings)
    except ContractError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes", 130)
    except Exception as error:  # Prefect has logged it, with its traceback
        _fail(f"{flow} failed: {type(error).__name__}: {first_line(error)}", 1)
    _show(summary)


def _show(summary: dict[str, Any]) -> None:
    from flows.terminal import stages_table

    stages_table(summary)
    for label in ("report", "tracking"):
        if summary.get(label):
            print(f"{label}: {summary[label]}")
    for stage, sentence in summary.get("untracked", {}).items():
        print(f"{stage} is {sentence}")
    print(f"again: {summary['command']}")


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
