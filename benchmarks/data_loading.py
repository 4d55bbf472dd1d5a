"""What the stream of slots gives and costs, against a torch DataLoader over the same windows.

    python -m benchmarks.data_loading --out benchmarks/results/FILE.json

- throughput: slots of one modality as fast as they come, in turns with the DataLoader, whose worker
  processes read the same windows of the same plan with the same decoders and hand them over whole;
  this process slices, as the stream does. Each number of --loader-workers is tried, the fastest is
  the one compared with. CPU is that of all processes, which other load changes less.
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
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.data_shards import ABOUT, timed_data
from benchmarks.record import Record, out_path, save
from benchmarks.stream_life import (
    ENDLESS,
    local_ray,
    measure_first,
    measure_memory,
    measure_spill,
    spilled,
    whole_readings,
)
from data_pipeline.pack import PackedWindow, slice_micro_batch
from data_pipeline.run_data import RunData
from data_pipeline.stream import stream_slots

DECODE_TASKS = 3
PREFETCH = 2  # windows, of each worker of the DataLoader: its default
WARM_UP_S = 8
COMPUTE_S = 0.1
MIX = {"text": 0.6, "image": 0.25, "audio": 0.1, "video": 0.05}
SETTINGS = {
    "decode_tasks": DECODE_TASKS,
    "loader_prefetch_windows": PREFETCH,
    "warm_up_s": WARM_UP_S,
    "positions_a_slot": 16 * 1024,
    "RAY_worker_niceness": 0,
    "shards": ABOUT,
}


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    for part in options.parts:
        record, begin = Record(options), time.monotonic()
        found = PARTS[part](options)
        found |= {"settings": SETTINGS, "took_s": round(time.monotonic() - begin, 1)}
        told = {part: record.of(**found)}
        print(json.dumps(told, indent=1), flush=True)
        if options.out:
            before = json.loads(options.out.read_text()) if options.out.exists() else {}
            save(options.out, before | told)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--modalities", nargs="+", default=list(ABOUT), choices=list(ABOUT))
    parser.add_argument("--seconds", type=float, default=15, help="of each timing")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each way in turn")
    parser.add_argument("--loader-workers", nargs="+", type=int, default=[2, 3], metavar="N")
    parser.add_argument(
        "--windows", type=whole_readings, default=100_000, help="of the memory part"
    )
    parser.add_argument("--data", type=Path, default=Path("/tmp/data-loading"), help="shards")
    parser.add_argument("--out", type=out_path, help="parts already in it and not run now are kept")
    return parser.parse_args()


def measure_throughput(options: argparse.Namespace) -> dict[str, Any]:
    rows, ways = {}, {"stream": stream}
    ways |= {f"loader of {n}": partial(loader, workers=n) for n in options.loader_workers}
    with local_ray():
        for modality in options.modalities:
            data = timed_data(options.data, {modality: 1.0}, DECODE_TASKS)
            assert data.windows
            rounds = []
            for _ in range(options.rounds):
                rounds.append({"load_average": os.getloadavg()[0]})
                for name, way in ways.items():
                    rounds[-1][name] = steady(partial(way, data), options.seconds)
            rows[modality] = compare(rounds) | {"rounds": rounds, "spilled": spilled()}
            print(modality, json.dumps(rows[modality]), flush=True)
    return rows


def compare(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of medians over the rounds: stream over the fastest loader, and the cores that both used."""

    def middle(way: str, key: str) -> float:
        return median(r[way][key] for r in rounds)

    loaders = [way for way in rounds[0] if way.startswith("loader")]
    best = max(loaders, key=lambda way: middle(way, "slots_per_s"))
    return {
        "against": best,
        "ratio": {
            key: round(middle("stream", key) / middle(best, key), 3)
            for key in ("slots_per_s", "cpu_s_per_slot")
        },
        "cores_used": {way: middle(way, "cores_used") for way in ("stream", best)},
    }


Slots = Iterator[tuple[torch.Tensor, torch.Tensor | None]]


def stream(data: RunData) -> Slots:
    slots = stream_slots(data, 0, ENDLESS, 0, 1)
    try:
        for slot in slots:
            yield as_tensors(slot.symbols, slot.content)
    finally:
        slots.close()


def loader(data: RunData, workers: int) -> Slots:
    """Another process start than by fork: this process has threads of Ray."""
    loaded = DataLoader(
        Windows(data),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        multiprocessing_context="spawn",
    )
    for batch_size, *arrays in loaded:
        window = PackedWindow(*(None if x is None else x.numpy() for x in arrays))
        for i in range(len(window.sequences) // batch_size):
            symbols, _, content = slice_micro_batch(window, i, batch_size)
            yield as_tensors(symbols, content)


class Windows(IterableDataset):
    """Every n-th window of the plan as (size of a micro-batch, arrays of `PackedWindow`): worker w
    of n starts with window w."""

    def __init__(self, data: RunData):
        self._data = data

    def __iter__(self) -> Iterator[tuple]:
        worker = get_worker_info()
        torch.set_num_threads(1)
        keys = self._data.plan.windows(0, ENDLESS, 0, 1)
        for key in islice(keys, worker.id, None, worker.num_workers):
            task = self._data.task(key)
            window, _ = task.read()
            arrays = (window.sequences, window.sequence_order, window.row_ids, window.row_starts)
            yield task.batch_size, *arrays, window.content  # the loader makes tensors of them


def as_tensors(
    symbols: np.ndarray, content: np.ndarray | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """symbols [B, T + 1], content [B, P, X]; to be read only."""
    return torch.from_numpy(symbols), None if content is None else torch.from_numpy(content)


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
    this, total = psutil.Process(), 0.0
    for process in [this, *this.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user and system, its own and its children's
    return total


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
