"""Which source serves which slot: weight schedules and the chairman assignment, integers only.

Weights become millionths per step that sum to exactly `MILLION`. The slots of all steps form one
row, n = step * slots_per_step + k. R. Tijdeman, "The chairman assignment problem" (Discrete
Mathematics 32, 1980), serves each slot so that at every moment, for any sequence of weights, each
source is within one slot of its exact share. It looks ahead along the schedule, never at the
length of the run: a longer run starts with the same slots.

A source with a limit is due no more slots than that. It is worked out beforehand in which step it
ends, so that its share goes over to the others there and the bound holds through it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

MILLION = 1_000_000
NEVER = 1 << 62  # a slot index that no run reaches

Points = tuple[tuple[int, Fraction], ...]


def weight_points(weight: float | list[list[float]]) -> Points:
    """((step, weight), ...) of a constant or a [[step, weight], ...] schedule, exact decimals."""
    if isinstance(weight, int | float):
        return ((0, Fraction(str(weight))),)
    return tuple((int(step), Fraction(str(value))) for step, value in weight)


def weight_at(points: Points, step: int) -> Fraction:
    """Piecewise linear between the points, constant before the first and after the last."""
    if step <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if step < right:
            return low + (high - low) * (step - left) / (right - left)
    return points[-1][1]


@dataclass(frozen=True)
class Limit:
    """At most `slots` of a source; with `stops` the run ends before the step that needs more."""

    slots: int
    stops: bool = False


class Mixture:
    """The slots of every step, dealt to `schedules` (one `Points` a source), within `limits`.

    At each step at least one weight must be above zero. State is the number of slots each source
    has served (`counts`), so that any slot is reachable from any earlier one. `end` is the step
    that cannot be filled, NEVER where there is none.
    """

    def __init__(
        self,
        schedules: Sequence[Points],
        slots_per_step: int,
        limits: Sequence[Limit | None] | None = None,
    ):
        self.num_sources = len(schedules)
        self.slots_per_step = slots_per_step
        runs = _Runs(schedules, slots_per_step, limits or [None] * len(schedules))
        # Runs of steps with the same weights: run i starts with step starts[i].
        self.starts, self.millionths, self.end = runs.starts, runs.millionths, runs.end
        self._before = runs.before  # [source, run]: millionths of a slot due before the run

    def due(self, source: int, slot: int) -> int:
        """Millionths of a slot that `source` should have served once `slot` is over."""
        run = int(np.searchsorted(self.starts, slot // self.slots_per_step, side="right")) - 1
        slots = slot + 1 - int(self.starts[run]) * self.slots_per_step
        return int(self._before[source, run]) + slots * int(self.millionths[source, run])

    def serve(self, first: int, count: int, counts: Sequence[int]) -> list[int]:
        """The sources of slots first .. first + count - 1, after `counts` slots before them."""
        if self.num_sources == 1 or not count:
            return [0] * count
        stop = first + count
        windows = [self._windows(i, int(value), stop) for i, value in enumerate(counts)]
        release, deadline = map(list, zip(*map(next, windows), strict=True))
        order = []
        for slot in range(first, stop):
            chosen, earliest = -1, NEVER + 1
            for i, end in enumerate(deadline):
                if end < earliest and release[i] <= slot:
                    chosen, earliest = i, end
            assert chosen >= 0, f"no source is eligible for slot {slot}"
            order.append(chosen)
            release[chosen], deadline[chosen] = next(windows[chosen])
        return order

    def _windows(self, source: int, served: int, stop: int) -> Iterator[tuple[int, int]]:
        """(first, last slot) in which `source` may serve after `served` slots, after one more ...

        As many as it can serve before slot `stop`, and one.
        """
        count = -(-self.due(source, stop - 1) // MILLION) - served + 3
        numbers = served + np.arange(max(2, count))
        first, last = (self._reaches(source, numbers, n) for n in (1, 2 * self.num_sources - 3))
        return zip(first.tolist(), last.tolist(), strict=True)

    def _reaches(self, source: int, served: np.ndarray, part: int) -> np.ndarray:
        """First slot n with due(source, n) - served >= part / (2 * num_sources - 2) slots."""
        total = served * MILLION - (-part * MILLION // (2 * self.num_sources - 2))
        run = np.searchsorted(self._before[source], total) - 1
        share = self.millionths[source, run]
        slots = -(-(total - self._before[source, run]) // np.maximum(share, 1))
        return np.where(share, self.starts[run] * self.slots_per_step + slots - 1, NEVER)


class _Runs:
    """Works schedules and limits out: starts int64 [run], millionths and before [source, run]."""

    def __init__(
        self, schedules: Sequence[Points], slots_per_step: int, limits: Sequence[Limit | None]
    ):
        self._schedules, self._slots, self._limits = list(schedules), slots_per_step, limits
        self._due = [0] * len(schedules)  # before the next step
        self._starts: list[np.ndarray] = []
        self._columns: list[np.ndarray] = []
        self.end = NEVER
        breaks = sorted({0, *(step for points in schedules for step, _ in points)})
        for left, right in zip(breaks, [*breaks[1:], NEVER], strict=True):
            step = left
            while step < right and self.end == NEVER:
                step = self._add_steps(left, right, step)
        if not self._starts:
            self._append(0, np.zeros((len(schedules), 1), np.int64), 1)  # not even one step
        self.starts = np.concatenate(self._starts)
        self.millionths = np.concatenate(self._columns, axis=1)
        slots = np.diff(self.starts) * slots_per_step
        due = np.cumsum(self.millionths[:, :-1] * slots, axis=1)
        self.before = np.pad(due, ((0, 0), (1, 0)))

    def _add_steps(self, left: int, right: int, step: int) -> int:
        """Adds the steps from `step` to the first one in which a source ends; the step after."""
        start, slope = _line_through(self._schedules, left, right)
        if sum(start) + sum(slope) * (step - left) == 0:
            self.end = step  # every source has ended
            return step
        x = np.arange(step - left, right - left if any(slope) else step - left + 1)
        columns = _share_out(start, slope, x, MILLION)
        full = min(right - step, *map(self._full_steps, range(len(start)), columns.tolist()))
        if full:
            columns = columns[:, :full]
            self._append(step, columns, full if columns.shape[1] == 1 else 1)
        if step + full < right:
            at = [a + b * (step + full - left) for a, b in zip(start, slope, strict=True)]
            self._add_last_step(step + full, at)
            full += 1
        return step + full

    def _full_steps(self, source: int, shares: list[int]) -> int:
        """Steps with these shares (a single one repeats) before the limit would be passed."""
        limit = self._limits[source]
        if limit is None or not any(shares):
            return NEVER
        left = limit.slots * MILLION - self._due[source]
        if len(shares) == 1:
            return left // (shares[0] * self._slots)
        due = np.cumsum(np.array(shares) * self._slots)
        return int(np.searchsorted(due, left, side="right")) if due[-1] > left else NEVER

    def _add_last_step(self, step: int, weights: list[int]) -> None:
        """The step in which sources reach their limits: they get what is left, others the rest."""
        last: dict[int, int] = {}
        while True:
            rest = [0 if i in last else weight for i, weight in enumerate(weights)]
            if not any(rest):
                self.end = step
                return
            left = MILLION - sum(last.values())
            shares = _share_out(rest, [0] * len(rest), np.arange(1), left)[:, 0].tolist()
            ended = [i for i in range(len(rest)) if self._full_steps(i, [shares[i]]) == 0]
            if not ended:
                break
            if any(self._limits[i].stops for i in ended):
                self.end = step
                return
            for i in ended:
                last[i] = (self._limits[i].slots * MILLION - self._due[i]) // self._slots
                self._schedules[i] = ((0, Fraction(0)),)
        column = [last.get(i, share) for i, share in enumerate(shares)]
        self._append(step, np.array(column, np.int64)[:, None], 1)

    def _append(self, step: int, columns: np.ndarray, repeats: int) -> None:
        self._starts.append(step + np.arange(columns.shape[1]))
        self._columns.append(columns)
        for i, share in enumerate(columns.sum(axis=1).tolist()):
            self._due[i] += share * repeats * self._slots


def _line_through(schedules: Sequence[Points], left: int, right: int) -> tuple[list, list]:
    """Integers (a, b) a source: its weight at left + x is proportional to a + b x in [left, right].

    A step on the left of a breakpoint belongs to the segment before it, so the line is exact.
    """
    starts = [weight_at(points, left) for points in schedules]
    slopes = [
        (weight_at(points, right) - start) / (right - left)
        for points, start in zip(schedules, starts, strict=True)
    ]
    scale = math.lcm(*(value.denominator for value in starts + slopes))
    return [int(value * scale) for value in starts], [int(value * scale) for value in slopes]


def _share_out(start: list, slope: list, x: np.ndarray, amount: int) -> np.ndarray:
    """int64 [source, len(x)]: `amount` dealt in proportion to start + slope * x, largest remainder.

    Ties go to the lower index. Python integers take over where 64 bits would overflow.
    """
    largest = sum(start) + sum(abs(value) for value in slope) * len(x)
    kind = np.int64 if largest * MILLION < 1 << 62 else object
    weight = np.array(start, kind)[:, None] + np.array(slope, kind)[:, None] * x.astype(kind)
    total = weight.sum(axis=0)
    shares, remainder = weight * amount // total, weight * amount % total
    missing = (amount - shares.sum(axis=0)).astype(np.int64)
    order = np.argsort(-remainder, axis=0, kind="stable")
    extra = np.arange(len(start))[:, None] < missing
    shares = shares.astype(np.int64)
    np.put_along_axis(shares, order, np.take_along_axis(shares, order, 0) + extra, axis=0)
    return shares
