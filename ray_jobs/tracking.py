"""MLflow from the journal: one run for the life of a training run, one point a metric and step."""

import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_jobs.config import RunConfig
from ray_jobs.journal import JournalReader, Record
from ray_jobs.processes import replace_text
from ray_jobs.report import REPORT
from ray_jobs.samples import SAMPLES

# In the run folder: which MLflow run is this one's, and how it ended there.
MLFLOW_FILE = "mlflow.json"

_KEY = "arbitor.run"  # a tag: which run an MLflow run is, known before MLflow gives it an id
_BATCH = 1000  # MLflow takes at most this many metrics in a call
_PARAMS = 100  # and this many parameters
_POLL_SECONDS = 1.0
_LONGEST_PAUSE = 10.0  # between attempts while the store does not answer
_TOLD_AFTER = 30.0  # without an answer: training goes on, but whoever watches should know
_PATIENCE = 60.0  # how long the end of a run waits for it
_STOP_PATIENCE = 10.0  # and the end of one that was told to stop


class Tracker:
    """A thread of the driver that sends new journal records to MLflow.

    What it has sent is not kept anywhere: after a restart it sends the whole journal again, word
    for word, and MLflow's key (metric, time, step, value) makes that the same points. While the
    store is away nothing is lost and nobody waits: the journal has it all.
    """

    def __init__(self, config: RunConfig):
        self.uri = tracking_uri(config)
        self._config = config
        self._reader = JournalReader(config.folder)
        self._pending: list[Record] = []
        self._samples_sent: set[Path] = set()
        self._client: Any = None
        self._status = ""  # of the run once it has ended
        self._failure: Exception | None = None
        self._told = False  # that the store does not answer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def finish(self, status: str) -> None:
        """Sends what is left and ends the MLflow run as FINISHED, FAILED or KILLED.

        A store that stays away for a minute (10 s where the run was stopped) does not fail the
        run: it is told how to send later.
        """
        self._status = status
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            print(
                f"MLflow at {self.uri} did not take the metrics ({self._failure}); they stand in"
                f" {self._config.folder}, and the same command again sends them",
                file=sys.stderr,
            )

    def _work(self) -> None:
        # MLflow takes seconds of a core to start: those belong to the workers until they train.
        while not self._pending and not self._stop.wait(_POLL_SECONDS):
            self._pending += self._reader.read()
        pause, give_up, failing_since = _POLL_SECONDS, float("inf"), float("inf")
        while True:
            ending = self._stop.is_set()
            if ending:
                patience = _STOP_PATIENCE if self._status == "KILLED" else _PATIENCE
                give_up = min(give_up, time.monotonic() + patience)
            self._pending += self._reader.read()
            try:
                self._send()
                if ending:
                    self._end()
                    return
                pause, failing_since = _POLL_SECONDS, float("inf")
            except Exception as error:  # whatever the store's client raises: tried again
                self._failure = error
                failing_since = min(failing_since, time.monotonic())
                if time.monotonic() >= failing_since + _TOLD_AFTER and not self._told:
                    self._tell()
                pause = min(2 * pause, _LONGEST_PAUSE)
                if time.monotonic() >= give_up:
                    return
                if ending:
                    time.sleep(_POLL_SECONDS)
            self._stop.wait(pause)

    def _tell(self) -> None:
        self._told = True
        print(
            f"MLflow at {self.uri} does not take the metrics ({self._failure}); training goes on,"
            " they wait in the run's folder",
            file=sys.stderr,
        )

    def _send(self) -> None:
        from mlflow.entities import Metric

        if self._client is None:
            self._open()
        metrics = [
            Metric(key, value, round(record.time * 1000), record.step)
            for record in self._pending
            for key, value in record.metrics.items()
        ]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _BATCH])
        for path in sorted((self._config.folder / SAMPLES).glob("step-*")):
            if path not in self._samples_sent:
                self._client.log_artifact(self._run_id, str(path), SAMPLES)
                self._samples_sent.add(path)
        self._pending, self._failure = [], None

    def _open(self) -> None:
        """Finds the MLflow run of this run, or makes it."""
        # The client would try a server that is away for minutes before it says so, and make a run
        # again that the server made without an answer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        # Imported here for the reason that `_work` gives.
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # tells of retries
        client = MlflowClient(tracking_uri=self.uri)
        if not self._find_run(client):
            self._make_run(client)
        self._write_note({"run_id": self._run_id, "tracking_uri": self.uri, "status": "RUNNING"})
        known = client.get_run(self._run_id).data.params
        params = [
            Param(key, str(value))
            for key, value in flatten(self._config.values())
            if key not in known  # MLflow lets no value change, and `steps` may
        ]
        for start in range(0, len(params), _PARAMS):
            client.log_batch(self._run_id, params=params[start : start + _PARAMS])
        self._client = client

    def _find_run(self, client: Any) -> bool:
        """Whether the store has the run that the note names: another store has not."""
        from mlflow.exceptions import MlflowException

        self._run_id = read_note(self._config).get("run_id", "")
        if not self._run_id:
            return False
        try:
            client.update_run(self._run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _make_run(self, client: Any) -> None:
        name = self._config.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        # A store that is a file has no place of its own for artifacts.
        storage = self._config.folder.parent
        artifacts = None if self._config.tracking.uri else (storage / "artifacts").as_uri()
        experiment_id = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(name, artifact_location=artifacts)
        )
        key = read_note(self._config).get("key") or uuid.uuid4().hex
        self._write_note({"key": key})
        # An attempt whose answer was lost may have made it.
        found = client.search_runs([experiment_id], filter_string=f"tags.`{_KEY}` = '{key}'")
        made = found or [
            client.create_run(experiment_id, run_name=self._config.name, tags={_KEY: key})
        ]
        self._run_id = made[0].info.run_id
        client.update_run(self._run_id, status="RUNNING")

    def _end(self) -> None:
        report = self._config.folder / REPORT
        if report.exists():
            self._client.log_artifact(self._run_id, str(report))
        self._client.set_terminated(self._run_id, status=self._status)
        self._write_note({"status": self._status})

    def _write_note(self, values: Mapping[str, str]) -> None:
        path, text = self._config.folder / MLFLOW_FILE, read_note(self._config) | values
        replace_text(path, json.dumps(text) + "\n", durable=True)


def tracking_uri(config: RunConfig) -> str:
    return config.tracking.uri or f"sqlite:///{config.folder.parent / 'mlflow.db'}"


def read_note(config: RunConfig) -> dict[str, str]:
    """The run's key, id, store and status in MLflow; empty before its store has answered.

    One that a loss of power has torn is none: the journal goes to a new MLflow run.
    """
    path = config.folder / MLFLOW_FILE
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return {}


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
