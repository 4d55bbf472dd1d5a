"""What the stream of slots gives and costs, against a torch DataLoader over the same windows.

    python -m benchmarks.data_loading --out benchmarks/results/FILE.json

- throughput: slots of one modality as fast as they come, in turns with the DataLoader, whose worker
  processes read and slice the same windows of the same plan with the same decoders: one a core, the
  stream's decode tasks one more. CPU is that of all processes, which other load changes less.
- wait: share of the time spent in waiting for a slot while one thread multiplies matrices for
  100 ms a slot.
- first: seconds from the call of a worker's function to its first slot, on a Ray just started, and
  in a worker that takes the place of a killed one; then to the first of a stream that it waits for.
- memory: what only the worker's process has, as windows go by.
- spill: bytes that Ray's object store wrote to disk under the smoke configuration.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.data_shards import ABOUT, timed_data
from benchmarks.stream_life import (
    ENDLESS,
    local_ray,
    measure_first,
    measure_memory,
    measure_spill,
    spilled,
)
from benchmarks.timing import environment
from data_pipeline.pack import PackedSlot, slice_micro_batch
from data_pipeline.run_data import RunData
from data_pipeline.stream import stream_slots

DECODE_TASKS = 3
LOADER_WORKERS = 2
PREFETCH = 8  # slots, of each worker of the DataLoader
WARM_UP_S = 8
COMPUTE_S = 0.1
MIX = {"text": 0.6, "image": 0.25, "audio": 0.1, "video": 0.05}


def main() -> None:
    options = parse()
    record = {
        "environment": environment() | {"ray": ray.__version__, "cpus": os.cpu_count()},
        "settings": {
            "decode_tasks": DECODE_TASKS,
            "loader_workers": LOADER_WORKERS,
            "loader_prefetch_slots": PREFETCH,
            "warm_up_s": WARM_UP_S,
            "positions_a_slot": 16 * 1024,
            "RAY_worker_niceness": 0,
            "shards": ABOUT,
        },
    }
    torch.set_num_threads(1)
    for part in options.parts:
        load, begin = os.getloadavg(), time.monotonic()
        found = PARTS[part](options)
        seconds = round(time.monotonic() - begin, 1)
        record[part] = found | {
            "options": {key: getattr(options, key) for key in ("seconds", "rounds", "windows")},
            "load_average": {"before": load, "after": os.getloadavg()},
            "took_s": seconds,
        }
        print(json.dumps({part: record[part]}, indent=1), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            before = json.loads(options.out.read_text()) if options.out.exists() else {}
            options.out.write_text(json.dumps(before | record, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--modalities", nargs="+", default=list(ABOUT), choices=list(ABOUT))
    parser.add_argument("--seconds", type=float, default=15, help="of each timing")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each way in turn")
    parser.add_argument("--windows", type=int, default=100_000, help="of the memory part")
    parser.add_argument("--data", type=Path, default=Path("/tmp/data-loading"), help="shards")
    parser.add_argument("--out", type=Path, help="parts already in it and not run now are kept")
    return parser.parse_args()


def measure_throughput(options: argparse.Namespace) -> dict[str, Any]:
    rows = {}
    with local_ray():
        for modality in options.modalities:
            data = timed_data(options.data, {modality: 1.0}, DECODE_TASKS)
            assert data.windows
            rounds = []
            for _ in range(options.rounds):
                rounds.append({"load_average": os.getloadavg()[0]})
                for name, ways in (("stream", stream), ("loader", loader)):
                    rounds[-1][name] = steady(lambda d=data, w=ways: w(d), options.seconds)
            rows[modality] = {"ratio": ratios(rounds), "rounds": rounds}
            rows[modality]["spilled"] = spilled()
            print(modality, json.dumps(rows[modality]), flush=True)
    return rows


def ratios(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Of medians over the rounds: how much faster the stream is, and how much CPU it takes."""

    def middle(way: str, key: str) -> float:
        return median(r[way][key] for r in rounds)

    return {
        "slots_per_s": round(middle("stream", "slots_per_s") / middle("loader", "slots_per_s"), 3),
        "cpu_s_per_slot": round(
            middle("stream", "cpu_s_per_slot") / middle("loader", "cpu_s_per_slot"), 3
        ),
    }


Slots = Iterator[tuple[torch.Tensor, torch.Tensor | None]]


