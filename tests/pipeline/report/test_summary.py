"""What a reader gets whatever the run: readable text and numbers, and the command that makes the run again."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from data.contracts import ContractError
from pipeline.report.page import TEMPLATES, shell_lines, write_report
from pipeline.report.summary import reproduce_command
from pipeline.settings import PipelineConfig, build_settings, load_preset


def test_text_stands_out_in_both_themes() -> None:
    """WCAG 2: 4.5 to 1 for text on every ground it stands on, 3 to 1 for what is drawn."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    light, dark = [dict(re.findall(r"--(\w+): ([^;]+);", block)) for block in re.findall(r":root \{([^}]*)\}", style)]
    strongest = 0.42  # of the shade in a confusion matrix
    for theme in (light, light | dark):
        ground = {name: to_rgb(theme[name]) for name in ("bg", "soft", "warn")}
        shade = [float(part) / 255 for part in theme["shade"].split(",")]
        ground["cell"] = [strongest * s + (1 - strongest) * b for s, b in zip(shade, ground["bg"], strict=True)]
        assert min(_contrast(to_rgb(theme["fg"]), colour) for colour in ground.values()) >= 4.5
        assert min(_contrast(to_rgb(theme[name]), ground[on]) for name in ("dim", "c0") for on in ("bg", "soft")) >= 4.5
        assert min(_contrast(to_rgb(theme[f"c{i}"]), ground["bg"]) for i in range(5)) >= 3


def _contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    def luminance(colour: tuple[float, ...]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"no summary\.json"):
        write_report(tmp_path)


def test_a_command_on_several_lines_is_the_same_words() -> None:
    command = shlex.join(["prefect", "run", "x", "--set", "a='b --c\n", "--set", "d=1 --set e"])
    script = f'set -- {shell_lines(command)}\nprintf "%s\\0" "$@"'
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert words == shlex.split(command)
    assert shell_lines(command).count(" \\\n  --set") == 2


def again(settings: PipelineConfig) -> tuple[str, PipelineConfig]:
    """The flow and the settings of the command that makes a run of `student-export` again."""
    from flows.cli import Options, chosen

    prefect, verb, flow, *words = shlex.split(reproduce_command(settings, "student-export"))
    assert (prefect, verb) == ("prefect", "run")
    given = dict(zip(words[0::2], words[1::2], strict=True))
    overrides = tuple(value for option, value in zip(words[0::2], words[1::2], strict=True) if option == "--set")
    return chosen(flow, Options(preset=given.get("--preset", ""), name=given.get("--name", ""), set_=overrides))


def test_the_command_makes_the_same_settings() -> None:
    settings = load_preset(
        "cpu-real",
        ["run=mine", "data.max_pool=none", "annotate.engine.kind=openai", 'annotate.engine.urls=["http://a:1/v1"]',
         "spark.extra.spark.a.b=x y", "teacher.prompt.guideline=It's \"so\"", "tracking.log_weights=true",
         'annotate.engine.served_model=" none "', 'spark.extra.spark.c=["a"]x', 'spark.extra.spark.d="\\t"',
         'spark.extra.spark.e="none"', 'spark.extra.spark.f="3"'],
    )  # fmt: skip
    assert again(settings) == ("student-export", settings)


@pytest.mark.parametrize(
    "name",
    [
        "a=b", "=", 'say "a=b"', '"a" = 1', 'x."a"', '"', "it's", "a.b", "a b", " a", "a ", "", "None", "a\nb", "\\", '\\"=',
        "grün", "日本=語", "$HOME", "{a}", "[1]", "#", "--set",
    ],
)  # fmt: skip
def test_the_command_keeps_the_names_in_tables_whose_names_are_free(name: str) -> None:
    grades = [{"name": "a", "definition": "d"}, {"name": "b", "definition": "d"}]
    table = {"path": "x.csv", "columns": {"query": "q", "ad_title": "a=b", "grade": "g"}, "grades": grades}
    settings = build_settings(
        {
            "data": table | {"grade_labels": {name: 1, "other": 0}},
            "spark": {"extra": {name: "x=y", f"spark.{name}": "2"}},
            "teacher": {"prompt": {"chat_template_kwargs": {"enable_thinking": True, name: {"b.c": {"d": None}}}}},
        }
    )
    assert again(settings) == ("student-export", settings)
