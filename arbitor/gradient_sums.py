"""Sums of the slots' integer gradients, and their exchange between the workers.

All sums lie in one flat tensor, so that neighbours travel together: a bucket is one all-reduce.
16-bit sums go as two to an int32 lane, since neither gloo nor NCCL adds 16-bit integers: the
narrowest exact wire up to 258 slots a step; above that sums and lanes have 32 bits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

BUCKET_BYTES = 32 << 20  # of one all-reduce; the update of a bucket runs beside the next one's
ALIGNMENT = 64  # elements: a sum starts where wide loads may
LOW_SIGN = 0x8000  # of the low half of a lane


class Work(Protocol):
    """A sum that has begun; on a GPU `wait` makes the current stream wait for it, not the host."""

    def wait(self) -> Any: ...


# Begins to sum an int32 or int64 tensor over the workers, in place.
AllReduce = Callable[[Tensor], Work]


class GradientSums:
    """By name one integer tensor of a weight's sum; all are zero between steps.

    With `all_reduce` None there is one worker, and nothing to exchange.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        all_reduce: AllReduce | None,
    ):
        self._all_reduce = all_reduce
        self._spans: dict[str, range] = {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
            self._spans[name] = range(start, end)
        self._flat = torch.zeros(end, dtype=dtype, device=device)
        self._sums = {
            name: self._flat[span.start : span.start + math.prod(shapes[name])].view(*shapes[name])
            for name, span in self._spans.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name]

    def buckets(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """`names`, in the order of the sums, cut where one is left out and at BUCKET_BYTES."""
        if self._all_reduce is None:
            return [tuple(names)] if names else []
        largest = BUCKET_BYTES // self._flat.element_size()
        buckets: list[list[str]] = []
        start = end = -1
        for name in names:
            span = self._spans[name]
            if span.start != end or span.stop - start > largest:
                buckets.append([])
                start = span.start
            buckets[-1].append(name)
            end = span.stop
        return [tuple(bucket) for bucket in buckets]

    def begin_exchange(self, bucket: Sequence[str]) -> Work | None:
        """Begins to sum a bucket over the workers; None for one worker.

        A lane is low + high * 2^16 with a signed low half: both halves of a sum of lanes are the
        sums of the halves, as the slot format keeps those within 16 bits.
        """
        if self._all_reduce is None:
            return None
        lanes = self._lanes(bucket)
        if self._flat.dtype == torch.int16:
            lanes.sub_(lanes & LOW_SIGN, alpha=2)
        return self._all_reduce(lanes)

    def end_exchange(self, bucket: Sequence[str]) -> None:
        """Turns the lanes of a bucket into its sums, once the work has been awaited."""
        if self._all_reduce is not None and self._flat.dtype == torch.int16:
            lanes = self._lanes(bucket)
            lanes.add_(lanes & LOW_SIGN, alpha=2)

    def _lanes(self, bucket: Sequence[str]) -> Tensor:
        """int32: the memory of the bucket's sums."""
        span = slice(self._spans[bucket[0]].start, self._spans[bucket[-1]].stop)
        return self._flat[span].view(torch.int32)
