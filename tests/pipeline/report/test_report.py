"""The report shows what is there, says what is not, and never lets an ad's text become markup."""

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data.contracts import ContractError
from pipeline.artifacts import StageRecord
from pipeline.report.page import TEMPLATES, shell_lines, style_hash, write_report
from pipeline.report.summary import finish_run, number, reproduce_command, stage_rows, summarise
from pipeline.settings import PipelineConfig, load_preset

Fill = Callable[[PipelineConfig, tuple[str, ...]], list[StageRecord]]
ALL = ("data", "teacher", "annotate", "student", "export")


class Page(HTMLParser):
    """Collects what a browser would: tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))  # of SVG, which closes itself

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def written(settings: PipelineConfig, records: list[StageRecord]) -> Page:
    summary = finish_run(settings, "relevance-pipeline", records, [float(i + 1) for i in range(len(records))])
    return Page(Path(summary["report"]).read_text(encoding="utf-8"))


def test_a_whole_run(settings: PipelineConfig, fill: Fill, hostile: str) -> None:
    page = written(settings, fill(settings, ALL))
    assert json.loads((settings.folder / "summary.json").read_text())["stages"]["teacher"]["seconds"] == 2.0
    assert page.open == []
    assert "Left out" not in page.text
    assert hostile in page.text  # shown as text
    assert "{{ 7 * 7 }}" in page.text
    assert "current because" in page.text
    assert "old because" not in page.text
    assert [tag for tag, _ in page.tags].count("figure") == 6 + 4  # teacher, student
    assert page.text.count("teacher: ") == 30 + 19  # examples, and those for a second look (all that differ)
    assert page.text.count("human: 0 bad<b>") == 15 + 19  # half of the examples differ, and all of the others
    assert "--set teacher.seed=3" in page.text
    assert "0.900" in page.text
    assert "0.850 – 0.950" in page.text


def test_nothing_is_executed_or_fetched(settings: PipelineConfig, fill: Fill) -> None:
    page = written(settings, fill(settings, ALL))
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "img", "link", "iframe", "object", "embed", "base", "form", "image", "use"})
    attributes = [(name, value or "") for _, found in page.tags for name, value in found.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "style", "xlink:href")]
    assert {value[:1] for name, value in attributes if name == "href"} == {"#"}
    targets = {value[1:] for name, value in attributes if name == "href"}
    assert targets <= {value for name, value in attributes if name == "id"}
    policy = next(found["content"] for tag, found in page.tags if "http-equiv" in found)
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    assert policy == f"default-src 'none'; style-src '{style_hash(style)}'; base-uri 'none'; form-action 'none'"
    assert f"<style>{style}</style>" in (settings.folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|http", style)


def test_missing_parts_are_said(settings: PipelineConfig, fill: Fill) -> None:
    records = fill(settings, ("data",))
    (settings.folder / "pairs" / "card.json").write_text("{")
    text = written(settings, records).text
    assert text.count("Left out") == 7
    assert "metrics.jsonl is not there yet" in text
    assert "cannot be read" in text


@pytest.mark.parametrize(
    ("missing", "said", "left_out"),
    [
        ("pairs/card.json", "card.json is not there yet", 1),
        ("teacher/metrics.jsonl", "metrics.jsonl is not there yet", 1),
        ("student/evaluation.json", "evaluation.json is not there yet", 1),
        ("export/export.json", "export.json is not there yet", 1),
        ("student/curves.json", "", 0),  # the rest of the part does without
        ("teacher/evaluation.json", "", 0),
        ("annotations/a.parquet", "the stage has not run", 2),  # then there are no examples
    ],
)
def test_a_missing_file_leaves_its_part_out(
    missing: str, said: str, left_out: int, settings: PipelineConfig, fill: Fill
) -> None:
    records = fill(settings, ALL)
    (settings.folder / missing).unlink()
    text = written(settings, records).text
    assert text.count("Left out") == left_out
    assert said in text


def test_what_could_not_be_tracked_is_a_warning(settings: PipelineConfig, fill: Fill, hostile: str) -> None:
    assert "Not in the tracking server" not in written(settings, fill(settings, ("data",))).text
    file = settings.folder / "summary.json"
    summary = json.loads(file.read_text()) | {"untracked": {"data": f"refused {hostile}"}}
    file.write_text(json.dumps(summary))
    assert f"data: refused {hostile}" in Page(write_report(settings.folder).read_text(encoding="utf-8")).text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"no summary\.json"):
        write_report(tmp_path)


def test_text_stands_out_in_both_themes() -> None:
    """WCAG 2: 4.5 to 1 for text on every ground it stands on, 3 to 1 for what is drawn."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    light, dark = [dict(re.findall(r"--(\w+): ([^;]+);", block)) for block in re.findall(r":root \{([^}]*)\}", style)]
    strongest = max(float(share) for share in re.findall(r"rgba\(var\(--shade\), ([.\d]+)\)", style))
    for theme in (light, light | dark):
        ground = {name: _rgb(theme[name]) for name in ("bg", "soft", "warn")}
        shade = [float(part) for part in theme["shade"].split(",")]
        ground["cell"] = [strongest * s + (1 - strongest) * b for s, b in zip(shade, ground["bg"], strict=True)]
        assert min(_contrast(_rgb(theme["fg"]), colour) for colour in ground.values()) >= 4.5
        assert min(_contrast(_rgb(theme[name]), ground[on]) for name in ("dim", "c0") for on in ("bg", "soft")) >= 4.5
        assert min(_contrast(_rgb(theme[f"c{i}"]), ground["bg"]) for i in range(5)) >= 3


