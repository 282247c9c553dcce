"""What the annotation benchmarks prove at length, once and small: a killed engine, a killed Spark worker."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.annotate_kills import compare, python_workers, rows_in
from benchmarks.replay import load_replay, make_pairs, make_teacher
from data.contracts import PAIRS, ContractError, Grade, GradeScale
from pipeline.annotation.config import AnnotateConfig
from pipeline.annotation.job import annotate
from teacher.config import PromptConfig
from teacher.prompt import Prompt, save_prompt
from teacher.scratch import make_decoder

pytestmark = [pytest.mark.spark, pytest.mark.e2e]  # kills and clusters: not what people run while they work

# Some pairs are decided after two samples, some after five, some take all eight.
CONFIG = AnnotateConfig(n=2, n_max=8, confidence=0.85, max_in_flight=400, max_failed_share=1.0)
SCALE = GradeScale(grades=tuple(Grade(name=f"g{i}", definition="d") for i in range(4)), relevant_from=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    row = {"pair_id": "1", "query_id": "1", "query": "red shoes", "ad_title": "Red shoes"}
    row |= {"split": "train", "source": "test"}
    (folder / "pairs").mkdir()
    pq.write_table(pa.Table.from_pylist([row], schema=PAIRS), folder / "pairs" / "part.parquet")
    make_decoder(folder, folder / "model", "tiny", 0)
    save_prompt(Prompt(PromptConfig(), SCALE, max_completion_tokens=32), folder / "model", fingerprint="f1")
    return folder / "model"


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("recording") / "recording.jsonl"
    lines = []
    for grades in ("00000000", "12111111", "23231110", "33333333", "99999999"):  # 9 is no grade of this scale
        texts = [f"reason {grade} <answer>{grade}</answer>" for grade in grades]
        alike = {"token_ids": [5, 6], "finish_reason": "stop", "top_logprobs": None}
        lines.append([{"text": text} | alike for text in texts])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


PAIRS_MADE = 3000


@pytest.fixture(scope="module")
def calm(tmp_path_factory, spark, teacher: Path, recording: Path) -> Path:
    """A folder with `pairs` and with the annotations, `calm`, that an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("calm")
    make_pairs(spark, PAIRS_MADE, folder / "pairs")
    SCALE.save(folder / "pairs")
    fast = make_teacher(teacher, recording, folder / "fast")
    figures = annotate(CONFIG, fast, folder / "pairs", folder / "calm", spark, load_replay).figures
    assert 0 < figures["unparsed"] < figures["ok"]
    return folder


def test_an_engine_killed_in_the_middle_loses_at_most_what_is_in_flight(
    tmp_path: Path, spark, teacher: Path, recording: Path, calm: Path
):
    pairs, log = PAIRS_MADE, tmp_path / "log"
    log.mkdir()
    slow = make_teacher(teacher, recording, tmp_path / "slow", pairs_per_s=1000, log=str(log))

    def kill() -> None:
        while rows_in(tmp_path / "rough") < pairs // 3:
            time.sleep(0.02)
        for worker in python_workers(psutil.Process(spark.sparkContext._gateway.proc.pid)):
            worker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ContractError, match=r"^a worker of the annotation job died[^\n]*run this again"):
        annotate(CONFIG, slow, calm / "pairs", tmp_path / "rough", spark, load_replay)
    killer.join()
    kept = rows_in(tmp_path / "rough")
    assert pairs // 3 <= kept < pairs
    again = annotate(CONFIG, slow, calm / "pairs", tmp_path / "rough", spark, load_replay)
    assert (again.figures["n_new"], again.figures["n_reused"]) == (pairs - kept, kept)
    assert compare(calm / "calm", tmp_path / "rough") == {"missing": 0, "duplicates": 0, "different": 0}
    completed = Counter(line for file in log.iterdir() for line in file.read_text().splitlines())
    assert len(completed) == pairs
    assert completed.total() - pairs <= CONFIG.max_in_flight


def test_a_disk_that_fills_up_in_mid_job_is_one_sentence_and_the_next_run_goes_on(tmp_path: Path, spark, calm: Path):
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> str:
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(disk)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip()

    size = sum(file.stat().st_size for file in (calm / "calm").glob("*.parquet"))
    if refused := mount("-o", f"size={size // 2}"):
        pytest.skip(f"a file system cannot be mounted here: {refused}")
    try:
        with pytest.raises(ContractError, match=r"^the disk of .* is full; free some space[^\n]*$"):
            annotate(CONFIG, calm / "fast", calm / "pairs", disk, spark, load_replay)
        kept = rows_in(disk)
        assert 0 < kept < PAIRS_MADE
        assert not mount("-o", f"remount,size={4 * size}")
        again = annotate(CONFIG, calm / "fast", calm / "pairs", disk, spark, load_replay)
        assert (again.figures["n_new"], again.figures["n_reused"]) == (PAIRS_MADE - kept, kept)
        assert compare(calm / "calm", disk) == {"missing": 0, "duplicates": 0, "different": 0}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_standalone_cluster_survives_one_of_its_two_workers(teacher: Path, recording: Path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "benchmarks.annotate_cluster", "workers", str(teacher), str(recording)]
    done = subprocess.run(
        [*command, "--pairs", "6000"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["killed"], found["missing"], found["duplicates"], found["different"]) == (True, 0, 0, 0)
