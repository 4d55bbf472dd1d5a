"""MLflow from the journal, with a real server that is away at first."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from mlflow.tracking import MlflowClient

from arbitor.settings import build
from ray_jobs import tracking
from ray_jobs.config import RunConfig
from ray_jobs.journal import Journal
from ray_jobs.tracking import Tracker, read_note


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(folder, port):
    """An MLflow server in a process group of its own: it starts workers."""
    store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    place = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *store, *place],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def make_config(folder, port):
    config = build(
        RunConfig,
        {
            "name": "run",
            "storage": str(folder),
            "tracking": {"uri": f"http://127.0.0.1:{port}"},
            "data": {"sources": {"text": {"path": "sample://text"}}},
        },
    )
    config.folder.mkdir()
    return config


def test_a_wrong_token_is_told_and_fails_no_run(tmp_path, free_port, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "_POLL_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "_STOP_PATIENCE", 0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret-7")

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        def log_message(self, *_):
            pass

    config = make_config(tmp_path, free_port)
    journal = Journal(config.folder)
    journal.append(1, {"loss/total": 4.0})
    journal.close()
    with HTTPServer(("127.0.0.1", free_port), Refusing) as server:
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
    config = make_config(tmp_path, free_port)
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
    server = serve(tmp_path, free_port)
    try:
        while tracker._failure is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        journal.append(3, {"loss/total": 2.0})
        tracker.finish("FINISHED")
        Tracker(config).finish("FINISHED")  # sends the journal again: the points are the same
        client, note = MlflowClient(config.tracking.uri), read_note(config)
        run = client.get_run(note["run_id"])
        points = client.get_metric_history(note["run_id"], "loss/total")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        journal.close()
    (told,) = capsys.readouterr().err.splitlines()
    assert "does not take the metrics" in told and "training goes on" in told
    assert [(point.step, point.value) for point in points] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert run.info.status == "FINISHED" == note["status"]
    assert run.data.params["seed"] == "0"
