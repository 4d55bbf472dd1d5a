"""Where the time of a run went, from its journal alone.

goodput = time of the steps that count / time that the run was up

A step counts once: the execution whose record stands in the journal. Steps that were lost and run
again, starts, restarts, validation and waiting for checkpoints are not part of it; waiting for data
is a loss too and is taken off. The run is up from each start of its driver to the last line that
the journal has of it; the time between a driver's end and the next one's start is nobody's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ray_jobs.journal import Line, Record, Start

PARTS = ("compute", "data wait", "validation", "checkpoint", "start", "restart", "other")


@dataclass(frozen=True)
class Goodput:
    """Seconds by part, of `PARTS`, that add up to `up`."""

    seconds: dict[str, float]
    restarts: int  # starts of the workers after the first

    @property
    def up(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The goodput, 0 to 1."""
        return self.seconds["compute"] / self.up if self.up else 0.0


def account(lines: Sequence[Line]) -> Goodput:
    """Each stretch of time between two lines of a driver belongs to what the later one tells.

    A record takes its step's seconds and its validation's, and of what is left the checkpoint that
    held it up. The rest is a start if no step was done before, a restart if workers have started
    since the record before (their steps up to this one are replayed in it), else other.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    starts, last_step = 0, 0
    last_time = previous_time = lines[0].time if lines else 0.0  # up to where time is accounted for
    begun = False  # driver or workers have started since the last record
    for line in lines:
        if isinstance(line, Start) and line.process == "driver":
            seconds["other"] += max(0.0, previous_time - last_time)
            last_time = line.time
        previous_time = line.time
        if isinstance(line, Start):
            starts, begun = starts + (line.process == "worker"), True
        if not isinstance(line, Record):
            continue  # its time goes to the next record
        gap = max(0.0, line.time - last_time)
        for part, amount in _parts_of(line).items():
            taken = min(amount, gap)
            seconds[part] += taken
            gap -= taken
        rest = "other"
        if begun:
            rest = "restart" if last_step else "start"
        seconds[rest] += gap
        last_time, last_step, begun = line.time, line.step, False
    seconds["other"] += max(0.0, previous_time - last_time)
    return Goodput(seconds, max(0, starts - 1))


def _parts_of(record: Record) -> dict[str, float]:
    metrics = record.metrics
    step = metrics["throughput/step_s"]
    waited = step * metrics["throughput/data_wait_pct"] / 100
    return {
        "compute": step - waited,
        "data wait": waited,
        "validation": metrics.get("throughput/validation_s", 0.0),
        "checkpoint": metrics.get("checkpoint/blocked_s", 0.0),
    }
