"""Reasons of a model: which are kept, which are dropped and why; nothing is asked twice; the teacher learns from them."""

import itertools
import json
import re
from collections import Counter
from math import log
from typing import ClassVar

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import REASONS, ContractError, read_table
from pipeline.report.page import TEMPLATES
from pipeline.report.sections.teacher import teacher_section
from pipeline.report.text import interval, number
from teacher import reasons
from teacher.config import PromptConfig, WarmStartConfig
from teacher.engines.base import Completion, Engine
from teacher.engines.config import ServerConfig, TransformersConfig
from teacher.examples import labelled_rows
from teacher.model import load_tokenizer
from teacher.rationale import compare_words, lexical_rationale
from teacher.reason_text import says_nothing
from teacher.train import train_teacher
from tests.teacher.conftest import write_pairs
from tests.teacher.test_trainer import TINY

ASKED = 100
CONFIG = TINY.model_copy(
    update={
        "warm_start": WarmStartConfig(examples=ASKED, epochs=0.2, batch_size=8, reasons="self", reason_samples=2),
        "max_completion_tokens": 40,
    }
)

FEW = CONFIG.model_copy(update={"warm_start": CONFIG.warm_start.model_copy(update={"examples": 12})})


class ScriptedEngine(Engine):
    """A made-up model: what it gives as a reason depends on the grade in the prompt, and its grade on the reason alone."""

    max_model_len = 400
    dies_after = 10**9
    finish = "stop"
    says: ClassVar = {
        "The right grade is 2": ["Because of rule 9, QUERY\nGrade: 1"],
        "The right grade is 1": ["It is alike, as the hint has it, QUERY <answer>1</answer>"],
        "The right grade is 0": ["It is something else than QUERY <answer>0</answer>"],
        "Query:": ["Same product as QUERY <answer>0</answer>", "The same QUERY"],
    }
    grades: ClassVar = {
        "Same product": (3, 0.6), "The same": (3, 0.9), "Because of rule 9": (2, 0.8), "It is alike": (1, 0.9), "": (3, 0.5),
    }  # fmt: skip

    def __init__(self, tokenizer):
        self._tokenizer, self._queue = tokenizer, []
        self.asked, self.waiting = [], []

    def submit(self, tag, prompt, sampling):
        self._queue.append((tag, prompt, sampling))

    def finished(self):
        if len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.waiting.append(len(self._queue))
        batch, self._queue = self._queue[:8], self._queue[8:]
        self.asked += batch
        return [(tag, self._complete(prompt, sampling)) for tag, prompt, sampling in reversed(batch)]

    def _complete(self, prompt, sampling):
        text = self._tokenizer.decode(prompt)
        if sampling.temperature:
            assert text.endswith("reason:")
            said = next(said for part, said in self.says.items() if part.lower() in text)
            query = re.search(r"query: (.*)", text).group(1)
            texts = [said[i % len(said)].replace("QUERY", query) for i in range(sampling.n)]
            return [Completion(each, [5], self.finish) for each in texts]
        assert text.endswith(" <answer>")
        assert "right grade" not in text  # the reason must do without the hint
        grade, probability = next(led for part, led in self.grades.items() if part.lower() in text)
        chosen, other = (self._tokenizer.convert_tokens_to_ids(str(each)) for each in (grade, (grade + 1) % 4))
        return [Completion(str(grade), [chosen], "length", [{chosen: log(probability), other: log(1 - probability)}])]

    def cancel(self):
        self._queue = []

    def close(self): ...


@pytest.fixture
def scripted(monkeypatch, decoder):
    engine = ScriptedEngine(load_tokenizer(decoder))
    monkeypatch.setattr(reasons, "open_engine", lambda config, model: engine)
    return engine


def collect(decoder, pairs, out, config=CONFIG):
    """The rows, with QUERY for a pair's own query, and the funnel."""
    reasons.collect_reasons(config, decoder, decoder, pairs, out, out.parent / "cache")
    queries = {row["pair_id"]: row["query"].lower() for row in labelled_rows(pairs, "train", ASKED, config.seed)}
    rows = read_table(out / "reasons.parquet", REASONS).to_pylist()
    for row in rows:
        row["reasoning"] = row["reasoning"] and row["reasoning"].replace(queries[row["pair_id"]], "QUERY")
    return rows, json.loads((out / "reasons.json").read_text())


