"""Workers as threads of the test's process, with sums over them that really run later."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

POISON = 0x5A5A5A5A  # what a tensor holds while its sum is under way: nobody may read it


def run_workers(num_workers: int, work: Callable[[int, Callable], Any]) -> list[Any]:
    """Calls `work(rank, all_reduce)` in a thread for each worker; their results by rank."""
    sums = _Sums(num_workers)
    with ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(work, r, partial(sums.begin, r)) for r in range(num_workers)]
        return [future.result(timeout=300) for future in futures]


@dataclass
class _Sums:
    num_workers: int
    parts: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by number and rank

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.num_workers, timeout=120)
        self.begun = [0] * self.num_workers

    def begin(self, rank: int, tensor: Tensor) -> "_Sum":
        assert tensor.dtype in (torch.int32, torch.int64)  # what gloo and NCCL both add
        number, self.begun[rank] = self.begun[rank], self.begun[rank] + 1
        self.parts[number, rank] = tensor.clone()
        tensor.fill_(POISON)
        return _Sum(self, number, tensor)


@dataclass
class _Sum:
    sums: _Sums
    number: int
    tensor: Tensor

    def wait(self) -> None:
        self.sums.barrier.wait()
        parts = [self.sums.parts[self.number, rank] for rank in range(self.sums.num_workers)]
        self.tensor.copy_(sum(parts))
