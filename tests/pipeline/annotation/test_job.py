"""The annotation job: the stream, commits, reruns, bad rows, metrics; and once for real, Spark over vLLM."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data.contracts import ANNOTATIONS, PAIRS, ContractError, read_table
from pipeline.annotation import job as job_module
from pipeline.annotation import worker
from pipeline.annotation.config import AnnotateConfig
from pipeline.annotation.job import annotation_key
from pipeline.annotation.metrics import annotated, table_metrics
from pipeline.annotation.plan import chosen_pairs, missing
from pipeline.annotation.store import TEMPORARY, drop, files_of, part_path, take_over
from pipeline.annotation.worker import Job, Stream, annotate_partition
from pipeline.rows import row_chunks
from teacher.annotator import Annotator
from teacher.config import PromptConfig
from teacher.engines.base import Completion, Sampling
from teacher.engines.config import ServerConfig, TransformersConfig, VLLMConfig
from teacher.reading import AnswerReader
from tests.pipeline.annotation.helpers import SCALE, tiny_teacher, write_pairs

KEY = "0123456789abcdef"


class CharTokenizer:
    """A made-up tokenizer: one token for each character."""

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join(chr(i) for i in ids)

    def convert_ids_to_tokens(self, token):
        return chr(token)

    def convert_tokens_to_ids(self, spelt):
        return ord(spelt) if len(spelt) == 1 else None


class FakeEngine:
    """A made-up engine: answers with the grade that the prompt's last character spells, `at_once` prompts at a time."""

    max_model_len = 60

    def __init__(self, refuses=lambda text: False, at_once=3):
        self.seen: list[str] = []
        self.refuses = refuses
        self.at_once = at_once
        self.queue: list = []
        self.most = 0

    def submit(self, tag, prompt, sampling):
        self.queue.append((tag, "".join(map(chr, prompt)), sampling))
        self.most = max(self.most, len(self.queue))

    def finished(self):
        batch, self.queue = self.queue[: self.at_once], self.queue[self.at_once :]
        self.seen += [text for _, text, _ in batch]
        return [
            (tag, ValueError("refused") if self.refuses(text) else self.answers(text, sampling))
            for tag, text, sampling in reversed(batch)
        ]

    def answers(self, text, sampling):
        return [self.answer(text[-1])] * sampling.n

    def answer(self, letter):
        text = f"why <answer>{letter}</answer>"
        return Completion(text, [ord(c) for c in text], "stop", None)

    def cancel(self):
        self.queue = []

    def close(self): ...


class VotingEngine(FakeEngine):
    """A made-up engine whose sample i of a prompt answers with letter i of the prompt's last word."""

    def answers(self, text, sampling):
        return [self.answer(letter) for letter in text.split()[-1][sampling.first : sampling.first + sampling.n]]


def texts_of(rows):
    return [[ord(c) for c in f"{row['query']}|{row['ad_title']}"] for row in rows]


def made_up_teacher(prompts=texts_of, **how) -> Annotator:
    return Annotator(FakeEngine(**how), prompts, AnswerReader(CharTokenizer(), 4))


def job_for(out: Path, max_in_flight: int = 16) -> Job:
    """A job in a folder that it owns; its parts are of a quarter of `max_in_flight`."""
    config, sampling = AnnotateConfig(max_in_flight=max_in_flight), Sampling(n=2, max_tokens=20)
    return Job(KEY, "teacher", str(out), take_over(out), config, sampling, 1, worker.start_annotator)


def annotated_rows(out: Path, teacher: Annotator, rows: list[dict]) -> list[dict]:
    """The rows that come of one part."""
    stream = Stream(job_for(out), teacher)
    stream.put(out / "part.parquet", rows)
    stream.advance()
    return pq.read_table(out / "part.parquet", schema=ANNOTATIONS).to_pylist()


def visible(out: Path) -> list[Path]:
    return sorted(out.glob("[!_]*"))


