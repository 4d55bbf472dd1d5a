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
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_pipeline.mixture import NEVER, Limit, Mixture, weight_points
from data_pipeline.permutation import keyed_permutation, random_words

BLOCK_STEPS = 256  # steps worked out at once
TABLE_BLOCKS = 4  # between two states that are kept
CACHED_BLOCKS = 8
CACHED_WINDOWS = 1 << 20  # windows of cached epoch orders, per source
CACHED_EPOCHS = 1024


@dataclass(frozen=True)
class PlannedSource:
    """What the plan knows of a source. `weight` as in `SourceConfig`."""

    name: str
    weight: float | list[list[float]]
    micro_batches_per_window: Sequence[int]
    max_epochs: int = 0  # 0 = no limit
    when_exhausted: str = "drop"

    @property
    def limit(self) -> Limit | None:
        if not self.max_epochs:
            return None
        slots = self.max_epochs * sum(self.micro_batches_per_window)
        return Limit(slots, self.when_exhausted == "stop")


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


States = Mapping[int, Sequence[Sequence[int]]]  # by step: slots served by source and lane
Held = dict[tuple[str, int], WindowKey]  # the window of each (source, lane)


class Plan:
    """The slots of every step of a run, for every rank. `sources` are the active ones.

    `states` are known ones of the same plan, by step (`state`): they make later steps near.
    """

    def __init__(
        self,
        sources: Sequence[PlannedSource],
        slots_per_step: int,
        seed: int,
        states: States | None = None,
    ):
        self.sources = tuple(sources)
        self.slots_per_step = slots_per_step
        self.seed = seed
        points = [weight_points(source.weight) for source in sources]
        self.mixture = Mixture(points, slots_per_step, [source.limit for source in sources])
        self.lanes = [SourceLanes(source, slots_per_step, seed) for source in sources]
        # [block][source, lane]: slots served before the block
        self._served = {0: np.zeros((len(self.sources), slots_per_step), np.int64)}
        for step, served in (states or {}).items():
            assert step % BLOCK_STEPS == 0, f"a state of step {step}"
            self._served[step // BLOCK_STEPS] = np.array(served, np.int64)
        self._blocks: dict[int, _Block] = {}

    def __reduce__(self) -> tuple:
        """Without its caches, which another thread may be changing."""
        return Plan, (self.sources, self.slots_per_step, self.seed)

    def with_states(self, states: States) -> "Plan":
        """The same plan for another thread or process, near to the steps of `states`."""
        return Plan(self.sources, self.slots_per_step, self.seed, states)

    @property
    def end(self) -> int:
        """The first step that limits leave without data; NEVER where there is none."""
        return self.mixture.end

    def state(self, step: int) -> tuple[int, list[list[int]]]:
        """The newest (step, slots served by source and lane) at most at `step`, for `states`."""
        index = step // BLOCK_STEPS // TABLE_BLOCKS * TABLE_BLOCKS
        return index * BLOCK_STEPS, self._served_before(index).tolist()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of everything that the slots follow from."""
        sources = [
            [
                s.name,
                str(weight_points(s.weight)),
                [int(n) for n in s.micro_batches_per_window],
                [s.max_epochs, s.when_exhausted],
            ]
            for s in self.sources
        ]
        content = json.dumps([self.seed, self.slots_per_step, sources])
        return hashlib.sha256(content.encode()).hexdigest()

    def step(self, step: int) -> list[SlotPlan]:
        """The S slots of `step`, by slot."""
        return list(self.walk(step, step + 1, rank=0, world=1))

    def walk(self, start: int, stop: int, rank: int, world: int) -> Iterator[SlotPlan]:
        """The slots of rank `rank` of `world` in steps start .. stop - 1, by (step, slot).

        None from step `end` on.
        """
        names = [source.name for source in self.sources]
        for first, block in self._blocks_between(start, stop, rank, world):
            for row, places in enumerate(zip(*(column.tolist() for column in block), strict=True)):
                for lane, (source, *place) in enumerate(zip(*places, strict=True)):
                    yield SlotPlan(first + row, rank + lane * world, names[source], *place)

    def windows(
        self, start: int, stop: int, rank: int, world: int, held: Held | None = None
    ) -> Iterator[WindowKey]:
        """The windows that `walk` opens, in order: one whenever a lane goes on to another.

        `held` are those open before, and is kept up to date.
        """
        held = {} if held is None else held
        names = [source.name for source in self.sources]
        for _, block in self._blocks_between(start, stop, rank, world):
            opening = np.nonzero(block.may_open())
            places = (column[opening].tolist() for column in block[:3])
            for lane, source, *place in zip(opening[1].tolist(), *places, strict=True):
                key = WindowKey(names[source], rank + lane * world, *place)
                if held.get(key[:2]) != key:
                    held[key[:2]] = key
                    yield key

    def _blocks_between(
        self, start: int, stop: int, rank: int, world: int
    ) -> Iterator[tuple[int, "_Block"]]:
        """(first step, the block's part of the rank's slots) of steps start .. stop - 1."""
        stop = min(stop, self.end)
        for index in range(start // BLOCK_STEPS, -(-stop // BLOCK_STEPS)):
            first = index * BLOCK_STEPS
            rows = slice(max(start - first, 0), stop - first)
            part = (column[rows, rank::world] for column in self._block(index))
            yield first + rows.start, _Block(*part)

    def windows_after(self, key: WindowKey) -> Iterator[int]:
        """The other windows of the source in the order of the key's epoch, from the key's on."""
        names = [source.name for source in self.sources]
        order = self.lanes[names.index(key.source)].order(key.epoch)[0].tolist()
        place = order.index(key.window)
        yield from order[place + 1 :] + order[:place]

    def served(self, step: int) -> np.ndarray:
        """int64 [source, lane]: slots served before `step`; the state of the data at that step."""
        index, row = divmod(step, BLOCK_STEPS)
        before, source = self._served_before(index), self._sources_of(index)
        return self._deal(before, source[:row])[2]

    def _served_before(self, index: int) -> np.ndarray:
        """The state before a block, worked out from the newest one known before it."""
        known = sorted(self._served)
        for i in range(known[bisect_right(known, index) - 1], index):
            after = self._deal(self._served[i], self._sources_of(i))[2]
            self._keep(i + 1, after)
        return self._served[index]

    def _keep(self, index: int, served: np.ndarray) -> None:
        self._served[index] = served
        if (index - 1) % TABLE_BLOCKS:
            self._served.pop(index - 1, None)

    def _sources_of(self, index: int) -> np.ndarray:
        """int64 [BLOCK_STEPS, S]: the source of each slot of block `index`; -1 from `end` on.

        The state before it must be known.
        """
        first = index * BLOCK_STEPS
        size = (BLOCK_STEPS, self.slots_per_step)
        order = np.full(size, -1, np.int64)
        steps = max(0, min(BLOCK_STEPS, self.end - first))
        counts = self._served[index].sum(axis=1)
        count = steps * self.slots_per_step
        order[:steps].flat = self.mixture.serve(first * self.slots_per_step, count, counts)
        words = random_words(order.size, self.seed, "slots", index).reshape(size)
        return np.take_along_axis(order, np.argsort(words, axis=1, kind="stable"), axis=1)

    def _block(self, index: int) -> "_Block":
        if index not in self._blocks:
            if len(self._blocks) >= CACHED_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[index] = self._work_out(index)
        return self._blocks[index]

    def _work_out(self, index: int) -> "_Block":
        served = self._served_before(index)
        source = self._sources_of(index)
        block = _Block(source, *(np.full_like(source, -1) for _ in range(3)))
        lane, count, after = self._deal(served, source)
        for i, lanes in enumerate(self.lanes):
            chosen = source == i
            located = lanes.locate(lane[chosen], count[chosen])
            for column, values in zip(block[1:], located, strict=True):
                column[chosen] = values
        if index + 1 not in self._served:
            self._keep(index + 1, after)
        return block

    def _deal(
        self, served: np.ndarray, source: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lane [step, S] that each slot takes from, its slots served before, the state after)."""
        lane = np.broadcast_to(np.arange(self.slots_per_step), source.shape).copy()
        count, after = np.full_like(source, -1), served.copy()
        for i, lanes in enumerate(self.lanes):
            chosen = source == i
            after[i] += chosen.sum(axis=0)
            if lanes.quotas is None or (after[i] <= lanes.quotas).all():
                count[chosen] = (served[i] + np.cumsum(chosen, axis=0) - 1)[chosen]
            else:
                after[i], lane[chosen], count[chosen] = lanes.deal(served[i], lane[chosen])
        return lane, count, after


class _Block(NamedTuple):
    """int64 [steps, lanes] each."""

    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray
    micro_batch: np.ndarray

    def may_open(self) -> np.ndarray:
        """bool [steps, lanes]: the first slot of its source and lane, or of another window than
        the one before it.
        """
        order = np.argsort(self.source, axis=0, kind="stable")
        places = [np.take_along_axis(column, order, axis=0) for column in self[:3]]
        opens = np.ones(order.shape, bool)
        opens[1:] = np.any([np.diff(place, axis=0) != 0 for place in places], axis=0)
        np.put_along_axis(opens, order, opens.copy(), axis=0)
        return opens


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
        # Rounds before the last one, which may have fewer epochs; there are none without a limit.
        self._full_rounds, self._last_starts, self.quotas = NEVER, self.starts, None
        if source.max_epochs:
            self._full_rounds, epochs = divmod(source.max_epochs, self.epochs_per_round)
            bounds = np.arange(num_lanes + 1) * self.micro_batches * epochs // num_lanes
            self._last_starts = bounds[:-1]
            self.quotas = self._full_rounds * self.lengths + np.diff(bounds)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def deal(self, served: np.ndarray, lanes: np.ndarray) -> tuple[np.ndarray, list, list]:
        """(served after, lanes, slots served before) of slots that ask for `lanes` one by one.

        Where a lane has used up its quota, the one with most left stands in.
        """
        served, taken, counts = served.copy(), [], []
        for lane in lanes.tolist():
            if served[lane] >= self.quotas[lane]:
                lane = int(np.argmax(self.quotas - served))
            taken.append(lane)
            counts.append(int(served[lane]))
            served[lane] += 1
        assert (served <= self.quotas).all(), f"{self._key}: more slots than its limit"
        return served, taken, counts

    def locate(self, lane: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, ...]:
        """(epoch, window, micro_batch) of the slot that `lane` serves after `count` others."""
        turn, offset = np.divmod(count, self.lengths[lane])
        starts = np.where(turn == self._full_rounds, self._last_starts[lane], self.starts[lane])
        epoch, index = np.divmod(starts + offset, self.micro_batches)
        epoch = epoch + turn * self.epochs_per_round
        window, micro_batch = np.empty_like(index), np.empty_like(index)
        for value in np.unique(epoch):
            mask = epoch == value
            order, bounds = self.order(int(value))
            place = np.searchsorted(bounds, index[mask], side="right") - 1
            window[mask], micro_batch[mask] = order[place], index[mask] - bounds[place]
        return epoch, window, micro_batch

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's windows in order, and the micro-batches before each of them."""
        if epoch not in self._orders:
            most = min(CACHED_EPOCHS, CACHED_WINDOWS // len(self._sizes))
            if len(self._orders) > max(4, most):
                self._orders.clear()
            order = keyed_permutation(len(self._sizes), *self._key, "windows", epoch)
            self._orders[epoch] = (order, np.cumsum(self._sizes[order]) - self._sizes[order])
        return self._orders[epoch]


if __name__ == "__main__":
    from data_pipeline.command import end_with
    from data_pipeline.plan_report import plan_command

    end_with(plan_command)
