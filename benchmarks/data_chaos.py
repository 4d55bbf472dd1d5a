"""Workers of a real Ray Train job are killed at random instants; the data they log stays the plan.

    python -m benchmarks.data_chaos --out benchmarks/results/FILE.json

Each start of the job has one or two workers in turn, streams slots as a run does (`stream_slots`
and `log_slots`), takes part in an all-reduce a step, which stands for the model, and ends by
SIGKILL of one of its workers; some kills take a task's process instead, which Ray has to replace.
A step counts as committed when worker 0 has written it down after the all-reduce. In the end every
committed step has every slot of the plan once, and all that was ever logged, replays included, has
the rows and bytes that reading the plan in one process gives. Which rows those may be is worked
out from the Parquet columns, without the decoder.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import ray
import ray.train
import torch
import torch.distributed
from ray.train.torch import TorchTrainer

from benchmarks.chaos_victims import descendants
from benchmarks.logged_slots import Attempt, check
from benchmarks.record import Record, out_path
from data_pipeline import run_data as run_data_module
from data_pipeline.index import index_sources
from data_pipeline.run_data import RunData
from data_pipeline.schema import DataConfig, SourceConfig
from data_pipeline.stream import stream_slots
from ray_jobs.slots import log_slots

WEIGHTS = {"text": 0.3, "code": 0.2, "image": 0.2, "audio": 0.15, "video": 0.15}
# Small windows, so that the lanes of a short run go through many.
WINDOW_SYMBOLS = 1 << 15
WINDOWS_PER_LANE = 8
COMMITTED = "committed"
TASK_KILLS = 0.2  # share of the kills that take a process of Ray Data instead of a worker
STARTING_KILLS = 0.2  # share of the kills that may come before a worker has its first slot


@dataclass(frozen=True)
class Chaos:
    """What happens to a job over `data`."""

    folder: Path
    data: RunData = field(repr=False)
    steps: int
    kills: int
    seed: int
    commit_interval: int = 10
    step_s: float = 0.03  # the model's part of a step
    longest_life_s: float = 3.0  # of a worker that is to be killed, from its start or first slot on
    prepare: Callable[[], None] = lambda: None  # runs first in every worker

    @property
    def committed(self) -> int:
        path = self.folder / COMMITTED
        return int(path.read_text()) if path.exists() else 0

    def start_folder(self, number: int) -> Path:
        return self.folder / f"start-{number}"

    def check(self, starts: "list[Start]") -> dict[str, int]:
        """Counts what happened. Raises SlotError where a log is not the plan."""
        attempts = [Attempt(self.start_folder(s.number), s.first, s.stop) for s in starts]
        return {
            "steps": self.steps,
            "starts_of_job": len(starts),
            "workers_killed": sum(start.worker_killed for start in starts),
            "tasks_killed": sum(start.tasks_killed for start in starts),
            **check(self.data, self.steps, attempts),
        }


class Start(NamedTuple):
    """One start of the job, which committed the steps first .. stop - 1."""

    number: int
    world: int
    first: int
    stop: int
    tasks_killed: int
    worker_killed: bool
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--out", type=out_path)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    record, begin = Record(options), time.monotonic()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        data = sample_data(Path(folder), options.seed)
        chaos = Chaos(Path(folder), data, options.steps, options.kills, options.seed)
        starts = run_chaos(chaos, report=print)
        found = chaos.check(starts)
    ray.shutdown()
    if found["workers_killed"] < options.kills:
        sys.exit(f"only {found['workers_killed']} workers were killed: take more --steps")
    told = record.write(
        options.out,
        seconds=round(time.monotonic() - begin, 1),
        **found,
        starts=[start._asdict() for start in starts],
    )
    print(json.dumps({key: value for key, value in told.items() if key != "starts"}, indent=1))


def sample_data(folder: Path, seed: int) -> RunData:
    """The sample's five sources in the shape of the smoke run, cut into small windows."""
    sources = {
        name: SourceConfig(name, f"sample://{name}", weight) for name, weight in WEIGHTS.items()
    }
    config = DataConfig(sources, batch_size=4, sequence_length=256)
    config.validate()
    data = RunData(config, index_sources(config, folder), seed)
    sizes = {"WINDOW_SYMBOLS": WINDOW_SYMBOLS, "WINDOWS_PER_LANE": WINDOWS_PER_LANE}
    with patch.multiple(run_data_module, **sizes):
        assert data.windows  # kept in the object, and so sent to the workers
    return data


