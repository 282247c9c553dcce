"""Reasons of a model: which are kept, which are dropped and why; nothing is asked twice; the teacher learns from them."""

import json
from collections import Counter

import jinja2
import pytest

from data.contracts import REASONS, ContractError, read_table
from pipeline.report.page import TEMPLATES
from pipeline.report.sections.teacher import teacher_section
from pipeline.report.text import interval, number
from teacher import reasons
from teacher.config import PromptConfig, WarmStartConfig
from teacher.engines.base import Completion, Engine
from teacher.examples import labelled_rows
from teacher.model import load_tokenizer
from teacher.train import train_teacher
from tests.teacher.test_trainer import TINY

ASKED = 100
CONFIG = TINY.model_copy(
    update={
        "warm_start": WarmStartConfig(examples=ASKED, epochs=0.2, batch_size=8, reasons="self", reason_samples=2),
        "max_completion_tokens": 40,
    }
)


class Colleague(Engine):
    """A made-up model: it gives everything grade 3, unless the grade is given; what it then says depends on the grade."""

    max_model_len = 400
    dies_after = 10**9

    def __init__(self, tokenizer):
        self._tokenizer, self._queue = tokenizer, []
        self.asked = []

    def submit(self, tag, prompt, sampling):
        self._queue.append((tag, prompt, sampling))

    def finished(self):
        if len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        batch, self._queue = self._queue[:8], self._queue[8:]
        self.asked += batch
        return [(tag, [self._complete(prompt)] * sampling.n) for tag, prompt, sampling in reversed(batch)]

    def _complete(self, prompt):
        text = self._tokenizer.decode(prompt).lower()
        said = {
            "Because of rule 9": "<answer>2</answer>",
            "It is alike": "<answer>1</answer>",
            "It is something else": "<answer>3</answer>",
            "The right grade is 2": "Because of rule 9 <answer>2</answer>",
            "The right grade is 1": "It is alike, as the right grade is 1 <answer>1</answer>",
            "The right grade is 0": "It is something else <answer>0</answer>",
        }
        answer = next((said[part] for part in said if part.lower() in text), "Same product <answer>3</answer>")
        return Completion(answer, self._tokenizer(answer)["input_ids"], "stop", None)

    def cancel(self):
        self._queue = []

    def close(self): ...


@pytest.fixture
def colleague(monkeypatch, decoder):
    engine = Colleague(load_tokenizer(decoder))
    monkeypatch.setattr(reasons, "open_engine", lambda config, model: engine)
    return engine


def collect(decoder, pairs, out, config=CONFIG):
    reasons.collect_reasons(config, decoder, decoder, pairs, out, out.parent / "cache")
    return read_table(out / "reasons.parquet", REASONS).to_pylist(), json.loads((out / "reasons.json").read_text())


def test_a_reason_is_kept_if_it_leads_to_the_human_grade_by_itself(colleague, decoder, pairs, tmp_path):
    rows, funnel = collect(decoder, pairs, tmp_path / "out")
    human = Counter(row["grade"] for row in labelled_rows(pairs, "train", ASKED, CONFIG.seed))
    outcomes = {(row["grade"], row["outcome"], row["reasoning"], row["dropped"]) for row in rows}
    assert outcomes == {
        (3, "right", "Same product", ""),
        (2, "hinted", "Because of rule 9", ""),
        (1, "dropped", None, "names the grade that was given"),
        (0, "dropped", None, "the reason alone leads elsewhere"),
    }
    assert (funnel["asked"], funnel["right"], funnel["hinted"]) == (ASKED, human[3], human[2])
    assert funnel["dropped_by_reason"] == {
        "names the grade that was given": human[1], "the reason alone leads elsewhere": human[0],
    }  # fmt: skip
    assert sum(row["n_right"] for row in rows) == 2 * human[3]


def test_nothing_is_asked_twice(colleague, decoder, pairs, tmp_path):
    Colleague.dies_after = 200
    with pytest.raises(KeyboardInterrupt):
        collect(decoder, pairs, tmp_path / "out")
    Colleague.dies_after = 10**9
    before = len(colleague.asked)
    rows, funnel = collect(decoder, pairs, tmp_path / "out")
    colleague.asked.clear()
    elsewhere, _ = collect(decoder, pairs, tmp_path / "elsewhere")
    assert elsewhere == rows
    assert not colleague.asked
    undisturbed, same = collect(decoder, pairs, tmp_path / "cold" / "out")
    assert (undisturbed, same) == (rows, funnel)
    assert before < len(colleague.asked)


def test_a_reason_that_must_name_a_rule_and_does_not_is_dropped(colleague, decoder, pairs, tmp_path):
    prompt = PromptConfig(guideline="Grade.", rules=tuple("abcdefghi"), name_rule=True, definitions=False)
    rows, _ = collect(decoder, pairs, tmp_path / "out", CONFIG.model_copy(update={"prompt": prompt}))
    outcomes = {(row["grade"], row["outcome"], row["dropped"]) for row in rows}
    assert (2, "hinted", "") in outcomes
    assert {outcome for grade, outcome, _ in outcomes if grade != 2} == {"dropped"}
    assert "names no rule" in {dropped for _, _, dropped in outcomes}


def test_without_any_reason_it_says_what_to_do(colleague, decoder, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(Colleague, "_complete", lambda self, prompt: Completion("I do not know", [5], "stop", None))
    with pytest.raises(ContractError, match=rf"none of {ASKED} pairs got a reason \({ASKED} × another grade.*lexical"):
        collect(decoder, pairs, tmp_path / "out")


def test_the_teacher_learns_from_them_and_the_report_shows_them(colleague, decoder, pairs, tmp_path, monkeypatch):
    learnt = []
    original = train_teacher.__globals__["warm_start"]
    monkeypatch.setattr(
        "teacher.train.warm_start", lambda *given: (learnt.extend(e.target for e in given[3]), original(*given))
    )
    result = train_teacher(CONFIG, decoder, pairs, tmp_path, cache=tmp_path / "cache")
    assert set(learnt) == {"Same product <answer>3</answer>", "Because of rule 9 <answer>2</answer>"}
    assert result.figures["reasons/asked"] == ASKED
    assert result.figures["reasons/right"] + result.figures["reasons/hinted"] == len(learnt)
    loader = jinja2.FileSystemLoader(TEMPLATES)
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page.filters |= {"number": number, "interval": interval}
    shown = page.get_template("macros.html").module.teacher(teacher_section(tmp_path, record=None))
    assert "Because of rule 9" in shown
    assert "the reason alone leads elsewhere" in shown
