"""What raters get and give back: a spreadsheet (CSV), or the tasks of Label Studio with a labelling view.

The texts of ads and queries are hostile input, and spreadsheets run what begins like a formula: such a cell gets an
apostrophe in front, and control characters go. A spreadsheet may come back with another separator or encoding, with its rows
and columns in another order, and without the columns that nobody needs: only `id` and `grade` are read, `rater` and `note`
if they are there. The id is text that no program takes for a number or a date.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from data.contracts import ContractError, GradeScale, write_json, write_text

Row = dict[str, Any]
TEXTS = ("query", "ad_title", "ad_text", "attributes")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


@dataclass(frozen=True)
class Answer:
    """One row of a file: `grade` as it was written, empty where it was not answered; `line` is its place in the file."""

    file: str
    line: int
    id: str
    grade: str
    rater: str
    note: str
    labelled_at: datetime | None = None
    fault: str = ""
    """Why the row cannot be read."""


def write_sheet(path: Path, rows: list[Row], shown: tuple[str, ...] = ()) -> None:
    """Write rows (id, `TEXTS` and the columns `shown`) as CSV (UTF-8 with its mark), complete or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(["id", *TEXTS, *shown, "grade", "note", "rater"])
    for row in rows:
        writer.writerow([cell(row[name]) for name in ("id", *TEXTS, *shown)] + ["", "", ""])
    write_text(path, "\ufeff" + text.getvalue())


def write_label_studio(folder: Path, rows: list[Row], scale: GradeScale, shown: tuple[str, ...] = ()) -> None:
    """Write `tasks.json`, to import into a project of Label Studio, and `view.xml`, its labelling interface."""
    names = ("id", *TEXTS, *shown)
    write_json(folder / "tasks.json", [{"data": {name: row[name] or "" for name in names}} for row in rows])
    texts = [
        f'  <Header value="{name.replace("_", " ")}" size="5"/>\n  <Text name="{name}" value="${name}"/>'
        for name in (*TEXTS, *shown)
    ]
    choices = [
        f"    <Choice value={quoteattr(f'{number} {grade.name}')} hint={quoteattr(grade.definition)}/>"
        for number, grade in enumerate(scale.grades)
    ]
    choosing = '  <Choices name="grade" toName="query" choice="single-radio" required="true">'
    note = '  <TextArea name="note" toName="query" placeholder="note" maxSubmissions="1"/>'
    write_text(
        folder / "view.xml", "\n".join(["<View>", *texts, choosing, *choices, "  </Choices>", note, "</View>", ""])
    )


def read_answers(path: Path, rater: str = "") -> list[Answer]:
    """The rows of a sheet, or of Label Studio's export (format JSON). `rater` stands for a missing or empty column.

    Raises `ContractError` for a file that cannot be read, or has no column `id` or `grade`.
    """
    try:
        text = _decoded(path.read_bytes())
    except OSError as error:
        raise ContractError(f"{path} cannot be read ({error.strerror}); name the file that came back") from None
    return _label_studio(path, text, rater) if text.lstrip()[:1] in ("[", "{") else _sheet(path, text, rater)


def grade_of(text: str, scale: GradeScale) -> int:
    """The grade that a person wrote: its number, its name, or both; raises `ValueError` with the reason for another text.

    >>> from data.contracts import Grade
    >>> scale = GradeScale(grades=[Grade(name=n, definition=n) for n in ("no", "Yes")], relevant_from=1)
    >>> [grade_of(text, scale) for text in ("1", "1.0", "1,0", " yes ", "0 no")]
    [1, 1, 1, 1, 0]
    """
    meant: dict[str, set[int]] = {}
    for number, grade in enumerate(scale.grades):
        written = (str(number), f"{number}.0", f"{number},0", grade.name, f"{number} {grade.name}")
        for name in written:
            meant.setdefault(name.casefold(), set()).add(number)
    numbers = meant.get(" ".join(text.split()).casefold(), set())
    if not numbers:
        raise ValueError(f"the grade {text[:40]!a} is none of 0 … {scale.size - 1}, nor a name of the scale")
    if len(numbers) > 1:  # names that are numbers
        either = " or ".join(f"'{number} {scale.grades[number].name}'" for number in sorted(numbers))
        raise ValueError(f"the grade {text[:40]!a} is the number of one grade and the name of another; write {either}")
    return numbers.pop()


def cell(value: Any) -> str:
    """A value as the text of a cell that no spreadsheet takes for a formula; numbers of ours are no text.

    >>> cell("=HYPERLINK(1)"), cell(" +1"), cell(-0.5), cell(None)
    ("'=HYPERLINK(1)", "' +1", '-0.5', '')
    """
    if value is None:
        return ""
    if isinstance(value, int | float):
        return str(value)
    text = "".join(c if unicodedata.category(c) not in ("Cc", "Cf", "Cs") else " " for c in str(value))
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def _decoded(content: bytes) -> str:
    """Text in UTF-8 or UTF-16 with or without its mark, else in the code page of a Western Windows."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _sheet(path: Path, text: str, rater: str) -> list[Answer]:
    skipped = 1 if text.lower().startswith("sep=") else 0  # a first line that tells the separator
    lines = io.StringIO("".join(text.splitlines(keepends=True)[skipped:]), newline="")
    first = lines.readline()
    separator = max(",;\t|", key=first.count)
    header = [name.strip().lower() for name in next(csv.reader([first], delimiter=separator), [])]
    for name in ("id", "grade"):
        if header.count(name) != 1:
            found = "is missing" if name not in header else "is there twice"
            raise ContractError(f"{path}: the column '{name}' {found}; it is needed as audit-export wrote it")
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # an ad's text may be longer than the default
    reader = csv.reader(lines, delimiter=separator)
    answers, line = [], 2 + skipped
    for cells in reader:
        if any(each.strip() for each in cells):
            row = {name: value.strip() for name, value in zip(header, cells, strict=False)}
            fault = "it has more cells than the header" if any(cells[len(header) :]) else ""
            fault = fault or ("it has no id" if not row.get("id") else "")
            who = row.get("rater") or rater
            answers.append(
                Answer(str(path), line, row.get("id", ""), row.get("grade", ""), who, row.get("note", ""), None, fault)
            )
        line = 2 + skipped + reader.line_num
    return answers


def _label_studio(path: Path, text: str, rater: str) -> list[Answer]:
    try:
        tasks = json.loads(text)
        return [answer for line, task in enumerate(tasks, 1) for answer in _task_answers(str(path), line, task, rater)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContractError(
            f"{path} is no export of Label Studio in the format JSON ({type(error).__name__}: {error}); export it so"
        ) from None


def _task_answers(file: str, line: int, task: Row, rater: str) -> list[Answer]:
    id_, answers = str(task["data"]["id"]), []
    for annotation in task["annotations"]:
        by = annotation.get("completed_by", "")
        who = rater or str(by.get("email") or by.get("id") if isinstance(by, dict) else by)
        given = {part["from_name"]: part["value"] for part in annotation["result"]}
        grade = "" if annotation.get("was_cancelled") else " ".join(given.get("grade", {}).get("choices", []))
        note = " ".join(given.get("note", {}).get("text", []))
        at = annotation.get("updated_at") or annotation.get("created_at")
        when = datetime.fromisoformat(at).astimezone(UTC) if at else None
        answers.append(Answer(file, line, id_, grade, who, note, when))
    return answers or [Answer(file, line, id_, "", rater, "")]
