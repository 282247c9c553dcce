"""The annotation job: windows, commits, reruns, bad rows, figures; and once for real, Spark over vLLM."""

import errno
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.schema import ANNOTATIONS, PAIRS, ContractError, Grade, GradeScale, read_table
from pipeline import annotate as job_module
from pipeline import annotate_worker as worker
from pipeline.annotate import annotation_key, clean, drop_failed, missing
from pipeline.annotate_config import AnnotateConfig
from pipeline.annotate_figures import quality, table_figures
from pipeline.annotate_worker import Job, Teacher, annotate_partition, annotate_rows, window_path, windows
from pipeline.votes import AnswerReader
from teacher.engines.base import Completion, EngineConfig, Sampling

SCALE = GradeScale(grades=tuple(Grade(name=f"g{i}", definition="d") for i in range(4)), relevant_from=2)
KEY = "0123456789abcdef"


class CharTokenizer:
    """A made-up tokenizer: one token for each character."""

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join(chr(i) for i in ids)

    def convert_ids_to_tokens(self, token):
        return chr(token)


class FakeEngine:
    """A made-up engine: answers with the grade that the prompt's last character spells."""

    max_model_len = 60

    def __init__(self, refuses=lambda text: False):
        self.calls: list[int] = []
        self.refuses = refuses

    def generate(self, prompts, sampling):
        self.calls.append(len(prompts))
        texts = ["".join(map(chr, prompt)) for prompt in prompts]
        if any(map(self.refuses, texts)):
            raise ValueError("refused")
        return [[self.answer(text[-1]) for _ in range(sampling.n)] for text in texts]

    def answer(self, letter):
        text = f"why <answer>{letter}</answer>"
        return Completion(text, [ord(c) for c in text], "stop", None)

    def close(self): ...


def made_up_teacher(**how) -> Teacher:
    tokenizer = CharTokenizer()
    prompt = SimpleNamespace(ids=lambda tok, query, title, text, attributes: [ord(c) for c in f"{query}|{title}"])
    return Teacher(FakeEngine(**how), tokenizer, prompt, AnswerReader(tokenizer, 4), 4)


def job_for(out: Path, window: int = 4) -> Job:
    sampling = Sampling(n=2, max_tokens=20)
    return Job(KEY, "teacher", str(out), EngineConfig(), sampling, window, engines=1)


def pair(number: int, title: str = "ad 3", query: str | None = None, grade: int | None = None) -> dict:
    return {
        "pair_id": f"p{number:04d}",
        "query": query or f"query {number}",
        "ad_title": title,
        "ad_text": None,
        "attributes": None,
        "grade": grade,
        "grade_raw": None,
        "split": "pool",
        "source": "test",
    }


def batches(rows: list[dict], size: int = 3):
    return pa.Table.from_pylist(rows, schema=PAIRS).to_batches(max_chunksize=size)


def write_pairs(folder: Path, rows: list[dict]) -> Path:
    (folder / "pairs").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), folder / "pairs" / "part.parquet")
    SCALE.save(folder)
    return folder


@pytest.fixture
def loaded(monkeypatch):
    teacher = made_up_teacher()
    monkeypatch.setattr(worker, "load_teacher", lambda job: teacher)
    return teacher


def test_windows_cut_across_batches():
    found = [[row["pair_id"] for row in window] for window in windows(batches([pair(i) for i in range(11)]), 4)]
    assert [len(window) for window in found] == [4, 4, 3]
    assert [name for window in found for name in window] == [f"p{i:04d}" for i in range(11)]


def test_every_window_is_a_file_of_the_contract(tmp_path, loaded):
    summaries = list(annotate_partition(job_for(tmp_path), batches([pair(i) for i in range(10)])))
    assert [batch["rows"][0].as_py() for batch in summaries] == [4, 4, 2]
    assert len(list(tmp_path.glob(f"{KEY}-*.parquet"))) == len(list(tmp_path.iterdir())) == 3
    table = read_table(tmp_path, ANNOTATIONS)
    assert sorted(table["pair_id"].to_pylist()) == [f"p{i:04d}" for i in range(10)]
    row = table.to_pylist()[0]
    assert (row["status"], row["grade"], row["votes"], row["agreement"], row["error"]) == ("ok", 3, [3, 3], 1.0, "")
    assert row["grade_probs"] == [0, 0, 0, 1]
    assert row["reasoning"] == "why"


