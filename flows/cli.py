"""`prefect run`: a verb of Prefect's own command line that runs one of this project's flows here and now.

Exit codes: 0 done; 1 the flow failed; 2 the command was wrong (an unknown flow, preset or key, or a bad value), and
nothing was started; 130 interrupted; 143 terminated. Light to import: the flows and the rooms are imported when one is run.
"""

from __future__ import annotations

import io
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter

from flows.audit import audit_export, audit_import
from flows.catalog import FLOWS, Entry
from flows.compare import compare
from flows.environment import set_environment
from flows.runtime import Terminated, fail, printing, refusals, terminable

if TYPE_CHECKING:
    from pipeline.settings import PipelineConfig

HELP = """Run one of this project's flows here and now. Without a name: list the flows.

Stages whose inputs and settings have not changed are reused, those of other runs too; an interrupted run resumes when
it is run again.
"""

for _stream in (sys.stdout, sys.stderr):  # here, as Prefect prints the help without calling anything of ours
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="replace")  # a terminal that knows ASCII only


def _wrong(error: cyclopts.CycloptsError) -> str:
    """The message for a command line that cannot be read."""
    if isinstance(error, cyclopts.UnusedCliTokensError):
        words = " ".join(error.unused_tokens or ())
        remedy = f"give a file as --config {words}" if words.endswith(".toml") else "give settings as --set key=value"
        return f"error: '{words}' is too much; {remedy}"
    return f"error: {' '.join(str(error).split())}"


run_app = cyclopts.App(name="run", help=HELP, help_flags=["--help", "-h"], version_flags=[], error_formatter=_wrong)


def _preset_names(context: object) -> list[str]:
    from pipeline.settings import preset_names

    return preset_names()


def _setting_keys(context: object) -> list[str]:
    from pipeline.keys import fields
    from pipeline.settings import PipelineConfig

    return [f"{key}=" for key in fields(PipelineConfig) if key != "preset"]


def _started_runs(context: object) -> list[str]:
    from pipeline.resume import started_runs

    return started_runs(Path("runs"))


@Parameter(name="*", show_default=False)
@dataclass(frozen=True)
class Options:
    """What every flow takes.

    Parameters
    ----------
    preset
        Settings to start from, a file of pipeline/presets; sample unless given.
    set_
        One setting as key=value, such as teacher.seed=3; may be repeated.
    config
        TOML file with settings; they win over the preset, and --set wins over them.
    name
        Name of the run and of its folder; unless given, the preset's name, or the config file's.
    runs
        Folder that holds all runs; ./runs unless given.
    resume
        Name of a run to continue with its settings; --preset, --config and --set change them.
    dry_run
        Only say which stages would run, which would be reused, and why.
    """

    preset: Annotated[str, Parameter(completer=_preset_names)] = ""
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=(), completer=_setting_keys)] = ()
    config: Path | None = None
    name: str = ""
    runs: Path | None = None
    resume: Annotated[str, Parameter(completer=_started_runs)] = ""
    dry_run: Annotated[bool, Parameter(negative=())] = False


NO_OPTIONS = Options()


@run_app.default
def run(flow: Annotated[str, Parameter(show=False)] = "", /, *, options: Options = NO_OPTIONS) -> None:
    """List the flows, or refuse a name that none of them has."""
    if flow or options.resume:
        _start(flow, options)
    else:
        width = max(map(len, FLOWS))
        with printing():
            for entry in FLOWS.values():
                print(f"{entry.name:<{width}}  {entry.help}")


Help = Annotated[bool, Parameter(name=("--help", "-h"), negative=(), show_default=False)]


def _command(entry: Entry) -> None:
    def command(*, options: Options = NO_OPTIONS, help_: Help = False) -> None:
        """Run the flow.

        Parameters
        ----------
        help_
            Show this help, with the flow's settings.
        """
        _help(entry.name, options) if help_ else _start(entry.name, options)

    usage = f"Usage: prefect run {entry.name} [OPTIONS]"
    run_app.command(command, name=entry.name, help=entry.help, help_flags=[], usage=usage)


for _entry in FLOWS.values():
    _command(_entry)
for _command_line in (compare, audit_export, audit_import):
    run_app.command(_command_line)


@run_app.command
def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes Prefect's commands, and these, in a shell: source it, or keep it where yours looks."""
    try:
        from prefect.cli._app import _app as whole
    except ImportError:
        whole = run_app
    with printing():
        print(whole.generate_completion(prog_name="prefect", shell=shell))