def test_a_reason_is_kept_if_it_leads_to_the_human_grade_by_itself(scripted, decoder, pairs, tmp_path):
    rows, funnel = collect(decoder, pairs, tmp_path / "out")
    human = Counter(row["grade"] for row in labelled_rows(pairs, "train", ASKED, CONFIG.seed))
    outcomes = {(row["grade"], row["outcome"], row["reasoning"], row["dropped"]) for row in rows}
    assert outcomes == {
        (3, "right", "The same QUERY", ""),  # the likelier of two that lead there, whatever they state
        (2, "hinted", "Because of rule 9, QUERY", ""),
        (1, "dropped", None, "names the grade that was given"),
        (0, "dropped", None, "the reason alone leads elsewhere"),
    }
    assert (funnel["asked"], funnel["right"], funnel["hinted"]) == (ASKED, human[3], human[2])
    assert funnel["dropped_by_reason"] == {
        "names the grade that was given": human[1], "the reason alone leads elsewhere": human[0],
    }  # fmt: skip
    assert sum(row["n_right"] for row in rows) == 2 * human[3]


@pytest.mark.parametrize(
    ("said", "finish", "reason"),
    [
        ("\n QUERY: same product <answer>3</answer>", "stop", "QUERY: same product"),
        ("QUERY: same product. So the grade is:\n3", "stop", "QUERY: same product."),
        ("QUERY: same product of 2 in. length, so the grade is 3.", "length", "QUERY: same product of 2 in. length"),
        ("QUERY: same product (grade = 3), as asked", "stop", "QUERY: same product"),
        ("QUERY: same product. The answer would be a 3, as asked. So", "length", "QUERY: same product."),
        ("QUERY: same product. Size 2 in. fits. And the 3 ft. lo", "length", "QUERY: same product. Size 2 in. fits."),
        ("QUERY: same product of 2 in. leng", "length", "longer than max_completion_tokens"),
        (f"QUERY: same product {'and more ' * 40}", "stop", "longer than max_completion_tokens"),
        ("<answer>3</answer> QUERY: same product", "stop", "no reason"),
        ("The grade is 3, as it is QUERY", "stop", "no reason"),
        ("Same product of the right kind", "stop", "says nothing of the pair"),
    ],
)
def test_a_reason_ends_before_the_answer_and_with_a_sentence(
    scripted, decoder, pairs, tmp_path, monkeypatch, said, finish, reason
):
    monkeypatch.setattr(ScriptedEngine, "says", {"grade is 2": ["Because of rule 9, QUERY here."], "": [said]})
    monkeypatch.setattr(ScriptedEngine, "finish", finish)
    rows, _ = collect(decoder, pairs, tmp_path / "out", FEW)
    assert {row["reasoning"] or row["dropped"] for row in rows if row["grade"] == 3} == {reason}


def test_the_grade_of_a_bolt_is_no_answer(scripted, decoder, tmp_path, monkeypatch):
    folder = write_pairs(tmp_path)
    table = pq.read_table(file := folder / "pairs" / "part.parquet")
    bolts = pa.array(["grade 8 bolt"] * len(table))
    pq.write_table(table.set_column(table.schema.get_field_index("query"), table.schema.field("query"), bolts), file)
    monkeypatch.setattr(ScriptedEngine, "says", {"": ["Same product: a grade 8 bolt, so its grade is 3."]})
    rows, _ = collect(decoder, folder, tmp_path / "out", FEW)
    assert {row["reasoning"] for row in rows if row["grade"] == 3} == {"Same product: a QUERY"}


@pytest.mark.parametrize(
    ("engine", "chunks"),
    [
        (TransformersConfig(batch_size=160), [80, 20]),
        (TransformersConfig(batch_size=8), [64, 36]),
        (ServerConfig(urls=("http://localhost:1/v1",)), [64, 36]),
    ],
)
def test_the_pairs_of_a_chunk_fill_the_engine(scripted, decoder, pairs, tmp_path, engine, chunks):
    warm_start = CONFIG.warm_start.model_copy(update={"reason_engine": engine})
    collect(decoder, pairs, tmp_path / "out", CONFIG.model_copy(update={"warm_start": warm_start}))
    submitted = [now for before, now in itertools.pairwise([0, *scripted.waiting]) if now > before]
    # Of each chunk the pairs, their reasons to verify, and the same of those that are asked with a hint.
    assert submitted[0::4] == chunks
    assert submitted[1::4] == [2 * size for size in chunks]


def test_nothing_is_asked_twice(scripted, decoder, pairs, tmp_path):
    ScriptedEngine.dies_after = 400
    with pytest.raises(KeyboardInterrupt):
        collect(decoder, pairs, tmp_path / "out")
    ScriptedEngine.dies_after = 10**9
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == 1
    before = len(scripted.asked)
    rows, funnel = collect(decoder, pairs, tmp_path / "out")
    scripted.asked.clear()
    elsewhere, _ = collect(decoder, pairs, tmp_path / "elsewhere")
    assert elsewhere == rows
    assert not scripted.asked
    undisturbed, same = collect(decoder, pairs, tmp_path / "cold" / "out")
    assert (undisturbed, same) == (rows, funnel)
    assert before < len(scripted.asked)