def pair(number: int, title: str = "ad 3", query: str | None = None, grade: int | None = None) -> dict:
    return {
        "pair_id": f"p{number:04d}",
        "query_id": query or f"query {number}",
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


@pytest.fixture
def loaded(monkeypatch):
    teacher = made_up_teacher()
    monkeypatch.setattr(worker, "load_annotator", lambda job: teacher)
    return teacher


def test_chunks_cut_across_batches():
    found = [[row["pair_id"] for row in part] for part in row_chunks(batches([pair(i) for i in range(11)]), 4)]
    assert [len(part) for part in found] == [4, 4, 3]
    assert [name for part in found for name in part] == [f"p{i:04d}" for i in range(11)]


def test_every_part_is_a_file_of_the_contract(tmp_path, loaded):
    (summary,) = annotate_partition(job_for(tmp_path), batches([pair(i) for i in range(10)]))
    assert summary["rows"].to_pylist() == [10]
    assert sorted(pq.read_metadata(file).num_rows for file in files_of(tmp_path, KEY)) == [2, 4, 4]
    assert len(visible(tmp_path)) == 3
    table = read_table(tmp_path, ANNOTATIONS)
    assert sorted(table["pair_id"].to_pylist()) == [f"p{i:04d}" for i in range(10)]
    row = table.to_pylist()[0]
    assert (row["status"], row["grade"], row["votes"], row["agreement"], row["error"]) == ("ok", 3, [3, 3], 1.0, "")
    assert row["grade_probs"] == [0, 0, 0, 1]
    assert row["reasoning"] == "why"


def test_the_engine_is_fed_across_parts_and_no_more_than_allowed_is_in_flight(tmp_path, loaded):
    rows = [pair(i) for i in range(50)]
    job = job_for(tmp_path)
    waiting = []
    finished = loaded.engine.finished

    def watched():
        waiting.append(len(loaded.engine.queue))
        committed = sum(pq.read_metadata(file).num_rows for file in files_of(tmp_path, KEY))
        assert len(loaded.engine.seen) + waiting[-1] - committed <= job.config.max_in_flight
        return finished()

    loaded.engine.finished = watched
    list(annotate_partition(job, batches(rows)))
    # Until the last prompts go in there is always more waiting than the engine takes: it never runs dry between parts.
    assert min(waiting[:-4]) > loaded.engine.at_once
    assert loaded.engine.most == job.config.max_in_flight


def test_a_kill_loses_at_most_what_is_in_flight_and_a_retry_repeats_none(tmp_path, loaded, monkeypatch):
    rows = [pair(i) for i in range(48)]
    real, committed = worker.commit, []

    def dying_commit(path, table, run):
        if len(committed) == 7:
            (path.parent / f"{TEMPORARY}half").write_bytes(b"PAR1 and then the power went")
            raise KeyboardInterrupt
        committed.append(path)
        real(path, table, run)

    monkeypatch.setattr(worker, "commit", dying_commit)
    with pytest.raises(KeyboardInterrupt):
        list(annotate_partition(job_for(tmp_path), batches(rows)))
    assert read_table(tmp_path, ANNOTATIONS).num_rows == 28  # and the half file is not seen
    assert not loaded.engine.queue  # nothing of the dead task is left in the engine, which lives on
    before = {file: file.stat().st_mtime_ns for file in committed}
    first = list(loaded.engine.seen)
    assert len(first) - 28 <= 16
    monkeypatch.setattr(worker, "commit", real)
    list(annotate_partition(job_for(tmp_path), batches(rows)))
    assert len(loaded.engine.seen) == len(first) + 20
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))
    assert {file: file.stat().st_mtime_ns for file in committed} == before
    assert Counter(read_table(tmp_path, ANNOTATIONS)["pair_id"].to_pylist()) == {f"p{i:04d}": 1 for i in range(48)}


def test_bad_rows_are_rows(tmp_path):
    def prompts(rows):
        made = texts_of(rows)
        return ["no words" if row["ad_title"] == "none" else ids for row, ids in zip(rows, made, strict=True)]

    teacher = made_up_teacher(prompts, refuses=lambda text: "bad" in text)
    rows = [pair(i, title="ad 2") for i in range(8)]
    rows[3] = pair(3, title="bad 1")
    rows[4] = pair(4, title="long" * 20)
    rows[5] = pair(5, title="ad 9")
    rows[6] = pair(6, title="none")
    made = annotated_rows(tmp_path, teacher, rows)
    assert [row["pair_id"] for row in made] == [row["pair_id"] for row in rows]
    assert [row["status"] for row in made] == ["ok", "ok", "ok", "failed", "failed", "unparsed", "failed", "ok"]
    assert made[3]["error"] == "engine: ValueError: refused"
    assert made[4]["error"].startswith("too long: ")
    assert (made[5]["n_unparsed"], made[5]["votes"], made[5]["grade"]) == (2, [], None)
    assert made[5]["error"] == "no grade in 2 samples"
    assert made[6]["error"] == "prompt: no words"


