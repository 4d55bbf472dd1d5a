"""The data of a run: config, manifests and seed, and what follows from them.

`read_slots` reads the plan in this process. It is what `stream.py` is tested against, and the way
to read slots without Ray.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from data_pipeline.manifest import Segment, SourceManifest, window_segments
from data_pipeline.pack import (
    PackedSlot,
    PackedWindow,
    num_micro_batches,
    pack_window,
    slice_micro_batch,
)
from data_pipeline.plan import Plan, PlannedSource, WindowKey
from data_pipeline.read import read_segments
from data_pipeline.row_id import join_digests
from data_pipeline.schema import DataConfig

WINDOW_SYMBOLS = 1 << 20  # at least, where the source has them; and at least one micro-batch

Windows = tuple[tuple[Segment, ...], ...]


@dataclass(frozen=True)
class RunData:
    """Everything that the slots of a run depend on. Any process can rebuild it alike."""

    config: DataConfig
    manifests: Mapping[str, SourceManifest]
    seed: int

    @cached_property
    def windows(self) -> dict[str, Windows]:
        """The training segments of each window of each source."""
        return {
            name: self._cut(self.manifests[name].train_segments) for name in sorted(self.manifests)
        }

    @cached_property
    def plan(self) -> Plan:
        sources = [
            PlannedSource(name, self.config.sources[name].weight, self._micro_batches(windows))
            for name, windows in self.windows.items()
        ]
        return Plan(sources, self.config.slots_per_step, self.seed)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex; two runs with the same have the same slots, symbol for symbol."""
        content = [
            self.plan.fingerprint,
            self.config.batch_size,
            self.config.sequence_length,
            [[name, self.manifests[name].fingerprint] for name in sorted(self.manifests)],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def task(self, key: WindowKey) -> "WindowTask":
        """What any process needs to read the window `key`."""
        segments = self.windows[key.source][key.window]
        shuffle_key = (self.seed, key.source, key.epoch, key.window)
        return self._task(key, segments, shuffle_key)

    def held_out_windows(self, source: str) -> "list[tuple[WindowTask, int]]":
        """(task, micro-batches) of each window of the held-out rows; nothing is shuffled."""
        windows = self._cut(self.manifests[source].eval_segments)
        tasks = [
            self._task(WindowKey(source, 0, 0, i), segments, None)
            for i, segments in enumerate(windows)
        ]
        return list(zip(tasks, self._micro_batches(windows), strict=True))

    def _task(
        self, key: WindowKey, segments: Sequence[Segment], shuffle_key: tuple | None
    ) -> "WindowTask":
        manifest = self.manifests[key.source]
        shards = {segment.shard: manifest.shards[segment.shard] for segment in segments}
        config = self.config
        return WindowTask(
            key=key,
            text_column=manifest.text_column,
            shards=shards,
            segments=tuple(segments),
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            shuffle_key=shuffle_key,
        )

    def _cut(self, segments: Sequence[Segment]) -> Windows:
        micro_batch = self.config.batch_size * self.config.sequence_length
        return window_segments(segments, max(WINDOW_SYMBOLS, micro_batch))

    def _micro_batches(self, windows: Windows) -> list[int]:
        size = self.config.batch_size, self.config.sequence_length
        return [num_micro_batches(sum(s.symbols for s in window), *size) for window in windows]


@dataclass(frozen=True)
class WindowTask:
    """One window to read: sent to whichever process reads it."""

    key: WindowKey
    text_column: str
    shards: dict[int, str]  # paths of the shards that the segments name
    segments: tuple[Segment, ...]
    batch_size: int
    sequence_length: int
    shuffle_key: tuple[str | int, ...] | None

    @property
    def digest(self) -> str:
        """Of the rows, as indexed."""
        return join_digests(segment.digest for segment in self.segments)

    def read(self) -> tuple[PackedWindow, str]:
        """The window, and the digest of the rows that were really read.

        Raises ShardError where they cannot be read as they were indexed.
        """
        rows, digest = read_segments(self.shards, self.text_column, self.segments)
        shape = self.batch_size, self.sequence_length
        return pack_window(rows, *shape, self.shuffle_key), digest


def read_slots(
    run_data: RunData, start: int, stop: int, rank: int, world: int
) -> Iterator[PackedSlot]:
    """The slots of rank `rank` of `world` in steps start .. stop - 1, by (step, slot)."""

    def pull(key: WindowKey) -> PackedWindow:
        return run_data.task(key).read()[0]

    return slots_from(pull, run_data, start, stop, rank, world)


def slots_from(
    pull: Callable[[WindowKey], PackedWindow],
    run_data: RunData,
    start: int,
    stop: int,
    rank: int,
    world: int,
) -> Iterator[PackedSlot]:
    """Walks the plan and slices; `pull` is called for the windows of `Plan.windows`, in order."""
    held: dict[tuple[str, int], tuple[WindowKey, PackedWindow]] = {}
    for place in run_data.plan.walk(start, stop, rank, world):
        lane = (place.source, place.slot)
        key = WindowKey(*lane, place.epoch, place.window)
        if lane not in held or held[lane][0] != key:
            held.pop(lane, None)  # its memory is free before the next window comes
            held[lane] = (key, pull(key))
        window = held[lane][1]
        yield _slot(run_data, place.step, place.slot, place.source, window, place.micro_batch)


def held_out_slots(run_data: RunData, source: str) -> list[PackedSlot]:
    """The same evaluation slots every time: at most `eval_slots`, evenly over the held-out rows.

    Empty with `eval_fraction` 0.
    """
    windows = run_data.held_out_windows(source)
    places = [(i, j) for i, (_, count) in enumerate(windows) for j in range(count)]
    count = min(len(places), run_data.config.eval_slots)
    slots, read = [], (-1, None)
    for k in range(count):
        i, micro_batch = places[k * len(places) // count]
        if read[0] != i:
            read = (i, windows[i][0].read()[0])
        slots.append(_slot(run_data, 0, k, source, read[1], micro_batch))
    return slots


def _slot(
    run_data: RunData, step: int, slot: int, source: str, window: PackedWindow, micro_batch: int
) -> PackedSlot:
    symbols, ids = slice_micro_batch(window, micro_batch, run_data.config.batch_size)
    return PackedSlot(step, slot, source, run_data.manifests[source].modality, symbols, ids)