def test_a_kill_loses_one_window_and_a_retry_repeats_none(tmp_path, loaded, monkeypatch):
    rows = [pair(i) for i in range(12)]
    real, committed = worker.commit, []

    def dying_commit(path, made):
        if len(committed) == 2:
            (path.parent / f"{worker.TEMPORARY}half").write_bytes(b"PAR1 and then the power went")
            raise KeyboardInterrupt
        committed.append(path)
        real(path, made)

    monkeypatch.setattr(worker, "commit", dying_commit)
    with pytest.raises(KeyboardInterrupt):
        list(annotate_partition(job_for(tmp_path), batches(rows)))
    assert read_table(tmp_path, ANNOTATIONS).num_rows == 8  # and the half file is not seen
    clean(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(worker, "commit", real)
    before = {file: file.stat().st_mtime_ns for file in committed}
    loaded.engine.calls.clear()
    list(annotate_partition(job_for(tmp_path), batches(rows)))
    assert loaded.engine.calls == [4]
    assert {file: file.stat().st_mtime_ns for file in committed} == before
    assert Counter(read_table(tmp_path, ANNOTATIONS)["pair_id"].to_pylist()) == {f"p{i:04d}": 1 for i in range(12)}


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    rows = annotate_rows(job_for(tmp_path), made_up_teacher(), [pair(1)])
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ContractError, match=r"disk of .* is full"):
        worker.commit(tmp_path / "x.parquet", rows)
    assert not list(tmp_path.iterdir())


def test_bad_rows_are_rows(tmp_path):
    teacher = made_up_teacher(refuses=lambda text: "bad" in text)
    rows = [pair(i, title="ad 2") for i in range(7)]
    rows[3] = pair(3, title="bad 1")
    rows[4] = pair(4, title="long" * 20)
    rows[5] = pair(5, title="ad 9")
    made = annotate_rows(job_for(tmp_path), teacher, rows)
    assert [row["pair_id"] for row in made] == [row["pair_id"] for row in rows]
    assert [row["status"] for row in made] == ["ok", "ok", "ok", "failed", "failed", "unparsed", "ok"]
    assert made[3]["error"] == "engine: ValueError: refused"
    assert made[4]["error"].startswith("too long: ")
    assert (made[5]["n_unparsed"], made[5]["votes"], made[5]["grade"]) == (2, [], None)
    assert made[5]["error"] == "no grade in 2 samples, of which 0 were cut off at 20 tokens"
    pa.Table.from_pylist(made, schema=ANNOTATIONS).validate(full=True)


def test_a_prompt_that_cannot_be_made_is_a_failed_row(tmp_path):
    teacher = replace(made_up_teacher(), prompt=SimpleNamespace(ids=lambda *_: 1 / 0))
    (made,) = annotate_rows(job_for(tmp_path), teacher, [pair(0)])
    assert (made["status"], made["error"]) == ("failed", "prompt: ZeroDivisionError: division by zero")


def test_an_engine_that_always_fails_stops_the_job(tmp_path):
    with pytest.raises(ContractError, match=r"the engine failed on all 9 prompts of a window: .*refused"):
        annotate_rows(job_for(tmp_path), made_up_teacher(refuses=lambda text: True), [pair(i) for i in range(9)])


def test_equal_prompts_are_generated_once(tmp_path):
    teacher = made_up_teacher()
    made = annotate_rows(job_for(tmp_path), teacher, [pair(i, query="same") for i in range(5)])
    assert teacher.engine.calls == [1]
    assert {(row["pair_id"], row["grade"]) for row in made} == {(f"p{i:04d}", 3) for i in range(5)}


