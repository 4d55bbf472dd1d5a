"""A small run of five modalities whose processes are killed at random instants ends as if none was.

    python -m benchmarks.chaos --kills 200 --out benchmarks/results/FILE.json

The command `python -m ray_jobs.pretrain` is started again whenever it ends early. Victims are its
workers, Ray Train's controller, the raylet and the command itself; a kill after which the command
lived on and one after which it had to be started again both count. An undisturbed run comes first.
In the end the checkpoint must have the undisturbed one's bits, the workers must have consumed its
rows, and journal and MLflow must have each step once, with its losses. Exit code 1 if not.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos_checks import compare_runs, compare_so_far
from benchmarks.chaos_victims import adopt_orphans, choose_victim, end_all, kill
from benchmarks.record import Record, out_path
from ray_jobs.config import RunConfig, load_run_config
from ray_jobs.journal import JournalReader
from ray_jobs.smoke import SMOKE_YAML

SAVE_INTERVAL = 5
OVERRIDES = (
    "eval_interval=0",
    "log_slots=true",
    "model.width=64",  # short steps: it is the starts that are on trial
    "model.num_layers=1",
    "data.batch_size=1",
    "data.decode_tasks=1",
    "data.eval_slots=1",
    "scaling.threads_per_worker=1",
)
STEPS_PER_KILL = 2  # new ones, so that a run has some left for every kill
EARLY_KILLS = 0.3  # share of the kills that do not wait for steps, but come within EARLY_S
EARLY_S = 15.0
JITTER_S = 0.5  # up to this long after the step at which a kill is due: anywhere inside of a step
HANGS_S = 300.0
POLL_S = 0.02


@dataclass
class Kill:
    victim: str
    after_step: int
    life_s: float  # from the start of the command, or from the kill before it
    survived: bool = True  # the command went on; otherwise it was started again


def main() -> None:
    options = parse()
    print(f"seed {options.seed}", flush=True)
    report = Report(options)
    adopt_orphans()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as storage:
        calm = Run(options, Path(storage) / "calm")
        calm.train(0, random.Random())
        report.undisturbed_ended()
        wild = Run(options, Path(storage) / "wild")

        def tell() -> None:
            faults = compare_so_far(calm.config, wild.config)
            report.write(wild, {"is_complete": False, "faults": faults})

        wild.train(options.kills, random.Random(options.seed), tell)
        findings = compare_runs(calm.config, wild.config)
    record = report.write(wild, {"is_complete": True} | findings._asdict())
    print(json.dumps({k: v for k, v in record.items() if k != "every_kill"}, indent=1))
    sys.exit(1 if findings.faults else 0)


class Report:
    """The file of `--out`, written anew after every kill: one that ends early tells what it did."""

    def __init__(self, options: argparse.Namespace):
        self._out, self._record, self._begin = options.out, Record(options), time.monotonic()
        self._undisturbed = 0.0

    def undisturbed_ended(self) -> None:
        self._undisturbed = time.monotonic() - self._begin
        print(f"undisturbed: {self._undisturbed:.0f} s", flush=True)

    def write(self, wild: "Run", found: dict[str, Any]) -> dict[str, Any]:
        """`found` is what comparing with the undisturbed run has given; the whole record."""
        return self._record.write(
            self._out,
            seconds=round(time.monotonic() - self._begin, 1),
            seconds_undisturbed=round(self._undisturbed, 1),
            **summary(wild.kills),
            commands_started=wild.starts,
            processes_left_behind=wild.left_behind,
            **found,
            every_kill=list(map(asdict, wild.kills)),
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, help=f"default: {STEPS_PER_KILL} a kill, and 20")
    parser.add_argument("--workers", default="2", help="scaling.num_workers, or a range of them")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--out", type=out_path)
    options = parser.parse_args()
    options.steps = options.steps or STEPS_PER_KILL * options.kills + 20
    return options


def summary(kills: list[Kill]) -> dict[str, Any]:
    counts = Counter(kill.victim for kill in kills)
    survived = Counter(kill.victim for kill in kills if kill.survived)
    return {
        "kills": len(kills),
        "kills_by_victim": dict(counts),
        "survived_by_victim": dict(survived),
        "survived": survived.total(),
        "started_again": len(kills) - survived.total(),
    }


class Run:
    """A run of the command, started as often as needed."""

    def __init__(self, options: argparse.Namespace, storage: Path):
        arguments = [str(SMOKE_YAML), *OVERRIDES, f"storage={storage}", "--run", "chaos"]
        arguments += [f"scaling.num_workers={options.workers}", f"steps={options.steps}"]
        arguments += [f"save_interval={SAVE_INTERVAL}"]
        self._command = [sys.executable, "-m", "ray_jobs.pretrain", *arguments]
        self.config: RunConfig = load_run_config("pretrain", arguments, {}, "")
        self._journal, self._step = JournalReader(self.config.folder), 0
        self._output = storage.with_suffix(".out")
        self._environment = os.environ | {"RAY_TMPDIR": str(storage.parent)}
        self._driver: subprocess.Popen[bytes] | None = None
        self.kills: list[Kill] = []
        self._kills_before = 0  # the command was started
        self.starts = self.left_behind = 0

    def train(
        self, num_kills: int, rng: random.Random, after_kill: Callable[[], None] = lambda: None
    ) -> None:
        """Trains to the end under so many kills. Raises AssertionError where it ends otherwise."""
        self._start()
        while len(self.kills) < num_kills:
            self._ensure_running()
            began = time.monotonic()
            self._wait_until_due(began, num_kills - len(self.kills), rng)
            victim = choose_victim(self._driver.pid, rng)
            if self._driver.poll() is None and kill(victim.pid):
                life_s = round(time.monotonic() - began, 2)
                self.kills.append(Kill(victim.name, self._look(), life_s))
                where = f"after step {self._step}, {life_s:.1f} s of its life"
                print(f"kill {len(self.kills)} of {num_kills}: {victim.name} {where}", flush=True)
                after_kill()
            if victim.pid == self._driver.pid:
                self._driver.wait()
        while self._driver.poll() != 0:  # a kill may come after the last step, too
            self._ensure_running()
            self._await_progress()
        assert self._look() == self.config.steps, self._tail()

    def _start(self) -> None:
        self.left_behind += end_all()
        self.starts += 1
        self._kills_before = len(self.kills)
        self._output.parent.mkdir(parents=True, exist_ok=True)
        with open(self._output, "ab") as output:
            self._driver = subprocess.Popen(
                self._command, stdout=output, stderr=output, env=self._environment
            )

    def _ensure_running(self) -> None:
        """Starts the command again if a kill has ended it."""
        if self._driver.poll() is None:
            return
        assert len(self.kills) > self._kills_before, f"ended without a kill\n{self._tail()}"
        self.kills[-1].survived = False
        self._start()

    def _wait_until_due(self, began: float, num_kills: int, rng: random.Random) -> None:
        """Until an instant that leaves steps for the kills after it, or the command has ended."""
        remaining = (self.config.steps - self._look()) / num_kills
        goal = self._step + 1 + int(rng.uniform(0, 2 * max(0.0, remaining - 1)))
        is_early = rng.random() < EARLY_KILLS
        due = began + (rng.uniform(0, EARLY_S) if is_early else math.inf)
        while self._look() < min(goal, self.config.steps - 1) and time.monotonic() < due:
            if self._driver.poll() is not None:
                return
            assert time.monotonic() < began + HANGS_S, f"hangs at {self._step}\n{self._tail()}"
            time.sleep(POLL_S)
        time.sleep(rng.uniform(0, JITTER_S))

    def _look(self) -> int:
        """Steps in the journal."""
        self._step = max([self._step, *(record.step for record in self._journal.read())])
        return self._step

    def _await_progress(self) -> None:
        """Until the journal has a step more, or the command has ended."""
        before, deadline = self._look(), time.monotonic() + HANGS_S
        while self._look() == before and self._driver.poll() is None:
            assert time.monotonic() < deadline, f"hangs after step {before}\n{self._tail()}"
            time.sleep(POLL_S)

    def _tail(self) -> str:
        return self._output.read_text(errors="replace")[-4000:]


if __name__ == "__main__":
    main()
