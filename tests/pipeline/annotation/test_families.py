"""Families of models that users bring, tiny, all the way: warm start, two steps of AGPO, annotation."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from data.contracts import ANNOTATIONS, read_table
from pipeline.annotation.config import AnnotateConfig
from pipeline.annotation.job import annotation_key, sampling_of
from pipeline.annotation.store import take_over
from pipeline.annotation.worker import Job, annotate_partition
from teacher.annotator import open_annotator
from teacher.config import AGPOConfig, EvaluationConfig, PromptConfig, TeacherConfig, WarmStartConfig
from teacher.engines.config import TransformersConfig
from teacher.examples import labelled_rows
from teacher.model import load_tokenizer
from teacher.prompt import load_prompt, opened_answer
from teacher.train import train_teacher
from tests.teacher.conftest import write_pairs
from tests.teacher.families import FAMILIES, make_family

CONFIG = TeacherConfig(
    prompt=PromptConfig(guideline="Grade.", definitions=False, reason=False, max_text_chars=0, attributes=False),
    warm_start=WarmStartConfig(examples=16, min_steps=150, batch_size=8, learning_rate=5e-3, reasons="none"),
    agpo=AGPOConfig(steps=2, group_size=2, prompts_per_step=2, learning_rate=1e-6),
    evaluation=EvaluationConfig(examples=4, every=0, samples=1, base=False, test=False),
    max_completion_tokens=32,
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.mark.e2e
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_trained_and_annotates(name: str, tmp_path: Path, pairs: Path) -> None:
    train_teacher(CONFIG, make_family(name, tmp_path / "base"), pairs, tmp_path / "out")
    teacher, annotations = tmp_path / "out" / "model", tmp_path / "annotations"
    config = AnnotateConfig(n=1, temperature=0, max_in_flight=8, engine=TransformersConfig())
    prompt, tokenizer = load_prompt(teacher), load_tokenizer(teacher)
    sampling = sampling_of(config, prompt, tokenizer)
    key = annotation_key(teacher, config)
    (tmp_path / "annotations").mkdir()
    job = Job(
        *(key, str(teacher), str(annotations), take_over(annotations), config, sampling, 1),
        load=lambda job: open_annotator(Path(job.teacher), job.config.engine),
    )
    learned = labelled_rows(pairs, "train", 16, CONFIG.seed)
    batch = pa.RecordBatch.from_pylist([row | {"attributes": None} for row in learned])
    assert [each.to_pydict() for each in annotate_partition(job, [batch])] == [{"rows": [16]}]
    rows = {row["pair_id"]: row for row in read_table(annotations, ANNOTATIONS).to_pylist()}
    assert {(row["status"], row["completion_tokens"]) for row in rows.values()} == {("ok", 1)}
    # The teacher has learned to begin and end an answer, as the engine and the reader understand it; and says by itself what
    # it was asked to complete.
    annotator = open_annotator(teacher, config.engine)
    opening = len(opened_answer(prompt, tokenizer))
    whole = [ids[:-opening] for ids in annotator.prompts(batch.to_pylist())]
    said = annotator.engine.generate(whole, replace(sampling, max_tokens=CONFIG.max_completion_tokens))
    same = [
        (annotator.reader.read(completion), rows[row["pair_id"]])
        for (completion,), row in zip(said, learned, strict=True)
    ]
    answered = [(sample, row) for sample, row in same if sample.grade is not None]
    assert len(answered) >= 8
    for sample, row in answered:
        assert sample.grade == row["grade"]
        assert sample.probs == pytest.approx(row["grade_probs_raw"], abs=1e-4)
