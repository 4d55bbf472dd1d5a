"""`metrics.jsonl` of a run: one line a step, the first record of each step, append only.

Worker 0 writes it; console, MLflow and report read it. A replayed step is not written again, but
must have the same metrics. Between the steps stand notes, for whoever watches the run, and the
starts of driver and workers.
"""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files import drop_torn_line

JOURNAL = "metrics.jsonl"
SAVE_S = "checkpoint/save_s"
CHANGED = "from here on"  # how a note begins after which steps need not repeat those before it
_OF_THE_MOMENT = ("throughput/", "checkpoint/", "system/", "run/", "data/")  # do not repeat


class ReplayError(RuntimeError):
    """A step that was done before gave other metrics now."""


@dataclass(frozen=True)
class Record:
    """Metrics of one step; `step` counts the steps done, `time` is in seconds since 1970."""

    step: int
    time: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Note:
    """Something that happened, in words."""

    time: float
    note: str


@dataclass(frozen=True)
class Start:
    """A process that begins to train, or to have trained, what comes after step `after_step`."""

    time: float
    after_step: int
    process: str  # "driver", or "worker" for worker 0
    pid: int
    host: str


Line = Record | Note | Start


class Journal:
    """Appends records; steps that stand in the file already are compared with it.

    `start` steps are done: what was recorded of them is not needed any more.
    """

    def __init__(self, folder: Path, start: int = 0):
        path = folder / JOURNAL
        drop_torn_line(path)
        self.last_step = 0
        self._starts: Counter[str] = Counter()
        self._replayed: dict[int, dict[str, float]] = {}
        for line in JournalReader(folder).read_lines():
            self._take(line, start)
        self._file = open(path, "a")  # noqa: SIM115  (open for the life of the run)

    def _take(self, line: Line, start: int) -> None:
        if isinstance(line, Record):
            self.last_step = max(self.last_step, line.step)
            if line.step > start:
                self._replayed[line.step] = line.metrics
        elif isinstance(line, Start):
            self._starts[line.process] += 1
        elif line.note.startswith(CHANGED):
            self._replayed = {}

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """Raises ReplayError where the step is recorded with other metrics than these."""
        if step <= self.last_step:
            _compare(step, self._replayed.pop(step, {}), metrics)
            return
        self._write(Record(step, time.time(), metrics))
        self.last_step = step

    def note(self, text: str) -> None:
        self._write(Note(time.time(), text))

    def begin(self, after_step: int, process: str) -> int:
        """Notes a start; how many times such a process had started before."""
        self._write(Start(time.time(), after_step, process, os.getpid(), socket.gethostname()))
        self._starts[process] += 1
        return self._starts[process] - 1

    def _write(self, line: Line) -> None:
        self._file.write(json.dumps(asdict(line)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """All lines so far outlast a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class JournalReader:
    """Follows a journal that is still being written; each record is read once."""

    def __init__(self, folder: Path):
        self._path = folder / JOURNAL
        self._offset = 0

    def read(self) -> Iterator[Record]:
        """The records added since the last call."""
        return (line for line in self.read_lines() if isinstance(line, Record))

    def read_lines(self) -> Iterator[Line]:
        """All lines added since the last call; one that is still being written waits."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield _parse(json.loads(line))


def _parse(values: dict[str, Any]) -> Line:
    if "note" in values:
        return Note(**values)
    return Start(**values) if "after_step" in values else Record(**values)


def _compare(step: int, first: dict[str, float], now: dict[str, float]) -> None:
    """Only what both have: the interval of evaluations may have changed between them."""
    different = [
        f"{key} {first[key]!r} -> {now[key]!r}"
        for key in sorted(first.keys() & now.keys())
        if first[key] != now[key] and not key.startswith(_OF_THE_MOMENT)
    ]
    if different:
        raise ReplayError(
            f"step {step} does not repeat what is recorded of it ({'; '.join(different[:5])}):"
            " something in its data, program or machine has changed"
        )
