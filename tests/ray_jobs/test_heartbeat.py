"""Who watches the workers: what is killed, what is not, and what does not end the watching."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_jobs import heartbeat, processes
from ray_jobs.processes import is_running, replace_text, this_process
from tests.ray_jobs.started import started

SLEEP = [sys.executable, "-c", "import time; time.sleep(120)"]


def process_of(sleeper):
    fields = Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()
    return this_process() | {"pid": sleeper.pid, "started": int(fields[19])}


def write_beat(folder, rank, process, phase):
    values = {"token": 1, "process": process, "node": "", "step": 4, "phase": phase}
    path = folder / heartbeat.HEARTBEATS / f"{rank}.json"
    path.parent.mkdir(exist_ok=True)
    replace_text(path, json.dumps(values | {"time": time.time()}))


def test_a_worker_without_steps_is_killed_but_not_while_one_saves(tmp_path, capsys):
    with started(SLEEP) as saving, started(SLEEP) as waiting:
        write_beat(tmp_path, 0, process_of(saving), "save")
        write_beat(tmp_path, 1, process_of(waiting), heartbeat.TRAINING)
        watch = heartbeat.Watch(tmp_path, step_timeout_s=0.5, min_workers=2)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=3)
        assert saving.poll() is None
        write_beat(tmp_path, 0, process_of(saving), heartbeat.TRAINING)
        for sleeper in (saving, waiting):
            assert sleeper.wait(timeout=30) == -signal.SIGKILL
        watch.close()
    assert capsys.readouterr().out.count("no step after step 5 for") == 2


def test_workers_of_two_containers_with_equal_numbers_are_told_apart(tmp_path):
    """One has stood still for so long that it would be killed, the other one makes steps."""
    watch = heartbeat.Watch(tmp_path, step_timeout_s=60.0, min_workers=2)
    for place in ("one", "two"):
        process = this_process() | {"place": place}
        beat = {"token": 1, "process": process, "step": 4, "phase": heartbeat.TRAINING, "time": 1.0}
        watch._look(beat, busy=False)
    watch.close()
    assert len(watch._seen) == 2


def test_workers_that_find_no_room_are_told_of_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    monkeypatch.setattr(heartbeat, "_WAITING_S", 0.2)
    watch = heartbeat.Watch(tmp_path, step_timeout_s=60.0, min_workers=2)
    time.sleep(1.0)
    watch.close()
    assert capsys.readouterr().out.count("waiting for room for 2 workers") == 1


def test_the_watch_survives_processes_that_die_under_it(tmp_path, capsys, monkeypatch):
    def vanish(*_):
        raise ProcessLookupError

    with started(SLEEP) as sleeper:
        monkeypatch.setattr(processes.os, "kill", vanish)  # it ends between the look and the kill
        assert is_running(process_of(sleeper)) and not processes.end(process_of(sleeper))
    monkeypatch.setattr(processes, "_state", vanish)
    assert not is_running({"pid": 1})


def test_the_heartbeat_goes_on_after_a_write_that_failed(ray_head, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    beat, path = heartbeat.Heartbeat(tmp_path, 0, 1), tmp_path / heartbeat.HEARTBEATS / "0.json"
    path.parent.rename(tmp_path / "away")
    time.sleep(0.2)
    (tmp_path / "away").rename(path.parent)
    before = json.loads(path.read_text())["time"]
    deadline = time.monotonic() + 30
    while json.loads(path.read_text())["time"] == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert json.loads(path.read_text())["time"] > before
    beat.close()
