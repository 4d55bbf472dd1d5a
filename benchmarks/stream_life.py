"""The life of a stream in a Ray of its own: its first slot, its memory, what is spilled.

The parts first, memory and spill of `benchmarks.data_loading`.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray

from benchmarks.data_shards import small_windows
from data_pipeline.index import index_sources
from data_pipeline.run_data import RunData, read_slots
from data_pipeline.stream import stream_slots
from ray_jobs.config import load_run_config
from ray_jobs.slots import begin as start_slots

ENDLESS = 10_000_000  # steps
READINGS = 20  # of the memory


def whole_readings(text: str) -> int:
    """The type of --windows."""
    windows = int(text)
    if windows < 1 or windows % READINGS:
        raise argparse.ArgumentTypeError(f"{text}: expected a multiple of {READINGS}, the readings")
    return windows


@contextmanager
def local_ray() -> Iterator[None]:
    """Its processes as nice as this one and the DataLoader's: by default they yield to others.

    Its session is in a folder that goes with it; a short one, as sockets want.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, {"RAY_worker_niceness": "0", "RAY_TMPDIR": folder}),
    ):
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        before = set(threading.enumerate())
        try:
            yield
        finally:
            for thread in set(threading.enumerate()) - before:
                thread.join(10)  # one of Ray Data's that asks Ray after its end would end all
            ray.shutdown()


def measure_first(options: argparse.Namespace) -> dict[str, Any]:
    """Twice a Ray of its own: workers are actors, as those of Ray Train are."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = smoke_data(Path(folder))
        for _ in range(2):
            with local_ray():
                starts = [first_slots(data) for _ in range(5)]
            slot_s, stream_s = zip(*starts, strict=True)
            rows.append({"cold_s": slot_s[0], "restart_s": slot_s[1:]})
            rows[-1]["stream"] = {"cold_s": stream_s[0], "restart_s": stream_s[1:]}
    return {"starts": rows}


def first_slots(data: RunData) -> list[float]:
    """Of an actor in a process of its own, which is then killed: as a run begins, and the stream's.

    A run begins with slots that the worker reads itself; the stream has some seconds to start.
    """

    class Worker:
        def pid(self) -> int:
            import benchmarks.stream_life  # noqa: F401  as train functions come: by name

            return os.getpid()

        def first(self, data: RunData) -> list[float]:
            span, seconds = (data, 0, 1000, 0, 1), []
            run = start_slots(stream_slots(*span), read_slots(*span))
            for slots in (run, stream_slots(*span)):
                begin = time.monotonic()
                next(slots)
                seconds.append(round(time.monotonic() - begin, 2))
            return seconds

    worker = ray.remote(num_cpus=1)(Worker).remote()
    pid = ray.get(worker.pid.remote())
    seconds = ray.get(worker.first.remote(data))
    os.kill(pid, signal.SIGKILL)
    return seconds


def smoke_data(folder: Path) -> RunData:
    """The smoke run's data, with a weight for every modality."""
    config = load_run_config("pretrain", ["configs/smoke.yaml"], {}, "").data
    sources = {name: replace(source, weight=0.2) for name, source in config.sources.items()}
    config = replace(config, sources=sources, batch_size=8)
    return RunData(config, index_sources(config, folder), seed=0)


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Megabytes that no other process shares, every twentieth of the way."""

    def watch(data: RunData, windows: int) -> list[list[float]]:
        found, count, begin = [], 0, time.monotonic()
        for slot in stream_slots(data, 0, ENDLESS, 0, 1):
            count += slot.opened is not None
            if slot.opened is not None and count % (windows // READINGS) == 0:
                seconds = round(time.monotonic() - begin, 1)
                found.append([count, round(private_bytes() / 1e6, 1), seconds])
            if count == windows:
                return found
        raise AssertionError("unreachable")

    with tempfile.TemporaryDirectory() as folder, local_ray():
        data = small_windows(Path(folder))
        found = ray.get(ray.remote(num_cpus=1)(watch).remote(data, options.windows))
    by_count = {count: megabytes for count, megabytes, _ in found}
    early = by_count[options.windows // 10]
    return {
        "windows_megabytes_seconds": found,
        "last_to_tenth": round(by_count[options.windows] / early, 3),
    }


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def measure_spill(options: argparse.Namespace) -> dict[str, Any]:
    """All of a smoke run's slots and some more, Ray's settings left alone."""
    with tempfile.TemporaryDirectory() as folder, local_ray():
        data = smoke_data(Path(folder))
        count = sum(1 for _ in stream_slots(data, 0, 300, 0, 1))
        return {"slots": count, "spilled": spilled()}


def spilled() -> str:
    """What Ray says of objects that it wrote to disk since it started."""
    address = ray.get_runtime_context().gcs_address
    command = [Path(sys.executable).with_name("ray"), "memory", "--stats-only"]
    said = subprocess.run(
        [*command, "--address", address], capture_output=True, text=True, check=True
    ).stdout
    assert "Plasma memory usage" in said, said
    lines = [line for line in said.splitlines() if line.startswith("Spilled")]
    return lines[0] if lines else "nothing"
