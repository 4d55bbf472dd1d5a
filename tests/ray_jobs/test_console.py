"""Lines in a log, a bar below them on a terminal."""

import time
from types import SimpleNamespace

import pytest

from arbitor.settings import build
from ray_jobs.config import RunConfig
from ray_jobs.console import Console, Pace, format_line, in_words
from ray_jobs.journal import Journal, Record

METRICS = {
    "loss/total": 3.5,
    "loss/text": 3.25,
    "loss/code": 3.75,
    "throughput/positions_per_s": 8112.4,
    "throughput/data_wait_pct": 0.21,
}


def test_a_line_says_what_is_known():
    line = format_line(Record(20, 0.0, METRICS), 600, 310.2)
    assert line == (
        "step  20/600  loss 3.5000  text 3.2500  code 3.7500  8,112 positions/s  data wait 0.2 %"
        "  5 min 10 s left"
    )
    known = METRICS | {"throughput/mfu": 0.382, "validation/text": 3.1}
    last = format_line(Record(600, 0.0, known), 600, 0.0)
    assert "validation text 3.1000  8,112 positions/s  MFU 38.2 %  data wait 0.2 %" in last
    assert "left" not in last


def test_time_left_follows_the_last_steps():
    pace = Pace(100)
    pace.add(Record(1, 1000.0, {}))
    assert pace.seconds_left is None and in_words(None) == ""
    for step in range(2, 11):
        pace.add(Record(step, 1000.0 + 60 * step, {}))
    for step in range(11, 70):  # slow steps at the start are forgotten
        pace.add(Record(step, 2000.0 + 2 * step, {}))
    assert pace.seconds_left == pytest.approx(2 * 31)
    assert in_words(3725.0) == "1 h 2 min left" and in_words(59.6) == "1 min 0 s left"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_terminal_gets_a_bar_and_a_log_lines_alone(is_terminal, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if is_terminal else "0")
    values = {"name": "run", "storage": str(tmp_path), "steps": 4, "log_interval": 2}
    values["data"] = {"sources": {"text": {"path": "sample://text"}}}
    config = build(RunConfig, values)
    config.folder.mkdir()
    journal = Journal(config.folder)
    journal.note("of an earlier start")
    console = Console(config)
    late = SimpleNamespace(time=lambda: 1.0)  # the clock of a worker on another host
    monkeypatch.setattr("ray_jobs.journal.time", late)
    journal.begin(0, "worker")
    for step in range(1, 5):
        journal.append(step, METRICS)
        time.sleep(0.05)
    journal.note("checkpoint of step [4] is durable")
    journal.close()
    console.finish()
    output = capsys.readouterr().out
    for step in (1, 2, 4):
        assert output.count(f"step {step}/4  loss 3.5000") == 1
    assert "step 3/4" not in output and "earlier" not in output
    assert "checkpoint of step [4] is durable" in output
    assert ("100 %" in output) == is_terminal
    assert ("\x1b" in output) == is_terminal