def _rgb(colour: str) -> list[float]:
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    return [float(int(digits[i : i + 2], 16)) for i in (0, 2, 4)]


def _contrast(a: list[float], b: list[float]) -> float:
    def luminance(colour: list[float]) -> float:
        linear = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_a_command_on_several_lines_is_the_same_words() -> None:
    command = shlex.join(["prefect", "run", "x", "--set", "a='b --c\n", "--set", "d=1 --set e"])
    script = f'set -- {shell_lines(command)}\nprintf "%s\\0" "$@"'
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert words == shlex.split(command)
    assert shell_lines(command).count(" \\\n  --set") == 2
    assert shell_lines("prefect run x --preset sample") == "prefect run x --preset sample"


def test_summary_keeps_stages_of_earlier_flows_apart(settings: PipelineConfig, fill: Fill) -> None:
    records = fill(settings, ("data", "teacher"))
    summary = summarise(settings, "data-prepare", records[:1], [2.5])
    assert list(summary["stages"]) == ["data", "teacher"]
    assert not summary["stages"]["teacher"]["in_flow"]
    assert [row[:3] for row in stage_rows(summary)] == [("data", "done", "2.5")]


def test_the_command_makes_the_same_settings(settings: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli import run_app

    wanted = load_preset(
        "cpu-real",
        ["run=mine", "data.max_pool=none", "annotate.engine.kind=openai", 'annotate.engine.urls=["http://a:1/v1"]',
         "spark.extra.spark.a.b=x y", "teacher.prompt.guideline=It's \"so\"", "tracking.log_weights=true"],
    )  # fmt: skip
    seen: list[Any] = []
    monkeypatch.setattr("flows.cli._run", lambda name, given: seen.append((name, given)))
    command = reproduce_command(wanted, "student-export")
    run_app(shlex.split(command)[2:], result_action="return_value")
    assert seen == [("student-export", wanted)]


def test_no_secret_in_summary_or_report(settings: PipelineConfig, fill: Fill) -> None:
    secret = load_preset(
        "sample",
        [f"runs={settings.runs}", "tracking.enabled=false", "spark.extra.spark.hadoop.fs.s3a.secret.key=hunter2"],
    )
    finish_run(secret, "data-prepare", fill(secret, ("data",)), [1.0])
    for name in ("summary.json", "report.html"):
        assert "hunter2" not in (secret.folder / name).read_text(encoding="utf-8")


def test_numbers_are_readable() -> None:
    assert [number(v) for v in (74067, 0.123456, 1e-6, "x", True)] == ["74,067", "0.1235", "1e-06", "x", "True"]