def test_an_error_that_quotes_a_lone_surrogate_can_be_stored(tmp_path):
    (made,) = annotated_rows(tmp_path, made_up_teacher(lambda rows: ["odd \ud800"]), [pair(0)])
    assert made["error"] == "prompt: odd ?"


def test_an_engine_that_always_fails_stops_the_job(tmp_path):
    teacher = made_up_teacher(refuses=lambda text: True)
    with pytest.raises(ContractError, match=r"the engine failed on 32 prompts in a row.*refused"):
        annotated_rows(tmp_path, teacher, [pair(i) for i in range(40)])
    # Single prompts that fail are no such thing, however many they are.
    teacher = made_up_teacher(refuses=lambda text: int(text.split()[1][:-3]) % 3 > 0)
    made = annotated_rows(tmp_path, teacher, [pair(i) for i in range(60)])
    assert Counter(row["status"] for row in made) == {"failed": 40, "ok": 20}


def test_equal_prompts_are_generated_once(tmp_path, loaded):
    rows = [pair(i, query="same" if i < 13 else None) for i in range(20)]
    list(annotate_partition(job_for(tmp_path), batches(rows)))
    assert Counter(loaded.engine.seen)["same|ad 3"] == 1
    assert len(loaded.engine.seen) == 8
    made = read_table(tmp_path, ANNOTATIONS).to_pylist()
    assert sorted((row["pair_id"], row["grade"]) for row in made) == [(f"p{i:04d}", 3) for i in range(20)]


def test_a_pair_gets_further_samples_while_its_grade_is_undecided(tmp_path, monkeypatch):
    config = AnnotateConfig(n=2, n_max=8, confidence=0.85, max_in_flight=16)
    votes = {"33333333": 2, "32333333": 5, "32321111": 8, "99333333": 4, "99999999": 8, "39322222": 3}
    rows = [pair(i, title=f"ad {title}") for i, title in enumerate([*votes] * 5)]
    teacher = Annotator(
        VotingEngine(refuses=lambda text: "query 7|" in text), texts_of, AnswerReader(CharTokenizer(), 4)
    )
    monkeypatch.setattr(worker, "load_annotator", lambda job: teacher)
    list(annotate_partition(replace(job_for(tmp_path), config=config), batches(rows)))
    made = {row["pair_id"]: row for row in read_table(tmp_path, ANNOTATIONS).to_pylist()}
    assert (made["p0007"]["status"], made["p0007"]["n_samples"]) == ("failed", 0)
    for row, (title, count) in zip(rows, [*votes.items()] * 5, strict=True):
        if row["pair_id"] == "p0007":
            continue
        found, given = made[row["pair_id"]], title[:count]
        assert (found["n_samples"], found["n_unparsed"]) == (count, given.count("9"))
        assert found["votes"] == [int(letter) for letter in given if letter != "9"]
        assert found["completion_tokens"] == count * len("why <answer>0</answer>")
        assert found["status"] == ("ok" if found["votes"] else "unparsed")
    requests = Counter(teacher.engine.seen)
    assert (requests["query 0|ad 33333333"], requests["query 1|ad 32333333"]) == (1, 2)


