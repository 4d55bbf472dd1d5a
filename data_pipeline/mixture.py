"""Which source serves which slot: weight schedules and the chairman assignment, integers only.

Weights become millionths per step that sum to exactly `MILLION`. The slots of all steps form one
row, n = step * slots_per_step + k. R. Tijdeman, "The chairman assignment problem" (Discrete
Mathematics 32, 1980), serves each slot so that at every moment, for any sequence of weights, each
source is within one slot of its exact share. It looks ahead along the schedule, never at the
length of the run: a longer run starts with the same slots.
"""

import math
from collections.abc import Sequence
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


class Mixture:
    """The slots of every step, dealt to `schedules` (one `Points` a source).

    At each step at least one weight must be above zero. State is the number of slots each source
    has served (`counts`), so that any slot is reachable from any earlier one.
    """

    def __init__(self, schedules: Sequence[Points], slots_per_step: int):
        self.num_sources = len(schedules)
        self.slots_per_step = slots_per_step
        self.millionths = _millionths(schedules)  # [source, step]; the last column holds for ever
        served = np.cumsum(self.millionths[:, :-1] * slots_per_step, axis=1)
        self._before = np.pad(served, ((0, 0), (1, 0)))  # [source, step]: due before the step
        self._tail_before = [int(due) for due in self._before[:, -1]]
        self._tail_millionths = [int(share) for share in self.millionths[:, -1]]

    def due(self, source: int, slot: int) -> int:
        """Millionths of a slot that `source` should have served once `slot` is over."""
        step, k = divmod(slot, self.slots_per_step)
        column = min(step, self.millionths.shape[1] - 1)
        slots = (step - column) * self.slots_per_step + k + 1
        return int(self._before[source, column] + slots * self.millionths[source, column])

    def serve(self, first: int, count: int, counts: Sequence[int]) -> list[int]:
        """The sources of slots first .. first + count - 1, after `counts` slots before them."""
        if self.num_sources == 1:
            return [0] * count
        served = [int(value) for value in counts]
        release = [self._reaches(i, served[i], 1) for i in range(self.num_sources)]
        deadline = [self._reaches(i, served[i], self._latest) for i in range(self.num_sources)]
        order = []
        for slot in range(first, first + count):
            chosen, earliest = -1, NEVER + 1
            for i, end in enumerate(deadline):
                if end < earliest and release[i] <= slot:
                    chosen, earliest = i, end
            assert chosen >= 0, f"no source is eligible for slot {slot}"
            order.append(chosen)
            served[chosen] += 1
            release[chosen] = self._reaches(chosen, served[chosen], 1)
            deadline[chosen] = self._reaches(chosen, served[chosen], self._latest)
        return order

    @property
    def _latest(self) -> int:
        return 2 * self.num_sources - 3

    def _reaches(self, source: int, served: int, part: int) -> int:
        """First slot n with due(source, n) - served >= part / (2 * num_sources - 2) slots."""
        total = served * MILLION - (-part * MILLION // (2 * self.num_sources - 2))
        if total > self._tail_before[source]:
            step, before = self.millionths.shape[1] - 1, self._tail_before[source]
            share = self._tail_millionths[source]
        else:
            step = int(np.searchsorted(self._before[source], total)) - 1
            before = int(self._before[source, step])
            share = int(self.millionths[source, step])
        if share == 0:
            return NEVER
        return step * self.slots_per_step - (-(total - before) // share) - 1


def _millionths(schedules: Sequence[Points]) -> np.ndarray:
    """int64 [source, step] up to the last breakpoint; every column sums to MILLION."""
    breaks = sorted({0, *(step for points in schedules for step, _ in points)})
    columns = [
        _share_out(*_line_through(schedules, left, right), np.arange(right - left))
        for left, right in zip(breaks, breaks[1:], strict=False)
    ]
    last, _ = _line_through(schedules, breaks[-1], breaks[-1] + 1)
    columns.append(_share_out(last, [0] * len(schedules), np.arange(1)))
    return np.concatenate(columns, axis=1)


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


def _share_out(start: list, slope: list, x: np.ndarray) -> np.ndarray:
    """int64 [source, len(x)]: MILLION dealt in proportion to start + slope * x, largest remainder.

    Ties go to the lower index. Python integers take over where 64 bits would overflow.
    """
    largest = sum(start) + sum(abs(value) for value in slope) * len(x)
    kind = np.int64 if largest * MILLION < 1 << 62 else object
    weight = np.array(start, kind)[:, None] + np.array(slope, kind)[:, None] * x.astype(kind)
    total = weight.sum(axis=0)
    shares, remainder = weight * MILLION // total, weight * MILLION % total
    missing = (MILLION - shares.sum(axis=0)).astype(np.int64)
    order = np.argsort(-remainder, axis=0, kind="stable")
    extra = np.arange(len(start))[:, None] < missing
    shares = shares.astype(np.int64)
    np.put_along_axis(shares, order, np.take_along_axis(shares, order, 0) + extra, axis=0)
    return shares
