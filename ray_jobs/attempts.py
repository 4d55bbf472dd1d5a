"""Trains on Ray until the run ends, whatever dies on the way.

Ray's controller starts the workers again where one of them dies; where the controller dies itself,
the driver starts another attempt. Each attempt has its own name in Ray's storage, so that nothing
is read that a killed controller left half written: workers begin with the run's own newest
checkpoint. What would go wrong again, and what goes wrong without a new step between, ends the run.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
from ray import PlacementGroupID
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)
from torch.distributed import DistError

from arbitor.errors import UserError
from ray_jobs.config import RunConfig
from ray_jobs.journal import JournalReader
from ray_jobs.scaling import ray_scaling
from ray_jobs.worker import run_worker

RAY = "ray"  # in the run's folder: what Ray Train keeps; a run goes on without it
FAILURES = "failures.jsonl"  # in the run's folder: what ended workers, and when

T = TypeVar("T")


class RunFailedError(RuntimeError):
    """The run cannot go on by itself."""


def train_on_ray(config: RunConfig, holder: dict[str, Any]) -> int:
    """The steps done in the end: all, or fewer where a stop was asked for.

    Raises RunFailedError; a UserError of a worker as such.
    """
    # Ray asks its workers every 2 s whether they live or have ended; sooner is cheap.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # It would start an actor with each group of workers; a lost node is a lost worker here.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    failures = Failures(config.folder, config.recovery.max_failures)
    while True:
        try:
            return _attempt(config, holder)
        except ray.train.ControllerError as error:
            cause = error.controller_failure
            if isinstance(cause, (UserError, RunFailedError)):
                raise cause from None
            raise RunFailedError(one_line(cause)) from error
        except RayError as error:  # of the controller's own end
            failures.add(error)
            print(f"Ray Train's controller has died ({one_line(error)}); starting the next attempt")
            free_resources()


def _attempt(config: RunConfig, holder: dict[str, Any]) -> int:
    trainer = _Trainer(
        run_worker,
        train_loop_config={"config": config.values(), "holder": holder},
        scaling_config=ray_scaling(config.scaling),
        run_config=ray.train.RunConfig(
            name="attempt-" + uuid.uuid4().hex[:8],
            storage_path=str(config.folder / RAY),
            failure_config=ray.train.FailureConfig(max_failures=-1),  # `Judge` ends it
            callbacks=[Judge(Failures(config.folder, config.recovery.max_failures))],
        ),
    )
    return _in_a_thread(trainer.fit).return_value


class _Trainer(TorchTrainer):
    """Without the actor for datasets that Ray starts with each group of workers, also where there
    are none: on a small machine it takes time from the start of the workers themselves.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]


def free_resources() -> None:
    """Ends what is left of a dead controller's workers. Where Ray has no dashboard, nobody else
    frees what was reserved for them, and those of the next attempt would wait for it for ever.
    """
    job = ray.get_runtime_context().get_job_id()
    for group, state in placement_group_table().items():
        if group.endswith(job) and state["state"] != "REMOVED":  # an id ends with that of its job
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _in_a_thread(work: Callable[[], T]) -> T:
    """The main thread stays free for signals, and Ray takes none of them for itself."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="attempt", daemon=True).start()
    return future.result()


class Failures:
    """Writes failures down, and counts those in a row without a step that was not done before."""

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit
        self._reader, self._last_step = JournalReader(folder), 0
        self._before, self._in_a_row = -1, 0

    def add(self, error: Exception) -> None:
        """Raises RunFailedError with the cause if that is one too many."""
        for record in self._reader.read():
            self._last_step = max(self._last_step, record.step)
        self._in_a_row = self._in_a_row + 1 if self._last_step == self._before else 1
        self._before = self._last_step
        self._write(error)
        if self._in_a_row > self._limit:
            raise RunFailedError(
                f"{self._in_a_row} failures in a row and no step after step {self._last_step}"
                f" (recovery.max_failures={self._limit}); the last one: {one_line(error)}"
            ) from error

    def _write(self, error: Exception) -> None:
        entry = {
            "time": time.time(),
            "after_step": self._last_step,
            "cause": one_line(error),
            "trace": "".join(getattr(error, "__notes__", [])),
        }
        with open(self._folder / FAILURES, "a") as file:
            file.write(json.dumps(entry) + "\n")


class Judge(ray.train.UserCallback):
    """Decides in Ray's controller whether workers start again: they do unless this raises."""

    def __init__(self, failures: Failures):
        self._failures = failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        lasting = [error for error in worker_exceptions.values() if not is_passing(error)]
        error = (lasting or list(worker_exceptions.values()))[0]
        self._failures.add(error)
        if lasting:
            raise error


def is_passing(error: Exception) -> bool:
    """Whether it may go well the next time: a worker was lost, or the connection to one.

    The latter is a plain RuntimeError of torch's. All else that a worker raises it would raise
    again.
    """
    from_ray = type(error).__module__.startswith("ray.")
    lost = isinstance(error, (ConnectionError, DistError)) or type(error) is RuntimeError
    return from_ray or lost


def one_line(error: Exception) -> str:
    error = getattr(error, "health_check_failure", error)  # what Ray's health check found
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
