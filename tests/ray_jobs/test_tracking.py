"""MLflow from the journal, with a real server that is away at first."""

import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from mlflow.tracking import MlflowClient

from arbitor.settings import build
from ray_jobs import tracking
from ray_jobs.config import RunConfig, Tracking
from ray_jobs.journal import Journal
from ray_jobs.tracking import MLFLOW_FILE, Tracker, read_note
from tests.ray_jobs.started import started


@pytest.fixture
def free_port():
    """Below the range from which the system, for Ray too, gives ports to whoever asks for any."""
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


@contextmanager
def serving(folder, port):
    """An MLflow server."""
    store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    place = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "server", *store, *place]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with started(command, cwd=folder, **silent):
        yield


def make_config(folder, uri):
    config = build(
        RunConfig,
        {
            "name": "run",
            "storage": str(folder),
            "tracking": {"uri": uri},
            "data": {"sources": {"text": {"path": "sample://text"}}},
        },
    )
    config.folder.mkdir()
    return config


def record_steps(config, *steps):
    with closing(Journal(config.folder)) as journal:
        for step in steps:
            journal.append(step, {"loss/total": 5.0 - step})


def points(config):
    client, note = MlflowClient(config.tracking.uri), read_note(config)
    assert note["tracking_uri"] == config.tracking.uri
    history = client.get_metric_history(note["run_id"], "loss/total")
    return [(point.step, point.value) for point in history]


def test_another_store_gets_the_whole_journal(tmp_path):
    """And the first one, once it is given again, gets what came since into the same MLflow run."""
    stores = [f"sqlite:///{tmp_path / name}.db" for name in ("one", "two")]
    config = make_config(tmp_path, stores[0])
    record_steps(config, 1)
    Tracker(config).finish("KILLED")
    first = read_note(config)["run_id"]
    moved = replace(config, tracking=Tracking(stores[1]))
    record_steps(config, 2)
    Tracker(moved).finish("KILLED")
    assert points(moved) == [(1, 4.0), (2, 3.0)]
    record_steps(config, 3)
    Tracker(config).finish("FINISHED")
    assert read_note(config)["run_id"] == first
    assert points(config) == [(1, 4.0), (2, 3.0), (3, 2.0)]


def test_a_run_that_mlflow_made_without_an_answer_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_POLL_SECONDS", 0.2)
    config = make_config(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    record_steps(config, 1)
    create, lost = MlflowClient.create_run, []

    def create_and_lose_the_answer(*arguments, **options):
        lost.append(create(*arguments, **options).info.run_id)
        raise ConnectionResetError

    monkeypatch.setattr(MlflowClient, "create_run", create_and_lose_the_answer)
    Tracker(config).finish("FINISHED")
    assert lost == [read_note(config)["run_id"]] and points(config) == [(1, 4.0)]


def test_a_note_that_was_torn_is_none(tmp_path):
    config = make_config(tmp_path, "")
    (config.folder / MLFLOW_FILE).write_text('{"run_id": ')
    assert read_note(config) == {}


def test_a_wrong_token_is_told_and_fails_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "_POLL_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "_STOP_PATIENCE", 0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret-7")

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        config = make_config(tmp_path, f"http://127.0.0.1:{server.server_port}")
        record_steps(config, 1)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        Tracker(config).finish("KILLED")
        server.shutdown()
        thread.join()
    error = capsys.readouterr().err
    assert "401" in error and "the same command again sends them" in error
    assert "secret-7" not in error


def test_a_server_that_is_away_misses_nothing(tmp_path, free_port, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "_POLL_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "_PATIENCE", 0.5)
    monkeypatch.setattr(tracking, "_TOLD_AFTER", 0.0)
    config = make_config(tmp_path, f"http://127.0.0.1:{free_port}")
    journal = Journal(config.folder)
    journal.append(1, {"loss/total": 4.0})
    Tracker(config).finish("FAILED")  # the server stays away: told, nothing lost
    assert "the same command again sends them" in capsys.readouterr().err
    assert read_note(config) == {}

    tracker = Tracker(config)
    journal.append(2, {"loss/total": 3.0})
    deadline = time.monotonic() + 120  # a server takes seconds of a core to start
    while tracker._failure is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with serving(tmp_path, free_port):
        while tracker._failure is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        journal.append(3, {"loss/total": 2.0})
        tracker.finish("FINISHED")
        Tracker(config).finish("FINISHED")  # sends the journal again: the points are the same
        client, note = MlflowClient(config.tracking.uri), read_note(config)
        run = client.get_run(note["run_id"])
        sent = points(config)
    journal.close()
    (told,) = capsys.readouterr().err.splitlines()
    assert "does not take the metrics" in told and "training goes on" in told
    assert sent == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert run.info.status == "FINISHED" == note["status"]
    assert run.data.params["seed"] == "0"
