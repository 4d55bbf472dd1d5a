"""The plan: from (seed, step, slot) to a micro-batch of a window, as a pure function.

A step has S slots. `Mixture` says which source each slot serves, a seeded permutation inside the
step says at which place, and slot (step, j) takes the next micro-batch of lane (source, j): each
source has S lanes, contiguous equal parts of its windows in the epoch's seeded order. A source
with fewer micro-batches than lanes deals several epochs (a round) at once. So over a round every
micro-batch is taken exactly once, and rank r of N, which serves the slots j with j mod N = r, reads
whole lanes: the slots are the same for every N.

State at a step is how many slots each lane has served; it is kept every `BLOCK_STEPS` steps.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_pipeline.mixture import Mixture, weight_points
from data_pipeline.permutation import keyed_permutation, random_words

BLOCK_STEPS = 256  # steps worked out at once, and between two kept states
CACHED_BLOCKS = 8
CACHED_WINDOWS = 1 << 20  # windows of cached epoch orders, per source


@dataclass(frozen=True)
class PlannedSource:
    """What the plan knows of a source. `weight` as in `SourceConfig`."""

    name: str
    weight: float | list[list[float]]
    micro_batches_per_window: Sequence[int]


class SlotPlan(NamedTuple):
    """One slot: micro-batch `micro_batch` of window `window`, as shuffled in `epoch`."""

    step: int
    slot: int
    source: str
    epoch: int
    window: int
    micro_batch: int


class WindowKey(NamedTuple):
    """A window as one lane reads it; the lane is the slot index that it serves."""

    source: str
    lane: int
    epoch: int
    window: int


class Plan:
    """The slots of every step of a run, for every rank. `sources` are the active ones."""

    def __init__(self, sources: Sequence[PlannedSource], slots_per_step: int, seed: int):
        self.sources = tuple(sources)
        self.slots_per_step = slots_per_step
        self.seed = seed
        self.mixture = Mixture([weight_points(s.weight) for s in sources], slots_per_step)
        self.lanes = [SourceLanes(source, slots_per_step, seed) for source in sources]
        # [block][source, lane]: slots served before the block
        self._served = [np.zeros((len(self.sources), slots_per_step), np.int64)]
        self._blocks: dict[int, _Block] = {}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of everything that the slots follow from."""
        sources = [
            [s.name, str(weight_points(s.weight)), [int(n) for n in s.micro_batches_per_window]]
            for s in self.sources
        ]
        content = json.dumps([self.seed, self.slots_per_step, sources])
        return hashlib.sha256(content.encode()).hexdigest()

    def step(self, step: int) -> list[SlotPlan]:
        """The S slots of `step`, by slot."""
        return list(self.walk(step, step + 1, rank=0, world=1))

    def walk(self, start: int, stop: int, rank: int, world: int) -> Iterator[SlotPlan]:
        """The slots of rank `rank` of `world` in steps start .. stop - 1, by (step, slot)."""
        names = [source.name for source in self.sources]
        for index in range(start // BLOCK_STEPS, -(-stop // BLOCK_STEPS)):
            first = index * BLOCK_STEPS
            rows = range(max(start - first, 0), min(stop - first, BLOCK_STEPS))
            lists = [column[:, rank::world].tolist() for column in self._block(index)]
            for row in rows:
                places = zip(*(column[row] for column in lists), strict=True)
                for lane, (source, epoch, window, micro_batch) in enumerate(places):
                    slot = rank + lane * world
                    yield SlotPlan(first + row, slot, names[source], epoch, window, micro_batch)

    def windows(self, start: int, stop: int, rank: int, world: int) -> Iterator[WindowKey]:
        """The windows that `walk` opens, in order: one whenever a lane goes on to another."""
        held: dict[tuple[str, int], WindowKey] = {}
        for slot in self.walk(start, stop, rank, world):
            key = WindowKey(slot.source, slot.slot, slot.epoch, slot.window)
            if held.get(key[:2]) != key:
                held[key[:2]] = key
                yield key

    def served(self, step: int) -> np.ndarray:
        """int64 [source, lane]: slots served before `step`; the state of the data at that step."""
        index, row = divmod(step, BLOCK_STEPS)
        before, block = self._served_before(index), self._block(index)
        return before + _one_hot(block.source[:row], len(self.sources)).sum(axis=1)

    def _served_before(self, index: int) -> np.ndarray:
        while len(self._served) <= index:
            self._sources_of(len(self._served) - 1)
        return self._served[index]

    def _sources_of(self, index: int) -> np.ndarray:
        """int64 [BLOCK_STEPS, S]: the source of each slot of block `index`.

        Keeps the state after the block too. The state before it must be known.
        """
        size = (BLOCK_STEPS, self.slots_per_step)
        counts = self._served[index].sum(axis=1)
        first = index * BLOCK_STEPS * self.slots_per_step
        order = np.array(self.mixture.serve(first, size[0] * size[1], counts)).reshape(size)
        words = random_words(order.size, self.seed, "slots", index).reshape(size)
        source = np.take_along_axis(order, np.argsort(words, axis=1, kind="stable"), axis=1)
        if len(self._served) == index + 1:
            served = _one_hot(source, len(self.sources)).sum(axis=1)
            self._served.append(self._served[index] + served)
        return source

    def _block(self, index: int) -> "_Block":
        if index not in self._blocks:
            if len(self._blocks) >= CACHED_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[index] = self._work_out(index)
        return self._blocks[index]

    def _work_out(self, index: int) -> "_Block":
        served = self._served_before(index)
        source = self._sources_of(index)
        block = _Block(source, *(np.empty_like(source) for _ in range(3)))
        for i, chosen in enumerate(_one_hot(source, len(self.sources))):
            count = served[i] + np.cumsum(chosen, axis=0) - 1  # before the slot itself
            lane = np.nonzero(chosen)[1]
            located = self.lanes[i].locate(lane, count[chosen])
            for column, values in zip(block[1:], located, strict=True):
                column[chosen] = values
        return block


class _Block(NamedTuple):
    """int64 [BLOCK_STEPS, S] each."""

    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray
    micro_batch: np.ndarray


def _one_hot(source: np.ndarray, num_sources: int) -> np.ndarray:
    """bool [source, step, lane]."""
    return source[None] == np.arange(num_sources)[:, None, None]


class SourceLanes:
    """The lanes of one source: which micro-batch a lane's c-th slot is."""

    def __init__(self, source: PlannedSource, num_lanes: int, seed: int):
        self._key = (seed, source.name)
        self._sizes = np.asarray(source.micro_batches_per_window, np.int64)
        assert self._sizes.size and self._sizes.min() > 0, f"{source.name}: an empty window"
        self.micro_batches = int(self._sizes.sum())
        self.epochs_per_round = -(-num_lanes // self.micro_batches)
        bounds = np.arange(num_lanes + 1) * self.micro_batches * self.epochs_per_round // num_lanes
        self.starts, self.lengths = bounds[:-1], np.diff(bounds)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, lane: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, ...]:
        """(epoch, window, micro_batch) of the slot that `lane` serves after `count` others."""
        turn, offset = np.divmod(count, self.lengths[lane])
        epoch, index = np.divmod(self.starts[lane] + offset, self.micro_batches)
        epoch = epoch + turn * self.epochs_per_round
        window, micro_batch = np.empty_like(index), np.empty_like(index)
        for value in np.unique(epoch):
            mask = epoch == value
            order, bounds = self._order(int(value))
            place = np.searchsorted(bounds, index[mask], side="right") - 1
            window[mask], micro_batch[mask] = order[place], index[mask] - bounds[place]
        return epoch, window, micro_batch

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's windows in order, and the micro-batches before each of them."""
        if epoch not in self._orders:
            if len(self._orders) > max(4, CACHED_WINDOWS // len(self._sizes)):
                self._orders.clear()
            order = keyed_permutation(len(self._sizes), *self._key, "windows", epoch)
            self._orders[epoch] = (order, np.cumsum(self._sizes[order]) - self._sizes[order])
        return self._orders[epoch]
