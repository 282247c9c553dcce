"""What a teacher learns from beside grades: texts, and ratings between two grades."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import PAIRS, TEXTS, GradeScale, MetricsLog, rating_targets, read_table
from data.sources.synthetic import catalogue
from teacher.config import PromptConfig, WarmStartConfig
from teacher.engines.base import Sampling
from teacher.engines.transformers_engine import TransformersEngine
from teacher.examples import Example, load_examples, load_texts
from teacher.model import load_model
from teacher.prompt import Prompt
from teacher.reading import AnswerReader
from teacher.train import train_teacher
from teacher.verifier import ANSWER
from teacher.warm_start import warm_start

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


def test_a_rating_between_two_grades_makes_both_answers_right_in_part(with_texts, decoder, tmp_path):
    rows = read_table(with_texts / "pairs", PAIRS).to_pylist()
    for place, row in enumerate(rows):
        row["grade_raw"] += 0.4 * (place % 2)  # by every other rater
    (tmp_path / "pairs").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), tmp_path / "pairs" / "part.parquet")
    shutil.copyfile(with_texts / "scale.json", tmp_path / "scale.json")
    scale, tokenizer = GradeScale.load(tmp_path), load_model(decoder, TINY)[1]

    def load(prompt, **options):
        return load_examples(tmp_path, "train", Prompt(prompt, scale, 32), tokenizer, 1000, 0, **options)

    soft = load(PromptConfig(reason=False), ratings=True)
    assert [replace(example, other_targets=(), other_shares=()) for example in soft] == load(PromptConfig(reason=False))
    rated = {row["pair_id"]: (row["grade"], row["grade_raw"]) for row in rows}
    grades, ratings = (np.array(column) for column in zip(*(rated[example.pair_id] for example in soft), strict=True))
    for example, target in zip(soft, rating_targets(grades, ratings, scale.size), strict=True):
        others = {ANSWER.format(grade=k): share for k, share in enumerate(target) if share and k != example.gold}
        assert dict(zip(example.other_targets, example.other_shares, strict=True)) == others
    assert 5 < sum(bool(example.other_targets) for example in soft) < len(soft)
    # A reason speaks for one grade.
    assert not any(example.other_targets for example in load(PromptConfig(), ratings=True))
    warm = TINY.warm_start.model_copy(update={"soft_grades": True, "reasons": "none"})
    prompt = TINY.prompt.model_copy(update={"reason": False})
    (out := tmp_path / "teacher").mkdir()
    train_teacher(TINY.model_copy(update={"warm_start": warm, "prompt": prompt}), decoder, tmp_path, out)
    assert len(MetricsLog(out / "metrics.jsonl").read("agpo")) == TINY.agpo.steps


@pytest.mark.parametrize("shared", [True, False])
def test_a_warm_start_learns_the_shares_of_several_answers(shared, decoder, tmp_path):
    model, tokenizer = load_model(decoder, TINY)
    examples = [
        Example(f"grade {word}<|assistant|>", 1, "<answer>1</answer>", "", ("<answer>0</answer>",), (share,))
        for word, share in (("red", 0.5), ("blue", 0.2))
    ]
    warm = WarmStartConfig(examples=2, epochs=150, batch_size=2, learning_rate=5e-3)
    agpo = TINY.agpo.model_copy(update={"shared_prefix": shared})
    config = TINY.model_copy(update={"warm_start": warm, "agpo": agpo})
    log = MetricsLog(tmp_path / "metrics.jsonl")
    warm_start(config, model, tokenizer, examples, tmp_path / "out", log)
    reader, engine = AnswerReader(tokenizer, 2), TransformersEngine(model, tokenizer)
    ids = [tokenizer(example.prompt, add_special_tokens=False)["input_ids"] for example in examples]
    sampling = Sampling(n=1, temperature=0.0, max_tokens=20, seed=0, logprobs=5)
    for (completion,), share in zip(engine.generate(ids, sampling), (0.5, 0.2), strict=True):
        assert reader.read(completion).probs == pytest.approx((share, 1 - share), abs=0.05)
    # The mean over pairs of a mean over tokens, of which one is undecided: its entropy is left.
    tokens = len(tokenizer("<answer>1</answer>", add_special_tokens=False)["input_ids"]) + 1
    undecided = np.mean([-(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in (0.5, 0.2)])
    assert log.read("warm_start")[-1]["loss"] == pytest.approx(undecided / tokens, rel=0.25)
