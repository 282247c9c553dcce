"""The file of metrics, as a kill leaves it."""

from pathlib import Path

from data.contracts import MetricsLog


def test_a_line_cut_short_by_a_kill_is_dropped_and_written_anew(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        log.write("agpo", step, {"reward": step / 2})
    whole = log.path.read_text()
    log.path.write_text(whole + whole[: len(whole) // 4])
    assert [line["step"] for line in log.read("agpo")] == [1, 2]
    log.rewind("agpo", 1)
    log.write("agpo", 2, {"reward": 1.0})
    assert [line["step"] for line in log.read("agpo")] == [1, 2]
