"""The data of a run: config, manifests and seed, and what follows from them.

The front doors of the package are `RunData` (made from `index.index_sources`), `read_slots`, which
reads the plan in this process, and `stream.stream_slots`, which brings the same slots through Ray
Data. `read_slots` is what streaming is tested against, and the way to read slots without Ray.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from data_pipeline.files import ShardError
from data_pipeline.layout import describe, layout_of
from data_pipeline.manifest import (
    Segment,
    SourceManifest,
    windows_of_rows,
    windows_of_symbols,
)
from data_pipeline.pack import (
    PackedSlot,
    PackedWindow,
    WindowReport,
    num_micro_batches,
    slice_micro_batch,
)
from data_pipeline.plan import Plan, PlannedSource, States, WindowKey
from data_pipeline.schema import DataConfig
from data_pipeline.window import WindowTask

# A window has at least a micro-batch, and where the source has so much:
WINDOW_SYMBOLS = 8 << 20  # of text and code
WINDOW_BYTES = 32 << 20  # of the other modalities, as stored or as packed, whichever is more
WINDOWS_PER_LANE = 4  # of the other modalities: smaller windows rather than fewer

Windows = tuple[tuple[Segment, ...], ...]


@dataclass(frozen=True)
class RunData:
    """Everything that the slots of a run depend on. Any process can rebuild it alike.

    `states` of the same plan (`states.py`) change nothing: they make late steps near.
    """

    config: DataConfig
    manifests: Mapping[str, SourceManifest]
    seed: int
    states: States = field(default_factory=dict)

    @cached_property
    def windows(self) -> dict[str, Windows]:
        """The training segments of each window of each source."""
        return {
            name: self._cut(name, self.manifests[name].train_segments)
            for name in sorted(self.manifests)
        }

    @cached_property
    def plan(self) -> Plan:
        sources = [
            PlannedSource(
                name,
                self.config.sources[name].weight,
                self._micro_batches(name, windows),
                self.config.sources[name].max_epochs,
                self.config.sources[name].when_exhausted,
            )
            for name, windows in self.windows.items()
        ]
        return Plan(sources, self.config.slots_per_step, self.seed, self.states)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex; two runs with the same have the same slots, symbol for symbol.

        Of media the index knows the layout of the rows, not their content: a shard written again
        with other content and the same sizes has the same fingerprint.
        """
        content = [
            self.plan.fingerprint,
            self.config.batch_size,
            self.config.sequence_length,
            [[name, self.manifests[name].fingerprint] for name in sorted(self.manifests)],
            [
                describe(self.config.media(modality))
                for modality in sorted({m.modality for m in self.manifests.values()})
                if self.config.media(modality)
            ],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def task(self, key: WindowKey) -> "WindowTask":
        """What any process needs to read the window `key`."""
        segments = self.windows[key.source][key.window]
        shuffle_key = (self.seed, key.source, key.epoch, key.window)
        return self._task(key, segments, shuffle_key)

    def held_out_windows(self, source: str) -> "list[tuple[WindowTask, int]]":
        """(task, micro-batches) of each window of the held-out rows; nothing is shuffled."""
        windows = self._cut(source, self.manifests[source].eval_segments)
        tasks = [
            self._task(WindowKey(source, 0, 0, i), segments, None)
            for i, segments in enumerate(windows)
        ]
        return list(zip(tasks, self._micro_batches(source, windows), strict=True))

    def _task(
        self, key: WindowKey, segments: Sequence[Segment], shuffle_key: tuple | None
    ) -> "WindowTask":
        manifest = self.manifests[key.source]
        shards = {segment.shard: manifest.shards[segment.shard] for segment in segments}
        modality = manifest.modality
        return WindowTask(
            key=key,
            modality=modality,
            columns=manifest.columns,
            shards=shards,
            segments=tuple(segments),
            batch_size=self.config.batch_size_of(modality),
            sequence_length=self.config.sequence_length_of(modality),
            media=self.config.media(modality),
            seed=self.seed,
            shuffle_key=shuffle_key,
        )

    def _cut(self, source: str, segments: Sequence[Segment]) -> Windows:
        manifest = self.manifests[source]
        media = self.config.media(manifest.modality)
        if media is None:
            micro_batch = self.config.batch_size * self.config.sequence_length
            return windows_of_symbols(segments, max(WINDOW_SYMBOLS, micro_batch))
        layout = layout_of(media)
        stored = manifest.num_bytes // manifest.rows
        row_bytes = max(stored, layout.places * layout.place_bytes, 1)
        batch_size = self.config.batch_size_of(manifest.modality)
        fair_rows = manifest.rows // (WINDOWS_PER_LANE * self.config.slots_per_step)
        rows = min(WINDOW_BYTES // row_bytes, fair_rows)
        return windows_of_rows(segments, max(1, rows // batch_size) * batch_size)

    def _micro_batches(self, source: str, windows: Windows) -> list[int]:
        modality = self.manifests[source].modality
        size = self.config.batch_size_of(modality)
        if self.config.media(modality):
            return [-(-sum(s.rows for s in window) // size) for window in windows]
        length = self.config.sequence_length
        return [
            num_micro_batches(sum(s.symbols for s in window), size, length) for window in windows
        ]


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
    plan = run_data.plan.with_states(run_data.states)  # this thread's own
    for place in plan.walk(start, stop, rank, world):
        lane = (place.source, place.slot)
        key = WindowKey(*lane, place.epoch, place.window)
        opened = None
        if lane not in held or held[lane][0] != key:
            held.pop(lane, None)  # its memory is free before the next window comes
            window = pull(key)
            opened = window.report
            if window.is_empty:
                window = _substitute(run_data, plan, key)
            held[lane] = (key, window)
        window = held[lane][1]
        slot = (place.step, place.slot, place.source)
        yield _slot(run_data, slot, window, place.micro_batch, opened)


def held_out_slots(run_data: RunData, source: str) -> list[PackedSlot]:
    """The same evaluation slots every time: at most `eval_slots`, evenly over the held-out rows.

    Empty with `eval_fraction` 0, or where no held-out row can be decoded.
    """
    windows = run_data.held_out_windows(source)
    places = [(i, j) for i, (_, count) in enumerate(windows) for j in range(count)]
    count = min(len(places), run_data.config.eval_slots)
    slots, read = [], (-1, None)
    for k in range(count):
        i, micro_batch = places[k * len(places) // count]
        opened = None
        if read[0] != i:
            read = (i, windows[i][0].read()[0])
            opened = read[1].report
        if not read[1].is_empty:
            slots.append(_slot(run_data, (0, k, source), read[1], micro_batch, opened).copy())
    return slots


def _substitute(run_data: RunData, plan: Plan, key: WindowKey) -> PackedWindow:
    """What a lane reads in the place of a window without a good row: the next in the epoch's order.

    Read here and now, because it hardly ever happens. Its faults are told where the plan reads it.
    """
    for window in plan.windows_after(key):
        packed, _ = run_data.task(key._replace(window=window)).read()
        if not packed.is_empty:
            return packed
    raise ShardError(f"{key.source}: not one row of it can be decoded; mend its shards")


def _slot(
    run_data: RunData,
    slot: tuple[int, int, str],
    window: PackedWindow,
    micro_batch: int,
    opened: WindowReport | None,
) -> PackedSlot:
    """Slot (step, slot, source). A window in another's place may have fewer micro-batches."""
    modality = run_data.manifests[slot[2]].modality
    size = run_data.config.batch_size_of(modality)
    index = micro_batch % (len(window.sequences) // size)
    symbols, ids, content = slice_micro_batch(window, index, size)
    return PackedSlot(*slot, modality, symbols, ids, content, opened)
