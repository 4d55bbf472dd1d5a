"""Who holds a run: one process at a time, and the workers of its last one."""

import json
import os
import sys
import time

import pytest

from arbitor.errors import UserError
from arbitor.owners import SupersededError, add_owner, read_owners
from ray_jobs import lease
from ray_jobs.group import WORKERS, Group
from ray_jobs.lease import Lease, refuse_if_in_use
from ray_jobs.processes import is_running, this_process
from tests.ray_jobs.started import started


@pytest.fixture
def elsewhere(tmp_path):
    """A run folder held by a process of another host, and its heartbeat."""
    holder = this_process() | {"host": "far", "place": "another boot", "pid": 7}
    add_owner(tmp_path, None, "driver", 0, holder)

    def beat(seconds_ago):
        values = {"holder": holder, "time": time.time() - seconds_ago, "ended": False}
        (tmp_path / lease.NAME).write_text(json.dumps(values))

    return tmp_path, beat


def test_a_holder_on_another_host_is_believed_for_30_seconds(elsewhere, capsys):
    folder, beat = elsewhere
    beat(seconds_ago=25)
    with pytest.raises(UserError, match="in use by process 7 on far, heard of 25 s ago"):
        Lease(folder, 0)
    beat(seconds_ago=31)
    held = Lease(folder, 0)
    assert "taking over from process 7 on far, not heard of for more" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        refuse_if_in_use(folder)
    held.release()
    assert refuse_if_in_use(folder) == ""
    assert [owner.token for owner in read_owners(folder)] == [1, 2]


def test_a_process_that_lost_its_lease_ends(tmp_path):
    """It was stopped for a while; another one has the run since."""
    program = (
        "import sys, time; from pathlib import Path; from ray_jobs import lease;"
        "lease.BEAT_S = 0.2; lease.Lease(Path(sys.argv[1]), 0); time.sleep(60)"
    )
    with started([sys.executable, "-c", program, str(tmp_path)]) as sleeper:
        deadline = time.monotonic() + 60
        while not (tmp_path / lease.NAME).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        (before,) = read_owners(tmp_path)
        assert is_running(before.holder)
        add_owner(tmp_path, before, "driver", 0, this_process())
        assert sleeper.wait(timeout=30) == 1


def test_an_owner_that_a_loss_of_power_has_torn_is_named(tmp_path):
    add_owner(tmp_path, None, "driver", 0, this_process())
    path = tmp_path / "owners" / "00000001.json"
    path.write_text("")
    with pytest.raises(UserError, match=f"{path}: names no owner .* delete it once no process"):
        Lease(tmp_path, 0)


def test_a_lease_that_cannot_be_given_back_ends_no_run(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    held = Lease(folder, 0)
    folder.rename(tmp_path / "away")
    held.release()
    assert "its lease could not be given back" in capsys.readouterr().out


def test_a_torn_heartbeat_counts_from_when_it_was_written(elsewhere):
    folder, _ = elsewhere
    path = folder / lease.NAME
    path.write_text("{")
    with pytest.raises(UserError, match="in use by process 7 on far, heard of"):
        refuse_if_in_use(folder)
    os.utime(path, (1.0, 1.0))
    assert "taking over" in refuse_if_in_use(folder)


def test_of_two_next_owners_one_wins_and_the_older_workers_end(tmp_path):
    holder = this_process()
    driver = add_owner(tmp_path, None, "driver", 0, holder)
    first = add_owner(tmp_path, driver, WORKERS, 0, holder)
    with pytest.raises(SupersededError):
        add_owner(tmp_path, driver, WORKERS, 0, holder)
    group = Group(tmp_path, first.token, None, 0)
    group.check()
    add_owner(tmp_path, first, WORKERS, 0, holder)
    with pytest.raises(SupersededError, match="other workers"):
        group.check()
