"""The life of a run: what dies, stops or hangs on the way changes nothing of what comes out."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from arbitor.checkpoint import CHECKPOINTS, MANIFEST, load_checkpoint, newest_checkpoint
from arbitor.errors import UserError
from arbitor.settings import build
from ray_jobs import heartbeat
from ray_jobs.attempts import Failures, RunFailedError, free_resources, is_passing
from ray_jobs.config import RunConfig
from ray_jobs.journal import SAVE_S, Journal, JournalReader
from ray_jobs.processes import is_running
from ray_jobs.run import exit_with_message, run
from ray_jobs.stop import REQUEST, StoppedError, warn_of_short_grace
from tests.ray_jobs.started import started

STEPS = 200
VALUES = {
    "steps": STEPS,
    "log_interval": 50,
    "eval_interval": 0,
    "save_interval": 20,
    "model": {"width": 64, "num_layers": 1, "head_width": 32, "rotary_width": 16},
    "update": {"warmup_steps": 5},
    "data": {
        "batch_size": 2,
        "sequence_length": 64,
        "slots_per_step": 4,
        "sources": {"text": {"path": "sample://text"}},
    },
    "scaling": {"threads_per_worker": 1},
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def make_config(storage, name, **values):
    return build(RunConfig, VALUES | {"name": name, "storage": str(storage)} | values)


def records(config):
    return list(JournalReader(config.folder).read())


def own_processes(title):
    """Processes of this test run's Ray by what Ray calls them."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            titles[int(folder.name)] = (folder / "cmdline").read_text()
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])

    def is_ours(pid):
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid, name in titles.items() if title in name and is_ours(pid)]


class Trouble(threading.Thread):
    """Does one thing after the other to a run, each once workers have made steps since the last."""

    def __init__(self, config, *acts, since=0):
        super().__init__(daemon=True)
        self._beat = config.folder / heartbeat.HEARTBEATS / "0.json"
        self._reader, self._acts, self._since = JournalReader(config.folder), acts, since
        self._step = max((record.step for record in self._reader.read()), default=0)
        self.start()

    def run(self):
        token = self._since
        for act in self._acts:
            beat = self._await_steps(token)
            token = beat["token"]
            act(beat)

    def _await_steps(self, token, count=30):
        """Steps that nobody had done before: their number does not depend on the machine."""
        goal, deadline = self._step + count, time.monotonic() + 120
        while time.monotonic() < deadline:
            for record in self._reader.read():
                self._step = record.step
            beat = json.loads(self._beat.read_text()) if self._beat.exists() else {"token": 0}
            if beat["token"] > token and self._step >= goal:
                return beat
            time.sleep(0.02)
        raise TimeoutError("the workers did not start again")


def kill_worker(beat):
    os.kill(beat["process"]["pid"], signal.SIGKILL)


def freeze_worker(beat):
    os.kill(beat["process"]["pid"], signal.SIGSTOP)


def kill_controller(beat):
    (pid,) = own_processes("ray::TrainController")
    os.kill(pid, signal.SIGKILL)


def stop_run(beat):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def unbroken(ray_head, storage):
    config = make_config(storage, "unbroken")
    run(config)
    return config


@pytest.mark.slow
def test_what_dies_or_hangs_changes_nothing(unbroken, storage, capsys, monkeypatch):
    """A worker killed, a worker frozen, the controller killed, a stop signal; then it goes on."""
    monkeypatch.setattr(heartbeat, "SILENCE_S", 3.0)
    config = make_config(storage, "broken")
    trouble = Trouble(config, kill_worker, freeze_worker, kill_controller, stop_run)
    with pytest.raises(StoppedError) as stopped:
        run(config)
    trouble.join()
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    output = capsys.readouterr().out
    assert "no sign of life for" in output and "killed, the workers start again" in output
    assert "Ray Train's controller has died" in output
    # The journal may be further: of steps that were done before a kill.
    done = int(str(stopped.value).rpartition(" ")[2])
    assert 0 < done < STEPS
    assert newest_checkpoint(config.folder / CHECKPOINTS).name == f"step-{done:08d}"
    note = json.loads((config.folder / "mlflow.json").read_text())
    client = MlflowClient(note["tracking_uri"])
    assert client.get_run(note["run_id"]).info.status == "KILLED"

    run(config)
    assert f"resuming after step {done}" in capsys.readouterr().out
    assert [record.step for record in records(config)] == list(range(1, STEPS + 1))
    assert records(config)[-1].metrics["run/restarts"] == 4
    assert client.get_run(note["run_id"]).info.status == "FINISHED"
    tensors, expected = (
        load_checkpoint(newest_checkpoint(c.folder / CHECKPOINTS))[1] for c in (config, unbroken)
    )
    assert all(tensors[name].equal(expected[name]) for name in expected)
    causes = (config.folder / "failures.jsonl").read_text().splitlines()
    assert len(causes) == 3 and all("died" in json.loads(cause)["cause"] for cause in causes)
    names = [path.name for path in (config.folder / "ray").iterdir() if path.is_dir()]
    assert len(names) == len(set(names)) == 3  # the controller's death, and the second command


@pytest.mark.slow
def test_a_stop_asked_of_two_workers_ends_both_after_the_same_step(ray_head, storage):
    config = make_config(storage, "both", scaling={"threads_per_worker": 1, "num_workers": 2})
    Trouble(config, stop_run)
    with pytest.raises(StoppedError, match=r"SIGTERM after step \d+"):
        run(config)
    newest = newest_checkpoint(config.folder / CHECKPOINTS)
    assert newest.name == f"step-{records(config)[-1].step:08d}"


