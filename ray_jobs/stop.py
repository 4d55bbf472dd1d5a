"""How a run is stopped at a step: a signal to the driver, a file for the workers, one step for all.

The first signal asks for a checkpoint at the next step boundary, the second ends at once. Worker 0
finds the request between two steps and writes down the last step to do before it joins that step's
exchange; the others read it after that exchange, so all of them stop after the same step.

Both files are there from the start and written in place: on a network file system the opening of a
file shows its newest content, while a file that was not there may stay unseen for half a minute.
"""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, TypeVar

from ray_jobs.config import IN_JOB
from ray_jobs.journal import SAVE_S, JournalReader

REQUEST = "stop-requested"  # in the run's folder, written by the driver
LAST_STEP = "stop-after"  # written by worker 0
SIGNALS = (signal.SIGINT, signal.SIGTERM)

_GRACE = "RAY_JOB_STOP_WAIT_TIME_S"
_RAYS_GRACE_S = 3.0
_UNKNOWN_S = 10.0  # a step and a checkpoint of a run that has none of them yet

Item = TypeVar("Item")


class StoppedError(Exception):
    """The run was stopped by a signal; the same command goes on with it."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.exit_code = 128 + signum


def warn_of_short_grace(folder: Path) -> None:
    """Says so if `ray job stop` would kill this driver before its checkpoint is written."""
    if IN_JOB not in os.environ:
        return
    grace, needed = grace_seconds(os.environ), _stop_seconds(folder)
    if grace < needed:
        print(
            f"`ray job stop` will kill this job after {grace:g} s; a step and a checkpoint may take"
            f" {needed:.1f} s, and what came after the last one would be lost: submit with"
            f" --runtime-env configs/runtime_env.yaml, which sets {_GRACE}"
        )


def grace_seconds(variables: Mapping[str, str]) -> float:
    """Between the signal and the kill of a job with these environment variables."""
    return float(variables.get(_GRACE, _RAYS_GRACE_S))


def _stop_seconds(folder: Path) -> float:
    """Of a step and a checkpoint, as the journal has them."""
    records = list(JournalReader(folder).read())
    steps = [after.time - before.time for before, after in pairwise(records)]
    saves = [r.metrics[SAVE_S] for r in records if SAVE_S in r.metrics]
    return median(steps) + saves[-1] if saves else _UNKNOWN_S


class StopSignals:
    """While entered, SIGINT and SIGTERM to this process ask the workers to stop.

    Elsewhere than in the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for name in (REQUEST, LAST_STEP):
            (self._folder / name).write_text("")
        self._before = self.listen()
        return self

    def listen(self) -> dict[int, Any]:
        """Takes the signals, again if need be; who had them before."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {signum: signal.signal(signum, self._handle) for signum in SIGNALS}

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os.write(2, b"second signal: ending at once\n")
            os._exit(128 + signum)
        self.received = signum
        (self._folder / REQUEST).write_text(str(signum))
        os.write(2, b"stopping: a checkpoint at the next step, then the end\n")


class StopBoundary:
    """A worker's side: where its steps end."""

    def __init__(self, folder: Path, rank: int, world: int):
        self._folder, self._rank, self._world = folder, rank, world

    def watch(self, steps: Iterator[tuple[int, Item]]) -> Iterator[tuple[int, Item]]:
        """Passes the steps on up to the last one to do."""
        for step, slots in steps:
            if self._ends_before(step):
                return
            yield step, slots

    def _ends_before(self, step: int) -> bool:
        path = self._folder / LAST_STEP
        if last := path.read_text():
            return step > int(last)
        if self._rank != 0 or not (self._folder / REQUEST).read_text():
            return False
        if self._world == 1:
            return True
        path.write_text(str(step))  # the others may have begun this one
        return False