def run_chaos(chaos: Chaos, report: Callable[[str], Any] = lambda line: None) -> list[Start]:
    """Starts the job until it has done all its steps. Raises what ends it but a kill."""
    assert chaos.data.windows  # kept in the object, and so sent to the workers
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    rng, starts = random.Random(chaos.seed), []
    while chaos.committed < chaos.steps:
        number, first, begin = len(starts), chaos.committed, time.monotonic()
        killer = Killer(chaos, number, rng)
        is_last = sum(start.worker_killed for start in starts) >= chaos.kills
        error = train_once(chaos, number, None if is_last else killer)
        if error and not killer.worker_killed:
            raise error
        kills = (killer.tasks_killed, killer.worker_killed)
        seconds = round(time.monotonic() - begin, 1)
        starts.append(Start(number, world_of(number), first, chaos.committed, *kills, seconds))
        report(str(starts[-1]))
    return starts


def world_of(number: int) -> int:
    return 1 + number % 2


def train_once(chaos: Chaos, number: int, killer: "Killer | None") -> Exception | None:
    """One start of the job; what ended it early."""
    chaos.start_folder(number).mkdir()
    trainer = TorchTrainer(
        consume,
        train_loop_config={"chaos": chaos, "number": number, "start": chaos.committed},
        scaling_config=ray.train.ScalingConfig(num_workers=world_of(number)),
        run_config=ray.train.RunConfig(name=f"{number}", storage_path=str(chaos.folder / "ray")),
    )
    if killer:
        killer.start()
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        return error
    finally:
        if killer:
            killer.end()
    return None


def consume(config: dict[str, Any]) -> None:
    """One worker: streams and logs its slots, meets the others once a step."""
    chaos, number, start = config["chaos"], config["number"], config["start"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    chaos.prepare()
    commit(chaos.start_folder(number) / f"pid-{rank}", os.getpid())
    slots = stream_slots(chaos.data, start, chaos.steps, rank, world)
    slots = log_slots(slots, chaos.start_folder(number), rank)
    for step, group in groupby(slots, key=lambda slot: slot.step):
        ready = torch.tensor([step, len(list(group))])
        time.sleep(chaos.step_s)
        torch.distributed.all_reduce(ready)
        assert ready.tolist() == [step * world, chaos.data.config.slots_per_step]
        if rank == 0 and ((step + 1) % chaos.commit_interval == 0 or step + 1 == chaos.steps):
            commit(chaos.folder / COMMITTED, step + 1)


def commit(path: Path, value: int) -> None:
    """Written whole or not at all, whenever the process is killed."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(str(value))
    partial.replace(path)


class Killer:
    """Kills a worker of one start at an instant that nothing in it decides; at times a task first.

    Once ended, `tasks_killed` and `worker_killed` say what it did.
    """

    def __init__(self, chaos: Chaos, number: int, rng: random.Random):
        folder, world = chaos.start_folder(number), world_of(number)
        self._pids = [folder / f"pid-{rank}" for rank in range(world)]
        self._awaited = self._pids
        if rng.random() >= STARTING_KILLS:
            self._awaited = [folder / f"slots-{rank}.jsonl" for rank in range(world)]
        self._victim = rng.choice(self._pids)
        tasks = 1 if rng.random() < TASK_KILLS else 0
        self._lives_s = [rng.uniform(0, chaos.longest_life_s) for _ in range(tasks + 1)]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.tasks_killed, self.worker_killed = 0, False

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not all(path.exists() and path.stat().st_size for path in self._awaited):
            if self._ended.wait(0.02):
                return
        for life_s in self._lives_s[1:]:
            if self._ended.wait(life_s):
                return
            for pid in decode_processes()[:1]:
                os.kill(pid, signal.SIGKILL)
                self.tasks_killed += 1
        if not self._ended.wait(self._lives_s[0]):
            os.kill(int(self._victim.read_text()), signal.SIGKILL)
            self.worker_killed = True


def decode_processes() -> list[int]:
    """Processes of this program's own Ray that decode windows now; Ray names them by their task."""
    return [pid for pid, line in descendants(os.getpid()).items() if "decode_windows" in line]


if __name__ == "__main__":
    # The module's own functions travel to the workers by name, those of __main__ by value.
    from benchmarks import data_chaos

    data_chaos.main()
