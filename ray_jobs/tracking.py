"""MLflow from the journal: one run for the life of a training run, one point a metric and step."""

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from ray_jobs.config import RunConfig
from ray_jobs.journal import JournalReader

NOTE = "mlflow.json"  # in the run folder: which MLflow run is this one's

_BATCH = 1000  # MLflow takes at most this many metrics in a call
_PARAMS = 100  # and this many parameters
_POLL_SECONDS = 1.0


class Tracker:
    """A thread of the driver that sends new journal records to MLflow.

    What it has sent is not kept anywhere: after a restart it sends the whole journal again, word
    for word, and MLflow's key (metric, time, step, value) makes that the same points.
    """

    def __init__(self, config: RunConfig):
        self.uri = config.tracking.uri or f"sqlite:///{config.folder.parent / 'mlflow.db'}"
        self._config = config
        self._reader = JournalReader(config.folder)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def finish(self, status: str) -> None:
        """Sends what is left and ends the MLflow run as FINISHED, FAILED or KILLED."""
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise RuntimeError(f"MLflow at {self.uri} did not take the metrics") from self._failure
        self._client.set_terminated(self._run_id, status=status)

    def _work(self) -> None:
        try:
            # MLflow takes seconds of a core to start: those belong to the workers until they train.
            while self._reader.is_empty() and not self._stop.wait(_POLL_SECONDS):
                pass
            self._open()
            while not self._stop.wait(_POLL_SECONDS):
                self._send()
            self._send()
        except Exception as error:  # handed to `finish`, on the thread that can report it
            self._failure = error

    def _open(self) -> None:
        # Imported here for the reason that `_work` gives.
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=self.uri)
        note = self._config.folder / NOTE
        if note.exists():
            self._run_id = json.loads(note.read_text())["run_id"]
            self._client.update_run(self._run_id, status="RUNNING")
            return
        name = self._config.tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(name)
        )
        run = self._client.create_run(experiment_id, run_name=self._config.name)
        self._run_id = run.info.run_id
        note.write_text(json.dumps({"run_id": self._run_id, "tracking_uri": self.uri}) + "\n")
        params = [Param(key, str(value)) for key, value in flatten(self._config.values())]
        for start in range(0, len(params), _PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _PARAMS])

    def _send(self) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, round(record.time * 1000), record.step)
            for record in self._reader.read()
            for key, value in record.metrics.items()
        ]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _BATCH])


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