@pytest.mark.spark
def test_metrics_and_fingerprint_do_not_depend_on_the_files(tmp_path, spark, loaded):
    rows = [pair(i, title=f"ad {i % 4}", grade=(i % 4 if i < 6 else 0)) for i in range(8)]
    rows.append(pair(8, title="long" * 20))
    pairs = write_pairs(tmp_path / "data", rows)
    prints = []
    for name, size, order in (("a", 8, 1), ("b", 20, -1)):
        out = tmp_path / name
        list(annotate_partition(job_for(out, max_in_flight=size), batches(rows[::order])))
        fingerprint, metrics, reasons = table_metrics(spark, out, KEY, pairs, "pool")
        prints.append(fingerprint)
        assert (metrics["pairs"], metrics["ok"], metrics["failed"], metrics["unparsed"]) == (9, 8, 1, 0)
        assert metrics["accuracy"] == pytest.approx(6 / 8)
        assert metrics["n_graded"] == 8
        assert metrics["agreement"] == 1.0
        assert reasons["failed"] == {"too long: # prompt tokens and # for the answer exceed #": 1}
    assert prints[0] == prints[1]
    file = files_of(out, KEY)[0]
    changed = pq.read_table(file, schema=ANNOTATIONS).to_pylist()
    changed[0]["reasoning"] = "another"
    pq.write_table(pa.Table.from_pylist(changed, schema=ANNOTATIONS), file)
    assert table_metrics(spark, out, KEY, pairs, "pool")[0] != prints[0]
    pq.write_table(pa.Table.from_pylist([*changed, changed[0]], schema=ANNOTATIONS), file)
    assert table_metrics(spark, out, KEY, pairs, "pool")[0] not in prints


def test_failed_rows_are_dropped_to_be_tried_again(tmp_path):
    teacher = made_up_teacher(refuses=lambda text: "bad" in text)
    stream = Stream(job_for(tmp_path), teacher)
    for rows in ([pair(0), pair(1, title="bad 1"), pair(2)], [pair(3, title="bad 2")]):
        stream.put(part_path(tmp_path, KEY, [row["pair_id"] for row in rows]), rows)
        stream.advance()
    run = take_over(tmp_path)
    assert drop(tmp_path, KEY, run, pc.field("status") == "failed") == 2
    assert sorted(read_table(tmp_path, ANNOTATIONS)["pair_id"].to_pylist()) == ["p0000", "p0002"]
    assert len(visible(tmp_path)) == 1
    assert drop(tmp_path, KEY, run, pc.field("status") == "failed") == 0


def test_the_key_follows_teacher_prompt_sampling_and_scale(tmp_path):
    pairs = write_pairs(tmp_path / "data", [pair(i) for i in range(5)])
    teacher = tiny_teacher(pairs, tmp_path / "teacher")
    keys = {annotation_key(teacher, AnnotateConfig(n=n, seed=seed)) for n in (1, 2) for seed in (0, 1)}
    one = AnnotateConfig(n=1)
    # Greedily, neither the seed nor the other settings of sampling change a token.
    greedy = [{}, {"seed": 1}, {"top_p": 0.5}, {"n": 3}]
    assert len({annotation_key(teacher, AnnotateConfig(temperature=0.0, **each)) for each in greedy}) == 1
    # Adaptive samples change the key; what has no effect without them does not.
    keys |= {annotation_key(teacher, AnnotateConfig(n=1, confidence=0.9, n_max=n_max)) for n_max in (1, 4, 8)}
    keys.add(annotation_key(teacher, AnnotateConfig(n=1, n_max=4)))
    content = json.loads((teacher / "teacher.json").read_text())
    for change in ({"fingerprint": "f2"}, {"prompt": content["prompt"] | {"guideline": "Be kind."}}):
        (teacher / "teacher.json").write_text(json.dumps(content | change))
        keys.add(annotation_key(teacher, one))
    (teacher / "teacher.json").write_text(json.dumps(content))
    SCALE.model_copy(update={"relevant_from": 1}).save(teacher)
    keys.add(annotation_key(teacher, one))
    assert len(keys) == 9


@pytest.mark.spark
def test_missing_pairs(tmp_path, spark, loaded):
    rows = [pair(i) for i in range(9)]
    rows[8]["split"] = "test"
    pairs, out = write_pairs(tmp_path / "data", rows), tmp_path / "out"
    out.mkdir()
    (out / "_stage.json").write_text("{}")
    config, prompt = AnnotateConfig(), PromptConfig()

    def ids(todo):
        return sorted(row["pair_id"] for row in todo.collect())

    def left(config=config, key=KEY):
        done = annotated(spark, out, key) if files_of(out, key) else None
        todo, total, count = missing(chosen_pairs(spark, config, pairs), done, prompt)
        return ids(todo), total, count

    everything = [f"p{i:04d}" for i in range(8)]
    assert left() == (everything, 8, 8)
    list(annotate_partition(job_for(out), batches(rows[:4])))
    assert left() == (everything[4:], 8, 4)
    assert left(AnnotateConfig(limit=5)) == (["p0004"], 5, 1)
    assert left(key="f" * 16)[2] == 8  # another key: all again


