"""A worker of a real run is killed again and again: seconds from the SIGKILL to the next step.

    python -m benchmarks.restart --out benchmarks/results/FILE.json

The run is configs/smoke.yaml with more steps: five modalities, a checkpoint every other step. Each
kill comes at a random instant after a checkpoint of the workers that it ends: failures without
progress end a run. The next step is the one that the journal notes when the workers started again
have done their first.
"""

import argparse
import json
import os
import random
import re
import signal
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from statistics import quantiles

from benchmarks.record import Record, out_path
from ray_jobs.config import load_run_config
from ray_jobs.heartbeat import HEARTBEATS
from ray_jobs.journal import JournalReader, Note
from ray_jobs.recorder import TRAINING_AGAIN
from ray_jobs.run import run
from ray_jobs.smoke import SMOKE_YAML
from ray_jobs.stop import StoppedError

LONGEST_LIFE_S = 3.0  # after the first checkpoint
DURABLE = r"checkpoint of step \d+ is durable"
POLL_S = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=out_path)
    options = parser.parse_args()
    record = Record(options)
    with tempfile.TemporaryDirectory() as storage:
        seconds = kill_often(Path(storage), options.kills, random.Random(options.seed))
    cuts = quantiles(seconds, n=20, method="inclusive")
    found = record.write(
        options.out,
        p50_s=round(cuts[9], 2),
        p95_s=round(cuts[18], 2),
        longest_s=round(max(seconds), 2),
        seconds=[round(s, 2) for s in seconds],
    )
    print(json.dumps(found, indent=1))


def kill_often(storage: Path, kills: int, rng: random.Random) -> list[float]:
    """Starts the run, kills its worker so often, stops the run; the seconds of each restart."""
    arguments = [str(SMOKE_YAML), f"storage={storage}", "--run", "restart", "--steps", "1000000"]
    config = load_run_config("pretrain", [*arguments, "--save-interval", "2"], {}, __doc__)
    killer = Killer(config.folder, kills, rng)
    killer.start()
    with suppress(StoppedError):
        run(config)
    killer.join()
    return killer.seconds


class Killer(threading.Thread):
    """Kills the run's worker 0; stops the run by SIGTERM to this process when it is done."""

    def __init__(self, folder: Path, kills: int, rng: random.Random):
        super().__init__(daemon=True)
        self._folder, self._kills, self._rng = folder, kills, rng
        self._notes = JournalReader(folder)
        self.seconds: list[float] = []

    def run(self) -> None:
        for number in range(self._kills):
            self._await_note(DURABLE)
            time.sleep(self._rng.uniform(0, LONGEST_LIFE_S))
            beat = json.loads((self._folder / HEARTBEATS / "0.json").read_text())
            deque(self._notes.read_lines(), maxlen=0)
            killed = time.time()
            os.kill(beat["process"]["pid"], signal.SIGKILL)
            self.seconds.append(self._await_note(TRAINING_AGAIN) - killed)
            print(f"kill {number + 1}: {self.seconds[-1]:.2f} s", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    def _await_note(self, pattern: str) -> float:
        """When the run wrote the next note of that kind."""
        while True:
            for line in self._notes.read_lines():
                if isinstance(line, Note) and re.match(pattern, line.note):
                    return line.time
            time.sleep(POLL_S)


if __name__ == "__main__":
    main()