def test_figures_and_fingerprint_do_not_depend_on_the_files(tmp_path, loaded):
    rows = [pair(i, title=f"ad {i % 4}", grade=(i % 4 if i < 6 else 0)) for i in range(8)]
    rows.append(pair(8, title="long" * 20))
    pairs = write_pairs(tmp_path / "data", rows)
    prints = []
    for name, size, order in (("a", 2, 1), ("b", 5, -1)):
        out = tmp_path / name
        out.mkdir()
        list(annotate_partition(job_for(out, window=size), batches(rows[::order])))
        fingerprint, figures, reasons = table_figures(out, KEY, pairs, "pool")
        prints.append(fingerprint)
        assert (figures["pairs"], figures["ok"], figures["failed"], figures["unparsed"]) == (9, 8, 1, 0)
        assert figures["accuracy"] == pytest.approx(6 / 8)
        assert figures["n_graded"] == 8
        assert figures["agreement"] == 1.0
        assert list(reasons.values()) == [1]
    assert prints[0] == prints[1]
    changed = read_table(out, ANNOTATIONS).to_pylist()
    changed[0]["reasoning"] = "another"
    worker.commit(next(out.glob("*.parquet")), changed[:5])
    assert table_figures(out, KEY, pairs, "pool")[0] != prints[0]


def test_quality_by_hand():
    judged = [(0, 0, [0.9, 0.1, 0, 0]), (2, 1, [0.1, 0.5, 0.4, 0]), (3, 3, [0, 0, 0.1, 0.9]), (1, 1, [0.2, 0.8, 0, 0])]
    found = quality(judged, SCALE)
    assert found["accuracy"] == 0.75
    assert found["auc"] == 1.0
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert quality([], SCALE) == {}
    assert "auc" not in quality(judged[:1], SCALE)


def test_failed_rows_are_dropped_to_be_tried_again(tmp_path):
    teacher = made_up_teacher(refuses=lambda text: "bad" in text)
    rows = [pair(0), pair(1, title="bad 1"), pair(2)]
    job = job_for(tmp_path)
    for window in (rows, [pair(3, title="bad 2")]):
        path = window_path(job, [row["pair_id"] for row in window])
        worker.commit(path, annotate_rows(job, teacher, window))
    assert drop_failed(tmp_path, KEY) == 2
    assert sorted(read_table(tmp_path, ANNOTATIONS)["pair_id"].to_pylist()) == ["p0000", "p0002"]
    assert len(list(tmp_path.iterdir())) == 1
    assert drop_failed(tmp_path, KEY) == 0


def make_teacher(pairs: Path, folder: Path) -> Path:
    from teacher.config import PromptConfig
    from teacher.prompt import Prompt, save_prompt
    from teacher.scratch import make_decoder

    make_decoder(pairs, folder, "tiny", 0)
    save_prompt(Prompt(PromptConfig(), SCALE, max_completion_tokens=8), folder, fingerprint="f1")
    return folder


def test_the_key_follows_teacher_prompt_sampling_and_scale(tmp_path):
    pairs = write_pairs(tmp_path / "data", [pair(i) for i in range(5)])
    teacher = make_teacher(pairs, tmp_path / "teacher")
    keys = {annotation_key(teacher, Sampling(n=n, seed=seed)) for n in (1, 2) for seed in (0, 1)}
    keys.add(annotation_key(teacher, Sampling()))
    content = json.loads((teacher / "teacher.json").read_text())
    for change in ({"fingerprint": "f2"}, {"prompt": content["prompt"] | {"guideline": "Be kind."}}):
        (teacher / "teacher.json").write_text(json.dumps(content | change))
        keys.add(annotation_key(teacher, Sampling()))
    (teacher / "teacher.json").write_text(json.dumps(content))
    SCALE.model_copy(update={"relevant_from": 1}).save(teacher)
    keys.add(annotation_key(teacher, Sampling()))
    assert len(keys) == 7  # Sampling() is Sampling(n=1, seed=0)