@pytest.mark.slow
def test_a_driver_that_was_killed_leaves_a_run_that_goes_on(ray_head, storage, tmp_path, capsys):
    """Meanwhile a second driver of the run is refused."""
    config = make_config(storage, "driverless")
    arguments = tmp_path / "driverless.yaml"
    arguments.write_text(json.dumps(VALUES))
    import ray

    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "ray_jobs.text", str(arguments), f"storage={storage}"]

    def refuse_and_kill(beat):
        with pytest.raises(UserError, match=f"in use by process {driver.pid} on"):
            run(config)
        driver.kill()

    with started(command, env=environment, stdout=subprocess.DEVNULL) as driver:
        trouble = Trouble(config, refuse_and_kill)
        assert driver.wait(timeout=120) == -signal.SIGKILL
        trouble.join()
    run(config)
    output = capsys.readouterr().out
    assert f"taking over from process {driver.pid}" in output and "resuming after step" in output
    assert [record.step for record in records(config)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_ctrl_c_then_a_kill_then_the_end_with_a_ray_of_its_own(storage, tmp_path):
    """Ctrl-C reaches the whole process group; a killed driver takes its Ray with it."""
    config = make_config(storage, "alone")
    arguments = tmp_path / "alone.yaml"
    arguments.write_text(json.dumps(VALUES))
    command = [sys.executable, "-m", "ray_jobs.text", str(arguments), f"storage={storage}"]

    def until(act):
        with started(command, stderr=subprocess.PIPE) as driver:
            trouble = Trouble(config, lambda beat: act(driver.pid), since=last_token(config))
            _, error = driver.communicate(timeout=180)
            trouble.join()
            (beat,) = heartbeat.newest_beats(config.folder)
            await_end(beat["process"])  # by itself: only what is left is killed here
        return driver.returncode, error.decode()

    def interrupt_twice(pid):
        os.killpg(pid, signal.SIGINT)
        while not (config.folder / REQUEST).read_text():  # two at once would arrive as one
            time.sleep(0.001)
        os.killpg(pid, signal.SIGINT)

    code, error = until(lambda pid: os.killpg(pid, signal.SIGINT))
    assert code == 130 and "SIGINT after step" in error and "the same command goes on" in error
    code, error = until(interrupt_twice)
    assert code == 130 and "second signal: ending at once" in error
    code, _ = until(lambda pid: os.kill(pid, signal.SIGKILL))
    assert code == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "taking over from process" in done.stdout
    assert [record.step for record in records(config)] == list(range(1, STEPS + 1))


def await_end(process):
    deadline = time.monotonic() + 30
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(process)


def last_token(config):
    beats = heartbeat.newest_beats(config.folder)
    return beats[0]["token"] if beats else 0


def test_an_error_that_would_come_again_ends_the_run_at_once(unbroken, storage, capsys):
    """A step that is done again does not repeat its record, which was changed."""
    config = replace(unbroken, recovery=replace(unbroken.recovery, max_failures=9))
    run(config)
    assert "is finished" in capsys.readouterr().out  # other settings of recovery, the same run
    (newest_checkpoint(config.folder / CHECKPOINTS) / MANIFEST).unlink()
    path = config.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line.get("step") == STEPS - 3:
            line["metrics"]["loss/total"] += 1e-6
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit) as ended:
        exit_with_message(lambda: run(config))
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert f"run failed: ReplayError: step {STEPS - 3} does not repeat what is recorded" in message
    (failure,) = (config.folder / "failures.jsonl").read_text().splitlines()
    assert "in append" in json.loads(failure)["trace"]


def test_what_a_dead_controller_reserved_is_free_for_the_next(ray_head):
    """Also where its workers had not begun to beat."""
    import ray
    from ray.util.placement_group import placement_group, placement_group_table

    cpus = ray.cluster_resources()["CPU"]
    ray.get(placement_group([{"CPU": cpus}]).ready())
    waiting = placement_group([{"CPU": cpus}])
    free_resources()
    ray.get(placement_group([{"CPU": cpus}]).ready(), timeout=30)
    # Ray forgets a removed group after a while: no state, or REMOVED.
    assert placement_group_table(waiting).get("state", "REMOVED") == "REMOVED"
    free_resources()


def test_failures_without_progress_end_the_run_and_others_do_not(tmp_path):
    failures, journal = Failures(tmp_path, limit=2), Journal(tmp_path)
    for step in range(1, 6):
        journal.append(step, {})
        failures.add(RuntimeError("a worker was lost"))
    failures.add(RuntimeError("a worker was lost"))
    with pytest.raises(RunFailedError, match="3 failures in a row and no step after step 5"):
        failures.add(RuntimeError("a worker was lost"))
    journal.close()


def test_which_errors_are_tried_again():
    assert is_passing(RuntimeError("Connection closed by peer"))
    assert is_passing(ConnectionResetError())
    for error in (UserError("x"), FloatingPointError("x"), OSError(28, "x"), KeyError("x")):
        assert not is_passing(error)


def test_the_start_warns_of_a_grace_that_is_too_short(tmp_path, monkeypatch, capsys):
    warn_of_short_grace(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    warn_of_short_grace(tmp_path)
    assert capsys.readouterr().out.startswith("`ray job stop` will kill this job after 3 s")
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    warn_of_short_grace(tmp_path)
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.append(step, {SAVE_S: 59.99})
        time.sleep(0.02)
    journal.close()
    assert capsys.readouterr().out == ""
    warn_of_short_grace(tmp_path)
    assert "after 60 s; a step and a checkpoint may take 60.0 s" in capsys.readouterr().out