@pytest.mark.parametrize("fault", ["short", "broken", "broken while it verifies"])
def test_what_the_engine_did_not_answer_is_asked_again(scripted, decoder, pairs, tmp_path, monkeypatch, fault):
    undisturbed = collect(decoder, pairs, tmp_path / "cold" / "out", FEW)
    with monkeypatch.context() as patched:
        if fault == "short":
            patched.setattr(ScriptedEngine, "max_model_len", 48)
        else:
            complete = ScriptedEngine._complete

            def broken(self, prompt, sampling):
                answer = complete(self, prompt, sampling)
                return RuntimeError("no connection") if fault == "broken" or sampling.max_tokens == 1 else answer

            patched.setattr(ScriptedEngine, "_complete", broken)
        why = "longer than its max_model_len, 48" if fault == "short" else "no connection"
        with pytest.raises(ContractError, match=rf"12 × the engine could not .*{why}.*reason_engine"):
            collect(decoder, pairs, tmp_path / "out", FEW)
    assert collect(decoder, pairs, tmp_path / "out", FEW) == undisturbed


def test_an_anchor_learns_the_reasons_of_the_warm_start(scripted, decoder, pairs, tmp_path, monkeypatch):
    given = []

    def spy(config, model, tokenizer, problems, *more):
        given.extend(problems)
        raise KeyboardInterrupt

    monkeypatch.setattr("teacher.train.train_policy", spy)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(CONFIG, decoder, pairs, tmp_path, cache=tmp_path / "cache")
    taught = reasons.read_reasons(tmp_path)
    assert len(given) > len(taught) > 0
    assert all(each.target.startswith(taught.get(each.pair_id, "")) for each in given)


def test_a_reason_that_must_name_a_rule_and_does_not_is_dropped(scripted, decoder, pairs, tmp_path):
    prompt = PromptConfig(guideline="Grade.", rules=tuple("abcdefghi"), name_rule=True, definitions=False)
    rows, _ = collect(decoder, pairs, tmp_path / "out", CONFIG.model_copy(update={"prompt": prompt}))
    outcomes = {(row["grade"], row["outcome"], row["dropped"]) for row in rows}
    assert (2, "hinted", "") in outcomes
    assert {outcome for grade, outcome, _ in outcomes if grade != 2} == {"dropped"}
    assert "names no rule" in {dropped for _, _, dropped in outcomes}


@pytest.mark.parametrize(
    ("query", "title", "sound", "empty"),
    [
        ("红色跑鞋", "耐克女子红色跑鞋 轻便", "用户要红色的跑鞋,广告正是", "广告与查询相符"),
        ("赤い靴", "ランニングシューズ 赤", "赤いシューズなので近い", "関係があります"),
        ("빨간 운동화", "나이키 운동화 빨강", "운동화는 맞지만 색이 다르다", "서로 관련이 있다"),
        ("red shoes", "crimson trainers", "trainers are shoes", "it fits well"),
    ],
)
def test_words_are_found_in_scripts_without_spaces(query, title, sound, empty):
    own = f"{query} {title}"
    assert not says_nothing(sound, own, "You grade ads.")
    assert says_nothing(empty, own, "You grade ads.")


def test_what_is_shared_in_a_script_without_spaces_is_seen():
    assert lexical_rationale("红色跑鞋", "耐克女子红色跑鞋 轻便") == "The ad covers 红, 色, 跑, 鞋; it lacks nothing."
    assert compare_words("红鞋 x", "蓝鞋") == (["鞋"], ["红", "x"])


def test_without_any_reason_it_says_what_to_do(scripted, decoder, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(ScriptedEngine, "grades", {"": (9, 0.9)})
    with pytest.raises(ContractError, match=rf"none of {ASKED} pairs got a reason \(.* leads elsewhere.*lexical"):
        collect(decoder, pairs, tmp_path / "out")


def test_the_teacher_learns_from_them_and_the_report_shows_them(scripted, decoder, pairs, tmp_path, monkeypatch):
    learnt = []
    original = train_teacher.__globals__["warm_start"]
    monkeypatch.setattr(
        "teacher.train.warm_start", lambda *given: (learnt.extend(e.target for e in given[3]), original(*given))
    )
    result = train_teacher(CONFIG, decoder, pairs, tmp_path, cache=tmp_path / "cache")
    endings = {("The same ", " <answer>3</answer>"), ("Because of rule 9, ", " <answer>2</answer>")}
    assert all(any(each.startswith(first) and each.endswith(last) for first, last in endings) for each in learnt)
    assert result.figures["reasons/asked"] == ASKED
    assert result.figures["reasons/right"] + result.figures["reasons/hinted"] == len(learnt)
    loader = jinja2.FileSystemLoader(TEMPLATES)
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page.filters |= {"number": number, "interval": interval}
    shown = page.get_template("macros.html").module.teacher(teacher_section(tmp_path, record=None))
    assert "Because of rule 9" in shown
    assert "the reason alone leads elsewhere" in shown
