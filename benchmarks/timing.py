"""Times of GPU work, and ceilings of the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROTATED_BYTES = 256 << 20  # several times the L2 cache: every call finds its buffers in memory
REPEATS = 15
STREAM_BYTES = 1 << 30
MATMUL_SIZE = 8192
STREAM_BLOCK = 2048


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in this run: bytes, read and written, and operations per second."""

    streams: dict[str, float]
    bfloat16: float
    fp8: float
    int8: float

    @property
    def bandwidth(self) -> float:
        """Of the fastest stream: none of them alone is the most that a kernel reaches."""
        return max(self.streams.values())

    def floor(self, num_bytes: int, operations: int, peak: str) -> float:
        """The least seconds for so much: what moves, moves while the matmul units work."""
        return max(num_bytes / self.bandwidth, operations / getattr(self, peak))


def num_buffers(bytes_of_one: int) -> int:
    """How many copies of a problem rotate through `ROTATED_BYTES`, at least two."""
    return max(2, -(-ROTATED_BYTES // max(1, bytes_of_one)))


def seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Median time of one of `calls`, each on buffers of its own, run one after the other.

    A CUDA graph leaves the time of launching out of it, for ours and for the baseline alike.
    """
    for call in list(calls)[:3]:
        call()
    torch.cuda.synchronize()
    run = _captured(calls)
    run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return median(times)


def _captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Not where a module begins: that would import the compiler wherever the module is."""
    return torch.compile(function, dynamic=False)


def measure_ceilings() -> Ceilings:
    size = MATMUL_SIZE
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    whole = [(127 * x.clamp(-1, 1)).to(torch.int8) for x in (a, b)]
    one = torch.ones((), device="cuda")

    def fp8_matmul() -> Tensor:
        return torch._scaled_mm(
            a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def rate(matmul: Callable[[], Tensor]) -> float:
        return 2 * size**3 / seconds([matmul] * 3)

    return Ceilings(
        streams=measure_streams(),
        bfloat16=rate(lambda: a @ b.T),
        fp8=rate(fp8_matmul),
        int8=rate(lambda: torch._int_mm(whole[0], whole[1].T)),
    )


def measure_streams() -> dict[str, float]:
    """Bytes per second over 1 GiB: a copy of torch's, a sum of two, a copy of Triton's."""
    a, b, out = (
        torch.randint(1 << 20, (STREAM_BYTES // 4,), device="cuda", dtype=torch.int32)
        for _ in range(3)
    )
    return {
        "copy_": 2 * STREAM_BYTES / seconds([lambda: out.copy_(a)] * 3),
        "add": 3 * STREAM_BYTES / seconds([lambda: torch.add(a, b, out=out)] * 3),
        "triton": 2 * STREAM_BYTES / seconds([lambda: stream(a, out)] * 3),
    }


def stream(source: Tensor, target: Tensor) -> None:
    """Copies contiguous int32."""
    programs = triton.cdiv(source.numel(), STREAM_BLOCK)
    stream_kernel[(programs,)](source, target, source.numel(), BLOCK=STREAM_BLOCK)


@triton.jit
def stream_kernel(source, target, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)
