"""Rows that cannot be decoded: written down once, counted, and too many of them stop the run.

Each worker writes what it finds into a file of the run folder; which rows are replaced by which
others is the same for any number of workers (`pack.py`), only who finds them first is not.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.files import drop_torn_line
from data_pipeline.pack import Fault, PackedSlot, WindowReport
from data_pipeline.run_data import RunData

PATTERN = "bad-rows-*.jsonl"
MIN_ROWS = 1000  # or a whole source: of fewer no fraction is taken
LISTED = 10


class BadDataError(RuntimeError):
    """More rows of a source than `data.max_bad_fraction` cannot be decoded."""


class BadRows:
    """One worker's account. `truncated` counts captions that did not fit, by source."""

    def __init__(self, folder: Path, rank: int, run_data: RunData):
        self._folder, self._run_data = folder, run_data
        self._path = folder / PATTERN.replace("*", str(rank))
        drop_torn_line(self._path)
        self._known = {(entry["source"], entry["shard"], entry["row"]) for entry in self._read()}
        self._size = -1
        self._counts: dict[str, int] = {}
        self._seen: Counter[str] = Counter()
        self._bad: dict[str, dict[tuple, Fault]] = {}  # by source, by place
        self.truncated: Counter[str] = Counter()

    def watch(self, slots: Iterator[PackedSlot]) -> Iterator[PackedSlot]:
        """Passes the slots on. Raises BadDataError."""
        for slot in slots:
            if slot.opened is not None:
                self._take(slot.source, slot.opened)
            yield slot

    def list_held_out(self, slots: Iterable[PackedSlot]) -> None:
        """Writes down the bad rows among held-out ones; they stop nothing."""
        for slot in slots:
            if slot.opened is not None and slot.opened.faults:
                self._write(slot.source, slot.opened.faults)

    def counts(self) -> dict[str, int]:
        """Bad rows by source, found by all workers up to now."""
        size = sum(path.stat().st_size for path in self._folder.glob(PATTERN))
        if size != self._size:
            self._size = size
            rows = {(entry["source"], entry["shard"], entry["row"]) for entry in self._read()}
            self._counts = dict(Counter(source for source, _, _ in rows))
        return self._counts

    def _take(self, source: str, report: WindowReport) -> None:
        self._seen[source] += report.rows
        self.truncated[source] += report.truncated
        if not report.faults:
            return
        self._write(source, report.faults)
        bad = self._bad.setdefault(source, {})
        bad.update((fault[:2], fault) for fault in report.faults)
        rows = min(self._run_data.manifests[source].rows, max(self._seen[source], MIN_ROWS))
        allowed = self._run_data.config.max_bad_fraction
        if len(bad) > allowed * rows:
            last = list(bad.values())[-LISTED:]
            found = "; ".join(f"{fault.shard} row {fault.row}: {fault.reason}" for fault in last)
            raise BadDataError(
                f"data.sources.{source}: {len(bad)} of about {rows} rows cannot be decoded, above"
                f" data.max_bad_fraction={allowed}: {found}; all of them stand in"
                f" {self._folder / PATTERN}"
            )

    def _write(self, source: str, faults: tuple[Fault, ...]) -> None:
        fresh = [fault for fault in faults if (source, *fault[:2]) not in self._known]
        self._known.update((source, *fault[:2]) for fault in fresh)
        with open(self._path, "a") as file:
            for fault in fresh:
                file.write(json.dumps({"source": source, **fault._asdict()}) + "\n")

    def _read(self) -> Iterator[dict]:
        for path in sorted(self._folder.glob(PATTERN)):
            for line in path.read_bytes().split(b"\n")[:-1]:
                yield json.loads(line)
