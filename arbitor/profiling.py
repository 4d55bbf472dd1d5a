"""Where the time of a step goes: one step under torch's profiler, as a table by kernel or op."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

ROWS = 30
_NAME_WIDTH = 60


class StepProfile:
    """Profiles the step `step` of a run and writes the table to `path`."""

    def __init__(self, step: int, path: Path):
        self.step, self.path = step, path

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Costs nothing at any other step."""
        if step != self.step:
            yield
            return
        with profiler() as profile:
            yield
        self.path.write_text(f"step {step + 1}\n{table(profile)}\n")


@contextmanager
def profiler() -> Iterator[torch.profiler.profile]:
    """Torch's profiler over kernels on a GPU, over operations without one."""
    on_gpu = torch.cuda.is_available()
    with torch.profiler.profile(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True
    ) as profile:
        yield profile
        if on_gpu:
            torch.cuda.synchronize()


def table(profile: torch.profiler.profile) -> str:
    """The `ROWS` longest by their own time: name, share, time, number of calls."""
    on_gpu = torch.cuda.is_available()
    events = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in profile.key_averages()
    ]
    events = sorted((pair for pair in events if pair[0] > 0), key=lambda pair: -pair[0])
    total = sum(time for time, _ in events)
    lines = [f"{'kernel' if on_gpu else 'operation':<{_NAME_WIDTH}} {'share':>7} {'ms':>9} calls"]
    for time, event in events[:ROWS]:
        name = event.key[:_NAME_WIDTH]
        share = time / total
        lines.append(f"{name:<{_NAME_WIDTH}} {share:7.1%} {time / 1e3:9.3f} {event.count:5}")
    lines.append(f"{'all':<{_NAME_WIDTH}} {1:7.1%} {total / 1e3:9.3f}")
    return "\n".join(lines)
