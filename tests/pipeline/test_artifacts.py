"""When a stage's output is used again, and what becomes of an old one."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.contracts import Config
from pipeline.artifacts import (
    MANIFEST,
    STARTED,
    Recipe,
    StageOutput,
    StageRecord,
    begin_with,
    read_record,
    reason_to_run,
    reusable,
    run_stage,
)


class Settings(Config):
    value: int = 0


def recipe(value: int, version: int = 1) -> Recipe:
    return Recipe("s", Settings(value=value), {}, version)


def run(folder: Path, value: int, *, fails: bool = False, version: int = 1, **how: bool) -> StageRecord:
    """A stage whose output is a table and a note with `value`."""

    def work(out: Path) -> StageOutput:
        pq.write_table(pa.table({"value": [value]}), out / "t.parquet")
        if fails:
            raise RuntimeError("interrupted")
        (out / "note.txt").write_text(str(value))
        return StageOutput(fingerprint=f"f{value}", figures={})

    return run_stage(folder, recipe(value, version), work, **how)


def interrupted(folder: Path, value: int) -> None:
    with pytest.raises(RuntimeError):
        run(folder, value, fails=True)
    (folder / "checkpoint").write_text("half")


def value_in(folder: Path) -> int:
    return int(pq.read_table(folder / "t.parquet")["value"][0].as_py())


def test_the_same_key_is_reused_and_another_puts_the_finished_output_aside(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "s"
    assert not run(folder, 1).reused
    assert run(folder, 1).reused
    assert not run(folder, 2).reused
    assert (value_in(folder), value_in(tmp_path / "a" / "s.previous")) == (2, 1)


def test_an_interrupted_attempt_does_not_displace_the_last_finished_output(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "s"
    run(folder, 1)
    interrupted(folder, 2)
    interrupted(folder, 3)
    record = read_record(tmp_path / "a" / "s.previous")
    assert record is not None
    assert record.fingerprint == "f1"


def test_an_interrupted_stage_goes_on_where_its_recipe_is_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a" / "s"
    interrupted(folder, 0)
    started = json.loads((folder / STARTED).read_text())
    assert {name: started[name] for name in ("stage", "version", "config", "inputs")} == {
        "stage": "s", "version": 1, "config": {"value": 0}, "inputs": {},
    }  # fmt: skip
    (folder / STARTED).write_text(json.dumps(started | {"config": {}}))  # a setting that has come since, at its default
    with caplog.at_level(logging.INFO):
        run(folder, 0)
    assert (folder / "checkpoint").exists()
    assert "it goes on where it was interrupted" in caplog.text


@pytest.mark.parametrize(
    ("started", "reason"),
    [
        ({"stage": "s", "config": {"value": 2}, "inputs": {}, "version": 1}, "changed settings: s.value"),
        ({"stage": "s", "config": {"value": 1}, "inputs": {"data": "d"}, "version": 1}, "changed inputs: data"),
        (
            {"stage": "s", "config": {"value": 1}, "inputs": {}, "version": 0},
            "version 1 of the stage, made by version 0",
        ),
        ({"stage": "s", "key": "made from hashed code", "pid": 3}, "an older release began it"),
    ],
)
def test_an_interrupted_stage_of_another_recipe_starts_anew_and_says_why(
    started: dict[str, object], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a" / "s"
    interrupted(folder, 1)
    (folder / STARTED).write_text(json.dumps(started))
    assert reason_to_run(folder, recipe(1)) == f"the interrupted attempt cannot go on: {reason}"
    with caplog.at_level(logging.INFO):
        run(folder, 1)
    assert not (folder / "checkpoint").exists()
    assert reason in caplog.text


def test_another_runs_output_comes_as_links_and_is_independent(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "b" / "s", tmp_path / "a" / "s"
    run(theirs, 1)
    taken = run(mine, 1)
    assert (taken.reused, taken.made_by, taken.folder) == (True, "a", mine)
    assert (mine / "t.parquet").stat().st_ino == (theirs / "t.parquet").stat().st_ino
    assert (mine / "note.txt").stat().st_ino != (theirs / "note.txt").stat().st_ino
    # A manifest that was deleted, to have the stage made again: in a new folder, not through the links.
    (mine / MANIFEST).unlink()
    assert not run(mine, 1, share=False).reused
    assert (mine / "t.parquet").stat().st_ino != (theirs / "t.parquet").stat().st_ino
    shutil.rmtree(tmp_path / "a")
    assert value_in(mine) == 1


def test_a_finished_output_elsewhere_wins_over_half_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "b" / "s"
    interrupted(mine, 1)
    run(tmp_path / "a" / "s", 1)
    assert run(mine, 1).made_by == "a"
    assert not (mine.with_name("s.previous")).exists()


def test_what_is_not_shared(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "b" / "s", tmp_path / "a" / "s"
    run(theirs, 1)
    assert reusable(mine, recipe(1)) is not None
    assert reusable(mine, recipe(1), share=False) is None
    assert reusable(mine, recipe(1), incremental=True) is not None
    mine.mkdir(parents=True)  # it has begun a table of its own, which grows
    assert reusable(mine, recipe(1), incremental=True) is None
    (theirs / MANIFEST).write_text("{damaged")
    assert reusable(mine, recipe(1)) is None


def test_an_output_that_changes_while_it_is_taken_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = tmp_path / "b" / "s", tmp_path / "a" / "s"
    run(theirs, 1)
    link, moved = os.link, []

    def linking(source: str, target: str) -> None:
        link(source, target)
        if not moved:  # after the first file the other run makes its stage anew
            moved.append(source)
            run(theirs, 2)
            run(theirs, 1)

    monkeypatch.setattr(os, "link", linking)
    made = run(mine, 1)
    assert (made.reused, made.made_by, value_in(mine)) == (False, "", 1)
    assert not list((tmp_path / "b").glob(".s.*"))


def test_a_record_without_a_version_counts_as_version_1_and_new_settings_as_their_defaults(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "s"
    run(folder, 1)
    record = json.loads((folder / MANIFEST).read_text())
    del record["version"]
    (folder / MANIFEST).write_text(json.dumps(record | {"key": "made from hashed code"}))
    assert reusable(folder, recipe(1)) is not None
    assert reusable(folder, recipe(1, version=2)) is None
    (folder / MANIFEST).write_text(json.dumps(record | {"config": {}}))
    assert reusable(folder, recipe(0)) is not None
    (folder / MANIFEST).write_text(json.dumps(record | {"config": {"value": 1, "gone": 2}}))
    assert reusable(folder, recipe(1)) is None
    assert reason_to_run(folder, recipe(1)) == "changed settings: s.gone"


def test_what_a_process_left_that_was_killed_while_it_took_an_output_goes(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    first, second = tmp_path / "a", tmp_path / "b"
    run(first / "s", 1)
    for place in (first, second):
        for name in (f".s.{gone.pid}.tmp", f".s.{os.getppid()}.tmp", f".other.{gone.pid}.tmp", ".s.mine.tmp"):
            (place / name).mkdir(parents=True)
    assert run(second / "s", 1).made_by == "a"
    assert run(first / "s", 1).reused
    for place in (first, second):
        left = {path.name for path in place.iterdir()}
        assert left == {"s", f".s.{os.getppid()}.tmp", f".other.{gone.pid}.tmp", ".s.mine.tmp"}
    begin_with(first / "s", second / "other")
    assert not (second / f".other.{gone.pid}.tmp").exists()
    assert value_in(second / "other") == 1
