"""The whole product in two minutes: `python -m ray_jobs.smoke [key.path=value ...] [flags]`.

Runs configs/smoke.yaml in a fresh folder through the same path as any run, kills its worker once at
a random step, lets the run go on, and checks what the product promises: losses fell, the mix is the
one asked for, every row is the plan's, every step has one point. Exits 1 naming what did not hold.
"""

import argparse
import math
import os
import random
import signal
import socket
import sys
import threading
import time
from itertools import chain
from pathlib import Path
from statistics import mean

from arbitor.errors import UserError
from arbitor.modality import BYTE_MODALITIES
from data_pipeline.run_data import read_slots
from data_pipeline.statistics import unigram_entropy
from ray_jobs.config import RunConfig, load_run_config
from ray_jobs.journal import JournalReader, Record, Start
from ray_jobs.run import exit_with_message, run
from ray_jobs.slots import logged_slots
from ray_jobs.tracking import read_note
from ray_jobs.worker import open_run_data

SMOKE_YAML = Path(__file__).parents[1] / "configs" / "smoke.yaml"
FALL = 0.9  # the last fifth of a source's losses is below this share of its first five


def main() -> None:
    exit_with_message(lambda: smoke(sys.argv[1:]))


def smoke(words: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kill-seed", type=int, default=time.time_ns() % 1_000_000)
    options, arguments = parser.parse_known_args(words)
    name = time.strftime("smoke-%Y%m%d-%H%M%S")
    arguments = [str(SMOKE_YAML), "--run", name, "log_slots=true", *arguments]
    config = load_run_config("smoke", arguments, {}, __doc__)
    step = random.Random(options.kill_seed).choice(kill_steps(config))
    print(f"the worker will be killed after step {step} (--kill-seed {options.kill_seed})")
    killer = WorkerKiller(config.folder, step)
    killer.start()
    try:
        run(config)
    finally:
        killer.stop()
    tell(config, killer)


def kill_steps(config: RunConfig) -> list[int]:
    """Steps after which a kill leaves at least one to be replayed."""
    interval = config.save_interval or config.steps
    steps = [k for k in range(interval, config.steps - 1) if 2 <= k % interval <= interval - 2]
    if not steps or not config.save:
        raise UserError(
            f"save_interval: with {config.save_interval} and {config.steps} steps there is no step"
            " between two checkpoints to kill the worker at; give at most half of the steps"
        )
    return steps


class WorkerKiller(threading.Thread):
    """Follows the journal and kills worker 0 once a step stands in it."""

    def __init__(self, folder: Path, step: int):
        super().__init__(name="worker-killer", daemon=True)
        self.has_killed = False
        self._reader, self._step, self._ended = JournalReader(folder), step, threading.Event()

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        worker = None
        while not self._ended.wait(0.02):
            for line in self._reader.read_lines():
                if isinstance(line, Start) and line.process == "worker":
                    worker = line
                if isinstance(line, Record) and line.step >= self._step and worker is not None:
                    self._kill(worker)
                    return

    def _kill(self, worker: Start) -> None:
        if worker.host == socket.gethostname():
            os.kill(worker.pid, signal.SIGKILL)
            self.has_killed = True
            print(f"killed worker 0, pid {worker.pid}", flush=True)


def tell(config: RunConfig, killer: WorkerKiller) -> None:
    """Prints what held; exits 1 if a promise did not."""
    lines = list(JournalReader(config.folder).read_lines())
    records = [line for line in lines if isinstance(line, Record)]
    faults = [
        fault for source in config.data.active_sources for fault in judge(config, source, records)
    ]
    faults += killed_and_replayed(lines, killer) + one_point_a_step(config, records)
    faults += mix_as_asked(config, records[-1]) + rows_as_planned(config)
    speed = mean(r.metrics["throughput/positions_per_s"] for r in records[len(records) // 2 :])
    print(f"{speed:,.0f} positions per second in the second half")
    if faults:
        print("smoke failed: " + "; ".join(faults), file=sys.stderr)
        sys.exit(1)
    print(
        "smoke passed: every source's loss fell, those of text and code below what their symbol"
        " counts alone would give; mix, rows and points are as planned, across a killed worker"
    )


def killed_and_replayed(lines: list, killer: WorkerKiller) -> list[str]:
    """Whether the worker was killed and at least one step computed twice."""
    if not killer.has_killed:
        return ["restart: the worker was not killed"]
    done, replayed, starts = 0, 0, 0
    for line in lines:
        if isinstance(line, Record):
            done = line.step
        if isinstance(line, Start) and line.process == "worker":
            starts, replayed = starts + 1, replayed + done - line.after_step
    print(f"restart: {starts - 1} of the worker, {replayed} steps replayed")
    return [] if starts > 1 and replayed > 0 else ["restart: no step was replayed"]


def one_point_a_step(config: RunConfig, records: list[Record]) -> list[str]:
    """Whether journal and MLflow have every step once, and MLflow the run once."""
    from mlflow.tracking import MlflowClient  # takes seconds to import

    expected = list(range(1, config.steps + 1))
    note = read_note(config)
    client = MlflowClient(note["tracking_uri"])
    points = client.get_metric_history(note["run_id"], "loss/total")
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    name = f"attributes.run_name = '{config.name}'"
    runs = client.search_runs([experiment.experiment_id], filter_string=name)
    print(f"points: {len(records)} in the journal, {len(points)} in {len(runs)} MLflow run")
    faults = []
    if [record.step for record in records] != expected:
        faults.append("points: the journal has not every step once")
    if [point.step for point in points] != expected or len(runs) != 1:
        faults.append("points: MLflow has not every step once in one run")
    return faults


def mix_as_asked(config: RunConfig, last: Record) -> list[str]:
    """Whether every source served its share of all slots, within one slot."""
    slots = config.steps * config.data.slots_per_step
    faults = []
    for source in config.data.active_sources:
        realised, target = (last.metrics[f"mix/{kind}/{source}"] for kind in ("realised", "target"))
        print(f"mix: {source} {100 * realised:.2f} %, asked {100 * target:.2f} %")
        if abs(realised - target) * slots > 1:
            faults.append(f"mix: {source} has {realised:.4f} of the slots, asked {target:.4f}")
    return faults


def rows_as_planned(config: RunConfig) -> list[str]:
    """Whether each slot that a worker computed, replayed ones too, has the rows of the plan."""
    logged, _ = logged_slots(config.folder)
    computed = [
        ((slot["step"], slot["slot"]), (slot["row_ids"], slot["sha256"]))
        for slot in chain.from_iterable(logged.values())
    ]
    planned = {
        (slot.step, slot.slot): (slot.row_ids.tolist(), slot.sha256)
        for slot in read_slots(open_run_data(config), 0, config.steps, 0, 1)
    }
    others = [key for key, content in computed if planned.get(key) != content]
    missing = planned.keys() - {key for key, _ in computed}
    print(f"rows: {len(computed)} slots computed, {len(planned)} planned")
    if others or missing:
        return [f"rows: {len(others)} slots are not the plan's, {len(missing)} are missing"]
    return []


def judge(config: RunConfig, source: str, records: list[Record]) -> list[str]:
    """Prints how a source's loss went; what it should have reached and did not."""
    losses = [r.metrics[f"loss/{source}"] for r in records if f"loss/{source}" in r.metrics]
    if not losses:
        return [f"{source}: no step served it"]
    first, last = mean(losses[:5]), mean(losses[-max(1, len(losses) // 5) :])
    line = f"{source}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {len(losses)} steps;"
    line += f" mean of the last fifth {last:.3f}"
    entropy = math.inf
    if config.data.sources[source].modality in BYTE_MODALITIES:
        entropy = unigram_entropy(open_run_data(config), source)
        line += f", unigram entropy of its data {entropy:.3f}"
    print(line)
    faults = []
    if last >= FALL * first:
        faults.append(f"{source}: {last:.3f} is not below {FALL} of its first losses ({first:.3f})")
    if last >= entropy:
        faults.append(f"{source}: {last:.3f} is not below the unigram entropy ({entropy:.3f})")
    return faults


if __name__ == "__main__":
    main()
