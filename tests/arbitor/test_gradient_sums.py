"""Sums of all weights in one tensor: exact at the bound, in buckets, zeros left alone."""

import pytest
import torch

from arbitor import gradient_sums
from arbitor.gradient_sums import ALIGNMENT, GradientSums
from tests.arbitor.worker_threads import run_workers

SHAPES = {"one": (1, 1), "odd": (3, 5), "flat": (7,), "square": (64, 64), "last": (2, 33)}
CPU = torch.device("cpu")


def random_parts(dtype, world):
    """For each worker a sum of every weight; all workers' together reach the largest magnitude."""
    limit = 32767 // world if dtype == torch.int16 else 127
    random = torch.Generator().manual_seed(world)
    parts = [
        {
            name: torch.randint(-limit, limit + 1, shape, generator=random).to(dtype)
            for name, shape in SHAPES.items()
        }
        for _ in range(world)
    ]
    for part in parts:
        part["square"][:2] = limit
        part["square"][2:4] = -limit
        part["square"][4:6, ::2], part["square"][4:6, 1::2] = limit, -limit
    return parts


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("world", [2, 3, 17])
@pytest.mark.parametrize("bucket_bytes", [1, 300, 1 << 20])
def test_exchanged_sums_equal_plain_sums_at_the_bound(dtype, world, bucket_bytes, monkeypatch):
    monkeypatch.setattr(gradient_sums, "BUCKET_BYTES", bucket_bytes)
    parts = random_parts(dtype, world)

    def exchange(rank, all_reduce):
        sums = GradientSums(SHAPES, dtype, CPU, all_reduce)
        for name, part in parts[rank].items():
            sums[name].copy_(part)
        buckets = sums.buckets(list(SHAPES))
        for bucket, work in [(bucket, sums.begin_exchange(bucket)) for bucket in buckets]:
            work.wait()
            sums.end_exchange(bucket)
        return sums

    for sums in run_workers(world, exchange):
        for name in SHAPES:
            assert torch.equal(sums[name].long(), sum(part[name].long() for part in parts)), name


def test_buckets_hold_neighbours_up_to_their_size(monkeypatch):
    monkeypatch.setattr(gradient_sums, "BUCKET_BYTES", 2 * 2 * ALIGNMENT)
    sums = GradientSums(SHAPES, torch.int16, CPU, all_reduce=lambda lanes: None)
    assert sums.buckets(list(SHAPES)) == [("one", "odd"), ("flat",), ("square",), ("last",)]
    assert sums.buckets(["one", "flat"]) == [("one",), ("flat",)]
    assert sums.buckets([]) == []
    alone = GradientSums(SHAPES, torch.int16, CPU, all_reduce=None)
    assert alone.buckets(["one", "flat", "last"]) == [("one", "flat", "last")]


def test_an_exchange_carries_the_sums_asked_for_alone():
    carried = []
    sums = GradientSums(SHAPES, torch.int16, CPU, carried.append)
    sums.begin_exchange(("one", "odd"))
    sums.begin_exchange(("square",))
    assert [(lanes.dtype, lanes.numel()) for lanes in carried] == [
        (torch.int32, ALIGNMENT),
        (torch.int32, 64 * 64 // 2),
    ]