def stream(data: RunData) -> Slots:
    slots = stream_slots(data, 0, ENDLESS, 0, 1)
    try:
        yield from map(as_tensors, slots)
    finally:
        slots.close()


def loader(data: RunData) -> Slots:
    """Another process start than by fork: this process has threads of Ray."""
    loaded = DataLoader(
        Windows(data),
        batch_size=None,
        num_workers=LOADER_WORKERS,
        prefetch_factor=PREFETCH,
        multiprocessing_context="spawn",
    )
    yield from loaded


class Windows(IterableDataset):
    """Every n-th window of the plan, sliced into slots: worker w of n starts with window w."""

    def __init__(self, data: RunData):
        self._data = data

    def __iter__(self) -> Slots:
        worker = get_worker_info()
        torch.set_num_threads(1)
        keys = self._data.plan.windows(0, ENDLESS, 0, 1)
        for key in islice(keys, worker.id, None, worker.num_workers):
            task = self._data.task(key)
            window, _ = task.read()
            for i in range(len(window.sequences) // task.batch_size):
                symbols, row_ids, content = slice_micro_batch(window, i, task.batch_size)
                slot = PackedSlot(0, i, key.source, task.modality, symbols, row_ids, content)
                yield as_tensors(slot)


def as_tensors(slot: PackedSlot) -> tuple[torch.Tensor, torch.Tensor | None]:
    """symbols [B, T + 1], content [B, P, X]; to be read only."""
    content = None if slot.content is None else torch.from_numpy(slot.content)
    return torch.from_numpy(slot.symbols), content


def steady(begin: Callable[[], Slots], seconds: float) -> dict[str, float]:
    """Rates over `seconds`, once the processes of either way have started."""
    slots = begin()
    next(slots)
    warm = time.monotonic() + WARM_UP_S
    while time.monotonic() < warm:
        next(slots)
    count, targets, cpu, start = 0, 0, cpu_seconds(), time.monotonic()
    while time.monotonic() < start + seconds:
        symbols, _ = next(slots)
        count += 1
        targets += symbols.shape[0] * (symbols.shape[1] - 1)
    elapsed, cpu = time.monotonic() - start, cpu_seconds() - cpu
    slots.close()
    return {
        "slots_per_s": round(count / elapsed, 2),
        "megapositions_per_s": round(targets / elapsed / 1e6, 3),  # of text: MB/s
        "cpu_s_per_slot": round(cpu / count, 5),
        "cores_used": round(cpu / elapsed, 2),
    }


def cpu_seconds() -> float:
    """Of this process and all below it, the ended ones included."""
    fields = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue

    def is_ours(pid: int) -> bool:
        while pid != os.getpid() and pid in fields:
            pid = int(fields[pid][1])
        return pid == os.getpid()

    ticks = sum(sum(map(int, fields[pid][11:15])) for pid in fields if is_ours(pid))
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_wait(options: argparse.Namespace) -> dict[str, Any]:
    rows = {}
    with local_ray():
        for name, weights in {"image": {"image": 1.0}, "mix": MIX}.items():
            slots = stream(timed_data(options.data, weights, DECODE_TASKS))
            run(slots, 2 * WARM_UP_S)
            rows[name] = {"weights": weights, **run(slots, 2 * options.seconds)}
            slots.close()
    return rows


def run(slots: Slots, seconds: float) -> dict[str, float]:
    """Slots for so long, each with 100 ms of matmuls on this thread."""
    a = torch.randn(256, 256)
    waited, count, longest, start = 0.0, 0, 0.0, time.monotonic()
    while time.monotonic() < start + seconds:
        begin = time.monotonic()
        next(slots)
        ready = time.monotonic()
        while time.monotonic() < ready + COMPUTE_S:
            a @ a
        waited, longest, count = waited + ready - begin, max(longest, ready - begin), count + 1
    elapsed = time.monotonic() - start
    return {
        "wait_pct": round(100 * waited / elapsed, 3),
        "longest_wait_s": round(longest, 4),
        "slots": count,
    }


PARTS = {
    "throughput": measure_throughput,
    "wait": measure_wait,
    "first": measure_first,
    "memory": measure_memory,
    "spill": measure_spill,
}


if __name__ == "__main__":
    # The module's own functions travel to other processes by name, those of __main__ by value.
    from benchmarks import data_loading

    data_loading.main()