@pytest.mark.spark
def test_missing_pairs(tmp_path, spark, loaded):
    rows = [pair(i) for i in range(9)]
    rows[8]["split"] = "test"
    pairs, out = write_pairs(tmp_path / "data", rows), tmp_path / "out"
    out.mkdir()
    (out / "_stage.json").write_text("{}")
    config = AnnotateConfig()

    def ids(todo):
        return sorted(row["pair_id"] for row in todo.collect())

    assert ids(missing(spark, config, pairs, out, KEY)[0]) == [f"p{i:04d}" for i in range(8)]
    list(annotate_partition(job_for(out), batches(rows[:4])))
    todo, wanted = missing(spark, config, pairs, out, KEY)
    assert (ids(todo), wanted) == ([f"p{i:04d}" for i in range(4, 8)], 8)
    todo, wanted = missing(spark, AnnotateConfig(limit=5), pairs, out, KEY)
    assert (ids(todo), wanted) == (["p0004"], 5)
    assert missing(spark, config, pairs, out, "f" * 16)[0].count() == 8  # another key: all again
    with pytest.raises(ContractError, match=r"split 'valid' .* has no pairs"):
        missing(spark, AnnotateConfig(split="valid"), pairs, out, KEY)


@pytest.mark.spark
@pytest.mark.vllm
def test_spark_over_vllm_and_nothing_to_do_afterwards(tmp_path, spark, monkeypatch):
    rows = [pair(i, title=f"red shoes {i}", grade=i % 4) for i in range(7)]
    pairs = write_pairs(tmp_path / "data", rows)
    teacher = make_teacher(pairs, tmp_path / "teacher")
    out = tmp_path / "annotations"
    config = AnnotateConfig(n=2, window=3, engine=EngineConfig(max_model_len=512, max_num_seqs=8))
    made = job_module.annotate(config, teacher, pairs, out, spark)
    table = read_table(out, ANNOTATIONS)
    assert sorted(table["pair_id"].to_pylist()) == [row["pair_id"] for row in rows]
    # An untrained model cannot answer: its completions are cut off or rubbish, and counted as that.
    assert set(table["status"].to_pylist()) <= {"unparsed", "ok"}
    assert made.figures["n_new"] == 7
    assert made.figures["pairs"] == 7
    assert made.figures["unparsed"] >= 5
    assert made.figures["completion_tokens"] > 0
    assert json.loads((out / "_annotations.json").read_text())["annotation_key"] == made.figures["annotation_key"]
    files = sorted(out.iterdir())

    def no_engine(*_):
        raise AssertionError("an engine was started for nothing")

    monkeypatch.setattr(job_module, "_run", no_engine)
    again = job_module.annotate(config, teacher, pairs, out, spark)
    assert again.fingerprint == made.fingerprint
    assert (again.figures["n_new"], again.figures["n_reused"]) == (0, 7)
    assert sorted(out.iterdir()) == files


@pytest.mark.spark
def test_too_many_failures_fail_the_job_after_committing(tmp_path, spark):
    rows = [pair(i, title="word " * 200) for i in range(3)]
    pairs = write_pairs(tmp_path / "data", rows)
    teacher = make_teacher(pairs, tmp_path / "teacher")
    out = tmp_path / "annotations"
    config = AnnotateConfig(n=1, engine=EngineConfig(kind="transformers", max_model_len=64))
    for _ in range(2):  # the second time nothing is left to do, and it is no success either
        with pytest.raises(ContractError, match=r"3 of 3 annotations failed.*3 × too long: # prompt tokens"):
            job_module.annotate(config, teacher, pairs, out, spark)
    assert read_table(out, ANNOTATIONS)["status"].to_pylist() == ["failed"] * 3
    roomy = AnnotateConfig(n=1, engine=EngineConfig(kind="transformers"), retry_failed=True)
    figures = job_module.annotate(roomy, teacher, pairs, out, spark).figures
    assert (figures["failed"], figures["pairs"], figures["n_new"]) == (0, 3, 3)


@pytest.mark.spark
def test_an_error_of_the_contract_in_a_worker_is_one_sentence(tmp_path, spark):
    pairs = write_pairs(tmp_path / "data", [pair(1)])
    teacher = make_teacher(pairs, tmp_path / "teacher")
    config = AnnotateConfig(engine=EngineConfig(kind="openai", urls=("http://127.0.0.1:9/v1",), retries=0))
    with pytest.raises(ContractError, match=r"^no server answers any more \(http://127.0.0.1:9/v1: [^\n]*\)[^\n]*$"):
        job_module.annotate(config, teacher, pairs, tmp_path / "out", spark)
