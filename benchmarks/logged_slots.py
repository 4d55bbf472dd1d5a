"""What workers wrote down of their slots (`log_slots`), compared with the plan."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from data_pipeline.run_data import RunData, read_slots
from ray_jobs.slots import logged_slots

Place = tuple[int, int]  # step, slot
Seen = tuple[str, list[int], str]  # source, row ids, sha256


class Attempt(NamedTuple):
    """One start of a job: steps start .. stop - 1 are those that it committed."""

    folder: Path  # of the files slots-<rank>.jsonl
    start: int
    stop: int


class SlotError(AssertionError):
    """What was logged is not the plan."""


def check(data: RunData, steps: int, attempts: Sequence[Attempt]) -> dict[str, int]:
    """Counts what was compared. Raises SlotError.

    Every committed step must have each slot of the plan once, and all that was ever logged the rows
    and bytes that reading the plan in this process gives.
    """
    slots = read_slots(data, 0, steps, 0, 1)
    expected = {(s.step, s.slot): (s.source, s.row_ids.tolist(), s.sha256) for s in slots}
    check_rows(data, steps, expected)
    seen: set[Place] = set()
    compared = replayed = 0
    for attempt in attempts:
        logged: Counter[Place] = Counter()
        for entry in chain.from_iterable(logged_slots(attempt.folder)[0].values()):
            place = (entry["step"], entry["slot"])
            if (entry["source"], entry["row_ids"], entry["sha256"]) != expected[place]:
                raise SlotError(f"{attempt}: step and slot {place} are not the plan's: {entry}")
            logged[place] += 1
        _check_committed(attempt, logged, data.config.slots_per_step)
        compared += logged.total()
        replayed += len(seen & logged.keys())
        seen |= logged.keys()
    covered = [step for attempt in attempts for step in range(attempt.start, attempt.stop)]
    if covered != list(range(steps)):
        raise SlotError(f"the {len(covered)} committed steps are not 0 to {steps - 1}")
    return {
        "slots_of_plan": len(expected),
        "slots_compared": compared,
        "slots_replayed": replayed,
    }


def _check_committed(attempt: Attempt, logged: Counter[Place], slots_per_step: int) -> None:
    found = Counter({p: n for p, n in logged.items() if attempt.start <= p[0] < attempt.stop})
    steps = range(attempt.start, attempt.stop)
    if found != Counter((step, slot) for step in steps for slot in range(slots_per_step)):
        raise SlotError(f"{attempt}: a slot is missing or doubled")


def check_rows(data: RunData, steps: int, slots: dict[Place, Seen]) -> None:
    """Each slot has rows of the window that the plan says, and all micro-batches of a window have
    all of its rows, going by the Parquet columns alone. Raises SlotError.
    """
    columns = ParquetColumns(data)
    taken: dict[tuple[str, int, int], set[int]] = defaultdict(set)
    micro_batches: dict[tuple[str, int, int], set[int]] = defaultdict(set)
    for place in data.plan.walk(0, steps, 0, 1):
        source, row_ids, _ = slots[place.step, place.slot]
        if source != place.source:
            raise SlotError(f"{place}: serves {source}")
        window = (source, place.epoch, place.window)
        taken[window] |= set(row_ids)
        micro_batches[window].add(place.micro_batch)
    sizes = {source.name: source.micro_batches_per_window for source in data.plan.sources}
    for (source, epoch, window), found in taken.items():
        rows = columns.of_window(source, window)
        is_whole = len(micro_batches[source, epoch, window]) == sizes[source][window]
        if found - rows or (is_whole and found != rows):
            raise SlotError(f"{source}, window {window}: other rows than its shards hold")


@dataclass(frozen=True)
class ParquetColumns:
    """Row ids from the columns of the shards, read and hashed here."""

    data: RunData

    def of_window(self, source: str, window: int) -> set[int]:
        ids = self._ids[source]
        segments = self.data.windows[source][window]
        return {
            ids[s.shard][s.first_row + row]
            for s in segments
            for row in range(s.row_start, s.row_stop)
        } - {None}

    @cached_property
    def _ids(self) -> dict[str, list[list[int | None]]]:
        return {
            name: [list(_row_ids(shard, manifest.modality)) for shard in manifest.shards]
            for name, manifest in self.data.manifests.items()
        }


def _row_ids(shard: str, modality: str) -> Iterable[int | None]:
    """None for an empty text, which is in no slot."""
    table = pq.read_table(shard)
    texts = [text.encode() for text in table["text"].to_pylist()]
    if modality in ("text", "code"):
        return (_hash(text) if text else None for text in texts)
    contents = [value["bytes"] for value in table[modality].to_pylist()]
    return (
        _hash(len(text).to_bytes(8, "little") + text + content)
        for text, content in zip(texts, contents, strict=True)
    )


def _hash(content: bytes) -> int:
    return int(np.frombuffer(blake2b(content, digest_size=8).digest(), "<i8")[0])