@pytest.mark.spark
def test_attributes_reach_the_worker_as_they_are(tmp_path, spark):
    entries = {'"{}': "a\\b]", "fox 🦊": "two\nlines\u2028", "nothing": None}
    rows = [pair(0) | {"attributes": list(entries.items())}, pair(1)]
    pairs = write_pairs(tmp_path / "pairs", rows)
    todo, _, _ = missing(chosen_pairs(spark, AnnotateConfig(), pairs), None, PromptConfig())
    ((first, second),) = row_chunks(todo.orderBy("pair_id").toArrow().to_batches(), 2)
    assert dict(first["attributes"]) == entries
    assert second["attributes"] is None


@pytest.mark.spark
@pytest.mark.vllm
def test_spark_over_vllm_and_nothing_to_do_afterwards(tmp_path, spark, monkeypatch):
    rows = [pair(i, title=f"red shoes {i}", grade=i % 4) for i in range(7)]
    pairs = write_pairs(tmp_path / "data", rows)
    teacher = tiny_teacher(pairs, tmp_path / "teacher")
    out = tmp_path / "annotations"
    config = AnnotateConfig(n=2, max_in_flight=12, min_ok_share=0, engine=VLLMConfig(max_model_len=512, max_num_seqs=8))
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
    files = visible(out)

    def no_engine(*_):
        raise AssertionError("an engine was started for nothing")

    monkeypatch.setattr(job_module, "_run", no_engine)
    again = job_module.annotate(config, teacher, pairs, out, spark)
    assert again.fingerprint == made.fingerprint
    assert (again.figures["n_new"], again.figures["n_reused"]) == (0, 7)
    assert visible(out) == files


@pytest.mark.spark
def test_too_many_failures_fail_the_job_after_committing(tmp_path, spark):
    rows = [pair(i, title="word " * 200) for i in range(3)]
    pairs = write_pairs(tmp_path / "data", rows)
    teacher = tiny_teacher(pairs, tmp_path / "teacher")
    out = tmp_path / "annotations"
    config = AnnotateConfig(n=1, engine=TransformersConfig(max_model_len=64))
    for _ in range(2):  # the second time nothing is left to do, and it is no success either
        with pytest.raises(ContractError, match=r"3 of 3 annotations failed.*3 × too long: # prompt tokens"):
            job_module.annotate(config, teacher, pairs, out, spark)
    assert read_table(out, ANNOTATIONS)["status"].to_pylist() == ["failed"] * 3
    roomy = AnnotateConfig(n=1, engine=TransformersConfig(), retry_failed=True)
    # Now there are answers, but an untrained teacher's are none that can be read: that is no success either.
    few = (
        r"only [01] of 3 annotations have a grade, less than min_ok_share 0\.5 \([23] × no grade in # [^\n]*warm_start"
    )
    with pytest.raises(ContractError, match=few):
        job_module.annotate(roomy, teacher, pairs, out, spark)
    metrics = job_module.annotate(roomy.model_copy(update={"min_ok_share": 0}), teacher, pairs, out, spark).figures
    assert (metrics["failed"], metrics["pairs"], metrics["n_reused"]) == (0, 3, 3)


@pytest.mark.spark
def test_an_error_of_the_contract_in_a_worker_is_one_sentence(tmp_path, spark):
    pairs = write_pairs(tmp_path / "data", [pair(1)])
    teacher = tiny_teacher(pairs, tmp_path / "teacher")
    config = AnnotateConfig(engine=ServerConfig(urls=("http://127.0.0.1:9/v1",), retries=0))
    with pytest.raises(ContractError, match=r"^no server answers any more \(http://127.0.0.1:9/v1: [^\n]*\)[^\n]*$"):
        job_module.annotate(config, teacher, pairs, tmp_path / "out", spark)