def main() -> None:
    """`python -m flows.cli`, the same command without Prefect's."""
    run_app()


def _start(flow: str, options: Options) -> None:
    with refusals():
        flow, settings = chosen(flow, options)
        if options.dry_run:
            _show_plan(flow, settings)
            return
    run_here(flow, settings, options.config)


def chosen(flow: str, options: Options) -> tuple[str, PipelineConfig]:
    """The flow and its settings; raises `ContractError` for a command that is wrong."""
    from data.contracts import ContractError
    from pipeline.resume import resume
    from pipeline.settings import choose, nearest

    if flow and flow not in FLOWS:
        raise ContractError(f"no flow '{flow}'{nearest(flow, FLOWS)}")
    if not options.resume:
        return flow, choose(options.preset, options.config, options.name, options.runs, options.set_)
    if options.name:
        raise ContractError("--resume names the run, so leave --name out")
    runs = options.runs or Path("runs")
    last, settings = resume(runs, options.resume, options.preset, options.config, options.set_)
    return flow or last, settings


def _help(flow: str, options: Options) -> None:
    """The options, then every setting of the flow's own stages with its type, its value and its help."""
    from flows.settings_help import show_settings

    run_app.help_print([flow])
    with refusals():
        show_settings(flow, chosen(flow, options)[1])


def _show_plan(flow: str, settings: PipelineConfig) -> None:
    from pipeline.plan import plan
    from pipeline.stages import with_upstream

    entry = FLOWS[flow]
    own = entry.own(settings)
    rows = plan(own, with_upstream(entry.stages, own), student_first=entry.in_rounds)
    with printing():
        print(f"{flow}, run '{settings.run}' in {settings.folder}:")
        for row in rows:
            print(f"  {row.action:<6} {row.stage:<9} {row.reason}")


def run_here(flow: str, settings: PipelineConfig, config: Path | None = None) -> None:
    """Run the flow in this process; ends the process with a message and an exit code when it does not end well.

    `config` is the file that the settings came from, for the command that goes on after a failure.
    """
    set_environment()
    from httpx import TransportError

    from data.contracts import ContractError, first_line
    from flows.local_server import ensure_server
    from flows.terminal import progress_view

    try:
        ensure_server()
        from flows import relevance
        from pipeline.locks import Busy
        from pipeline.stages import with_upstream

        log = settings.folder / "stderr.log"
        entry = FLOWS[flow]
        with terminable(), progress_view(with_upstream(entry.stages, entry.own(settings)), log):
            summary = getattr(relevance, entry.function)(settings)
    except Busy as error:
        fail(str(error), 1)
    except ContractError as error:
        fail(str(error), 1, _go_on(settings, config))
    except KeyboardInterrupt:
        fail("interrupted", 130, _go_on(settings, config))
    except Terminated:
        fail("terminated", 143, _go_on(settings, config))
    except TransportError as error:
        fail(f"Prefect's server does not answer any more ({first_line(error)})", 1, _go_on(settings, config))
    except Exception as error:  # Prefect has logged it, with its traceback
        fail(f"{flow} failed: {type(error).__name__}: {first_line(error)}", 1, _go_on(settings, config))
    _show(summary)


def _go_on(settings: PipelineConfig, config: Path | None) -> str:
    """What to do after a failure; nothing where the run's folder has not been taken."""
    from pipeline.resume import FILE

    if not (settings.folder / FILE).exists():
        return ""
    words = ["prefect", "run", "--resume", settings.run]
    words += [] if settings.runs == Path("runs") else ["--runs", str(settings.runs)]
    words += [] if config is None else ["--config", str(config)]
    log = settings.folder / "stderr.log"
    more = f"What Spark and the engines wrote: {log}\n" if log.exists() and log.stat().st_size else ""
    return f"{more}What has finished is kept. To go on from there: {shlex.join(words)}"


def _show(summary: dict[str, Any]) -> None:
    from flows.terminal import stages_table

    with printing():
        stages_table(summary)
        for label in ("annotations", "report", "tracking"):
            if summary.get(label):
                print(f"{label}: {summary[label]}")
        for stage, sentence in summary.get("untracked", {}).items():
            print(f"{stage} is {sentence}")
        print(f"again: {summary['command']}")


if __name__ == "__main__":
    main()
