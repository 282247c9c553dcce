"""`prefect run audit-export` and `audit-import`: pairs out to raters, their answers back. Light to import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from flows.runtime import refusals

What = Literal["sample", "doubtful", "disagreements", "low-agreement", "suspects"]


def audit_export(
    *, run: str, what: What = "sample", size: int = 300, seed: int = 0, folder: Path = Path("runs")
) -> None:
    """Draw annotated pairs for raters: a sheet (CSV), and tasks with a labelling view for Label Studio.

    They are written to FOLDER/RUN/audit/draw-N. A `sample` is stratified, with known probabilities, and shows raters
    nothing of the teacher: from its answers the accuracy of the annotations is estimated. The other kinds are picked,
    worst first, for a second look, and show what is doubtful. Give each rater a copy of the sheet.

    Parameters
    ----------
    run
        A run, by name or by the path of its folder.
    what
        sample; doubtful (teacher and human differ, or the teacher's samples do), or one of the two: disagreements,
        low-agreement; suspects (human labels that student and teacher contradict, see student.suspects).
    size
        Pairs; a sample takes at least eight of each stratum.
    seed
        Seed of the sample.
    folder
        Folder that holds all runs.
    """
    with refusals():
        from data.contracts import ContractError
        from pipeline.audit.draw import Draw, export
        from pipeline.report.compare import find_run

        if size < 1 or seed < 0:
            raise ContractError("--size is at least 1, and --seed at least 0")
        place = export(find_run(run, folder.expanduser()), what, size, seed)
        print(f"{Draw.load(place).size} pairs in {place}: sheet.csv, or tasks.json with view.xml for Label Studio")
        print(f"when they are answered: prefect run audit-import --run {run} --files FILE … --rater NAME")


def audit_import(
    *,
    run: str,
    files: Annotated[list[Path], Parameter(consume_multiple=True, negative=())],
    rater: str = "",
    folder: Path = Path("runs"),
) -> None:
    """Take raters' answers back: as human labels that the next student learns from, and as a measure of the annotations.

    Every row is accounted for. Rows that cannot be used are named, and the others count; correct the file and import it
    again. The accuracy and the raters' agreement go to FOLDER/RUN/audit/audit.json, to MLflow (experiment PREFIX/audit) and
    into the report. Answers on another scale than that of the pairs are refused.

    Exit codes: 0 all rows could be used, 1 some were refused, 2 a wrong command or file.

    Parameters
    ----------
    run
        A run, by name or by the path of its folder.
    files
        Sheets that came back, or exports of Label Studio (format JSON).
    rater
        Who answered, for rows that do not say it.
    folder
        Folder that holds all runs.
    """
    with refusals():
        from pipeline.audit.answers import import_answers, summarise
        from pipeline.locks import Busy, exclusive
        from pipeline.report.compare import find_run
        from pipeline.report.page import write_report
        from pipeline.resume import recorded_settings

        place = find_run(run, folder.expanduser())
        imported = import_answers(place, files, recorded_settings(place), rater)
        counts = imported.model_dump(exclude={"refused"}) | {"refused": len(imported.refused)}
        print(", ".join(f"{name} {count}" for name, count in counts.items()))
        for draw in summarise(place):
            print(f"{draw.name}: {draw.answered} of {draw.pairs} pairs answered")
            if (share := draw.accuracy) is not None and share.value is not None:
                covered = "" if share.covered == 1 else f" (of {share.covered:.0%}: the other strata have no answer)"
                print(f"  accuracy of the annotations {share.value:.3f} [{share.low:.3f}, {share.high:.3f}]{covered}")
        if (place / "summary.json").exists():
            try:
                with exclusive(place):  # the stages stay as they are while the page is written
                    print(f"report: {write_report(place)}")
            except Busy as error:
                print(f"the report is not written, a flow does it at its end: {error}")
    if imported.refused:
        print("not used:", *imported.refused, sep="\n  ", file=sys.stderr)
        raise SystemExit(1)
