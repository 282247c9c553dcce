"""What a teacher learns from: how often each grade is shown, and texts beside labels."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.contracts import TEXTS, GradeScale
from data.sources.synthetic import catalogue
from teacher.config import PromptConfig
from teacher.examples import Example, evenly, labelled_rows, load_texts
from teacher.model import load_model
from teacher.prompt import Prompt
from teacher.train import train_teacher

from .conftest import write_pairs
from .test_trainer import TINY


@pytest.fixture(scope="module")
def with_texts(tmp_path_factory):
    folder = write_pairs(tmp_path_factory.mktemp("with_texts"), rows=60)
    (folder / "texts").mkdir()
    rows = [{"text": "Trainers are shoes."}, *list(catalogue(0))[:5]]
    pq.write_table(pa.Table.from_pylist(rows, schema=TEXTS), folder / "texts" / "part.parquet")
    return folder


def test_texts_have_no_label_and_those_of_a_query_and_an_ad_are_asked_for_as_in_a_pair(with_texts, pairs, decoder):
    prompt = Prompt(PromptConfig(), GradeScale.load(with_texts), 32)
    tokenizer = load_model(decoder, TINY)[1]
    plain, *asked = load_texts(with_texts, prompt, tokenizer, 4)
    assert (plain.prompt, plain.target, plain.gold) == ("", "Trainers are shoes.", None)
    assert len(asked) == 3
    assert all("Query: " in example.prompt and "Ad: " in example.prompt for example in asked)
    assert not any("<answer>" in example.target for example in asked)
    assert load_texts(pairs, prompt, tokenizer, 4) == []


def test_a_warm_start_reads_texts_and_repeats_labels(with_texts, decoder, tmp_path):
    warm = TINY.warm_start.model_copy(update={"texts": 6, "repeats": 2, "examples": 8, "epochs": 2.0, "batch_size": 2})
    agpo = TINY.agpo.model_copy(update={"steps": 0})
    train_teacher(TINY.model_copy(update={"warm_start": warm, "agpo": agpo}), decoder, with_texts, tmp_path)
    steps = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"warm_start"' in line]
    assert '"step": 22' in steps[-1]  # 2 passes over 8 × 2 + 6 examples, two at a time


@given(st.lists(st.integers(0, 3), max_size=40))
def test_evenly_shows_every_grade_as_often_as_the_commonest_and_leaves_no_example_out(grades):
    examples = [Example(f"prompt {i}", grade, "", str(i)) for i, grade in enumerate(grades)]
    counts = Counter(example.gold for example in evenly(examples))
    assert counts == dict.fromkeys(grades, max(Counter(grades).values(), default=0))
    shown = Counter(example.pair_id for example in evenly(examples))
    assert shown.keys() == {example.pair_id for example in examples}
    of_a_grade = [[shown[example.pair_id] for example in examples if example.gold == grade] for grade in counts]
    assert all(max(times) - min(times) <= 1 for times in of_a_grade)


def test_agpo_draws_from_all_grades_alike_where_it_is_asked_to(pairs, decoder, tmp_path, caplog):
    caplog.set_level("INFO")
    labelled = labelled_rows(pairs, "train", 10**9, 0)
    grades = Counter(row["grade"] for row in labelled)
    assert len(set(grades.values())) > 1
    agpo = TINY.agpo.model_copy(update={"steps": 1, "even_grades": True})
    train_teacher(TINY.model_copy(update={"agpo": agpo}), decoder, pairs, tmp_path)
    assert f"agpo: {len(grades) * max(grades.values())} examples" in caplog.text
