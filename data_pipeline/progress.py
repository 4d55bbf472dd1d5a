"""How far a long command is: a bar on a terminal, now and then a line anywhere else; on stderr."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_SECONDS = 5.0


class Progress:
    """A context; `total` is in bytes of shards."""

    def __init__(self, what: str, total: float):
        self._what, self._total = what, max(total, 1)
        self._done, self._rows = 0.0, 0
        self._started = self._said = time.monotonic()
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            self._bar = RichProgress(
                TextColumn(what),
                BarColumn(),
                TextColumn("{task.percentage:.0f} %  {task.fields[rows]:,} rows"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(what, total=self._total, rows=0)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, num_bytes: float, rows: int) -> None:
        self._done += num_bytes
        self._rows += rows
        if self._bar:
            self._bar.update(self._task, completed=self._done, rows=self._rows)
            return
        now = time.monotonic()
        if now - self._said > LINE_SECONDS:
            self._said = now
            left = (self._total - self._done) / self._done * (now - self._started)
            share = self._done / self._total
            print(
                f"{self._what}: {share:.0%}, {self._rows:,} rows, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
