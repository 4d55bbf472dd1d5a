"""Times of GPU work, ceilings of the device, and the record of a benchmark run."""

import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton

ROTATED_BYTES = 256 << 20  # several times the L2 cache: every call finds its buffers in memory
REPEATS = 15


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in this run: bytes and operations per second."""

    copy: float
    bfloat16: float
    fp8: float


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


def measure_ceilings() -> Ceilings:
    """Copy of 1 GiB (read and write counted), 8192^3 bfloat16 and per-tensor fp8 matmuls."""
    source = torch.randint(0, 255, (1 << 30,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds([lambda: target.copy_(source)] * 3)
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bfloat16 = 2 * size**3 / seconds([lambda: a @ b.T] * 3)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")

    def fp8_matmul() -> torch.Tensor:
        return torch._scaled_mm(
            a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return Ceilings(copy, bfloat16, 2 * size**3 / seconds([fp8_matmul] * 3))


def environment() -> dict[str, Any]:
    """Hardware and versions, for the record."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return _device() | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def _device() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"device": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"}
    query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
    smi = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    name = torch.cuda.get_device_name()
    return {"device": name, "driver, clock, power limit": smi.stdout.strip()}


def write_record(
    path: Path, command: str, ceilings: Ceilings, rows: list[dict[str, Any]], refused: list[str]
) -> None:
    """One JSON file a run."""
    record = {
        "command": command,
        "environment": environment(),
        "ceilings": asdict(ceilings),
        "rotated_bytes": ROTATED_BYTES,
        "rows": rows,
        "refused": refused,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
