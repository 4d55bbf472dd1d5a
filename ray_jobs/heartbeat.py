"""Signs of life of a run's workers: each writes `heartbeats/<rank>.json`, the driver reads them.

A worker whose file stays as it is for `SILENCE_S` is stopped or cut off; one that beats but makes
no step for `recovery.step_timeout_s` hangs, unless it or one that it waits for is in a phase that
may take its time. Both are killed, so that Ray starts the workers again.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.processes import describe, end, is_here, replace_text, this_process

HEARTBEATS = "heartbeats"  # in a run's folder
TRAINING = "training"  # the phase in which steps must come
ENDED = "ended"
BEAT_S = 1.0
SILENCE_S = 20.0  # and a second or two to look, to kill and to be told: noticed within 30 s
_WAITING_S = 30.0  # without any worker: told once, as where a cluster has no room for them
_KILL_S = 10.0  # for the order to arrive


class Heartbeat:
    """A worker's own; a thread writes it while the worker computes."""

    def __init__(self, folder: Path, rank: int, token: int):
        self._path = folder / HEARTBEATS / f"{rank}.json"
        self._path.parent.mkdir(exist_ok=True)
        self._values = {
            "token": token,
            "process": this_process(),
            "node": ray.get_runtime_context().get_node_id(),
        }
        self._step, self._phase = -1, "starting"
        self._ended = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        self._thread.start()

    def step(self, step: int) -> None:
        """Step `step` is done."""
        self._phase = TRAINING if self._step >= 0 else "first steps"  # which compile and record
        self._step = step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Until it ends no step is expected."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._phase = ENDED
        self._write()

    def _work(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self._write()
            except OSError as error:
                print(f"{self._path}: could not be written ({error}); trying again")

    def _write(self) -> None:
        values = self._values | {"step": self._step, "phase": self._phase, "time": time.time()}
        replace_text(self._path, json.dumps(values) + "\n")


def newest_beats(folder: Path) -> list[dict[str, Any]]:
    """Of the workers that were started last in the run `folder`."""
    beats = []
    for path in (folder / HEARTBEATS).glob("*.json"):
        with suppress(ValueError):  # a loss of power may have emptied one of an earlier start
            beats.append(json.loads(path.read_text()))
    newest = max((beat["token"] for beat in beats), default=0)
    return [beat for beat in beats if beat["token"] == newest]


@dataclass
class _Seen:
    """What is known of a worker's heartbeat, by the clock of the one who looks."""

    time: float  # by the worker's clock
    changed: float
    progress: tuple[int, str]
    progressed: float
    killed: bool = False


class Watch:
    """A thread of the driver that looks after the workers of the newest group until `close`."""

    def __init__(self, folder: Path, step_timeout_s: float, min_workers: int):
        self._folder, self._step_timeout_s = folder / HEARTBEATS, step_timeout_s
        self._min_workers = min_workers
        self._heard, self._is_told = time.monotonic(), False  # of any worker; that there is none
        self._seen: dict[tuple[int, str, int], _Seen] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                beats = newest_beats(self._folder.parent)
                # While one validates, saves or compiles, the others wait for it in an all-reduce.
                busy = any(beat["phase"] not in (TRAINING, ENDED) for beat in beats)
                for beat in beats:
                    if beat["phase"] != ENDED:
                        self._look(beat, busy)
            except OSError as error:
                print(f"{self._folder}: cannot be watched ({error}); trying again")
            if time.monotonic() - self._heard > _WAITING_S and not self._is_told:
                self._is_told = True
                print(
                    f"no worker for {_WAITING_S:.0f} s: waiting for room for {self._min_workers}"
                    " workers, unless they are slow to start"
                )

    def _look(self, beat: dict[str, Any], busy: bool) -> None:
        now, progress = time.monotonic(), (beat["step"], beat["phase"])
        key = (beat["token"], beat["process"]["place"], beat["process"]["pid"])
        seen = self._seen.setdefault(key, _Seen(beat["time"], now, progress, now))
        if seen.time != beat["time"]:
            seen.time, seen.changed = beat["time"], now
            self._heard, self._is_told = now, False
        if busy or seen.progress != progress:
            seen.progress, seen.progressed = progress, now
        silent, stuck = now - seen.changed, now - seen.progressed
        if seen.killed:
            return
        if silent > SILENCE_S:
            self._kill(beat, seen, f"no sign of life for {silent:.0f} s")
        elif stuck > self._step_timeout_s:
            self._kill(
                beat,
                seen,
                f"no step after step {beat['step'] + 1} for {stuck:.0f} s"
                f" (recovery.step_timeout_s={self._step_timeout_s:g})",
            )

    def _kill(self, beat: dict[str, Any], seen: _Seen, why: str) -> None:
        """On the worker's own node, whichever that is."""
        process = beat["process"]
        try:
            killed = end(process) if is_here(process) else _end_there(process, beat["node"])
        except ray.exceptions.GetTimeoutError:
            print(f"{describe(process)}: {why}; its node has not killed it yet, trying again")
            return
        except ray.exceptions.RayError:  # its node is gone, and it with it
            killed = False
        seen.killed = True
        if killed:
            print(f"{describe(process)}: {why}; killed, the workers start again")


def _end_there(process: dict[str, Any], node: str) -> bool:
    """As `end`, on another host or in another container of this one."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    ending = ray.remote(num_cpus=0)(end).options(scheduling_strategy=there)
    return ray.get(ending.remote(process), timeout=_KILL_S)
