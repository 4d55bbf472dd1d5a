"""`metrics.jsonl` of a run: one line a step, the first record of each step, append only.

Worker 0 writes it; the console and MLflow read it. A replayed step is not written again. Between
the steps stand notes, for whoever watches the run.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

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


class Journal:
    """Appends records; steps that stand in the file already are passed over."""

    def __init__(self, folder: Path):
        path = folder / NAME
        _drop_torn_line(path)
        self.last_step = max((record.step for record in JournalReader(folder).read()), default=0)
        self._file = open(path, "a")  # noqa: SIM115  (open for the life of the run)

    def append(self, step: int, metrics: dict[str, float]) -> None:
        if step <= self.last_step:
            return
        self._write(Record(step, time.time(), metrics))
        self.last_step = step

    def note(self, text: str) -> None:
        self._write(Note(time.time(), text))

    def _write(self, line: Record | Note) -> None:
        self._file.write(json.dumps(asdict(line)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class JournalReader:
    """Follows a journal that is still being written; each record is read once."""

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self._offset = 0

    def is_empty(self) -> bool:
        return not self._path.exists() or self._path.stat().st_size == 0

    def read(self) -> Iterator[Record]:
        """The records added since the last call."""
        return (line for line in self.read_lines() if isinstance(line, Record))

    def read_lines(self) -> Iterator[Record | Note]:
        """Records and notes added since the last call; a line still being written waits."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                values = json.loads(line)
                yield Note(**values) if "note" in values else Record(**values)


def _drop_torn_line(path: Path) -> None:
    """A writer that was killed may leave half a line; whole lines before it stay."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "rb+") as file:
            file.truncate(whole)
