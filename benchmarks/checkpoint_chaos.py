"""A process that writes checkpoints in a loop is killed at random instants; none it told is lost.

    python -m benchmarks.checkpoint_chaos --kills 200 --out benchmarks/results/FILE.json

Each life is a forked process that goes on after the newest checkpoint, writes one step after the
other through `CheckpointWriter`, tells a step into a pipe once it is durable, and ends by SIGKILL.
After each kill the newest checkpoint must have at least the last step told, and its tensors.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor.checkpoint import CheckpointWriter, load_checkpoint, newest_checkpoint
from benchmarks.record import Record, out_path

STATE_BYTES = 1 << 20
LONGEST_LIFE_S = 0.1  # many times what a checkpoint of this size takes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=out_path)
    options = parser.parse_args()
    record = Record(options)
    torch.set_num_threads(1)  # a forked process has none of the others
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_often(Path(folder), options.kills, random.Random(options.seed))
    print(json.dumps(record.write(options.out, **counts), indent=1))


def kill_often(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Counts of what happened. Raises AssertionError where a checkpoint that was told is lost."""
    started, told, half_written, beyond = time.monotonic(), 0, 0, 0
    for _ in range(kills):
        last_told = live(folder, rng.uniform(0, LONGEST_LIFE_S))
        half_written += any(folder.glob(".partial-*"))
        told = max(told, last_told)
        newest = newest_checkpoint(folder)
        manifest, tensors = load_checkpoint(newest) if newest else (None, {})
        step = manifest.step if manifest else 0
        assert step >= told, f"step {told} was told to be durable, the newest has {step}"
        beyond += step > told
        told = step  # the next life goes on from there
        if step:
            assert all(tensors[name].equal(t) for name, t in state_of(step).items()), newest
    return {
        "kills": kills,
        "checkpoints": told,
        "kills_inside_a_checkpoint": half_written,
        "kills_between_durable_and_told": beyond,
        "lost": 0,
        "seconds": round(time.monotonic() - started, 1),
    }


def live(folder: Path, seconds: float) -> int:
    """One life of the writing process: the last step that it told to be durable, 0 without one."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            write_checkpoints(folder, writer)
        finally:
            os._exit(1)
    os.close(writer)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the writing process ended by itself"
    with open(reader) as lines:
        told = [int(line) for line in lines.read().split("\n")[:-1]]
    return told[-1] if told else 0


def write_checkpoints(folder: Path, told: int) -> None:
    checkpoints = CheckpointWriter(folder, keep=2)
    newest = newest_checkpoint(folder)
    step = int(newest.name.removeprefix("step-")) if newest else 0
    while True:
        step += 1
        checkpoints.save(
            state_of(step), step=step, config={}, plan_fingerprint="made-up", conditions={}
        )
        outcome = checkpoints.wait()
        assert outcome is not None and not outcome.error, outcome
        os.write(told, f"{outcome.step}\n".encode())


def state_of(step: int) -> dict[str, Tensor]:
    """Tensors that no other step has."""
    halves = [torch.full((STATE_BYTES // 8,), step * sign) for sign in (1, -1)]
    return {"first": halves[0], "second": halves[1].int()}


if __name__ == "__main__":
    main()
