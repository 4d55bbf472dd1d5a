"""`metrics.jsonl` of a run: one line a step, the first record of each step, append only.

Worker 0 writes it; console, MLflow and report read it. A replayed step is not written again.
Between the steps stand notes, for whoever watches the run, and the starts of driver and workers.
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

NAME = "metrics.jsonl"


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
    """Appends records; steps that stand in the file already are passed over."""

    def __init__(self, folder: Path):
        path = folder / NAME
        _drop_torn_line(path)
        lines = list(JournalReader(folder).read_lines())
        self.last_step = max((line.step for line in lines if isinstance(line, Record)), default=0)
        self._starts = Counter(line.process for line in lines if isinstance(line, Start))
        self._file = open(path, "a")  # noqa: SIM115  (open for the life of the run)

    def append(self, step: int, metrics: dict[str, float]) -> None:
        if step <= self.last_step:
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

    def close(self) -> None:
        self._file.close()


class JournalReader:
    """Follows a journal that is still being written; each record is read once."""

    def __init__(self, folder: Path):
        self._path = folder / NAME
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


def _drop_torn_line(path: Path) -> None:
    """A writer that was killed may leave half a line; whole lines before it stay."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "rb+") as file:
            file.truncate(whole)
