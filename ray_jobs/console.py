"""What a run says on the console: a line per log interval, on a terminal with a bar below them."""

import threading
from collections import deque

import rich.console
from rich.progress import BarColumn, Progress, TextColumn

from ray_jobs.config import RunConfig
from ray_jobs.journal import JournalReader, Note, Record

_POLL_SECONDS = 0.2
_RECENT = 50  # steps whose pace says how long the rest will take


class Console:
    """A thread of the driver that prints the journal's lines as they come."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._reader = JournalReader(config.folder)
        for _ in self._reader.read_lines():
            pass  # from before this start of the run
        self._pace = Pace(config.steps)
        self._console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
        self._bar = _bar(self._console) if self._console.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task("", total=config.steps, state="starting")
            self._bar.start()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="console", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Prints what is left and takes the bar away."""
        self._stop.set()
        self._thread.join()
        if self._bar:
            self._bar.stop()

    def _work(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._print_lines()
        self._print_lines()

    def _print_lines(self) -> None:
        for line in self._reader.read_lines():
            if isinstance(line, Note):
                self._print(line.note)
            if isinstance(line, Record):
                self._pace.add(line)
                validation = any(key.startswith("validation/") for key in line.metrics)
                if validation or self._is_due(line.step):
                    self._print(format_line(line, self._config.steps, self._pace.seconds_left))
                if self._bar:
                    self._bar.update(self._task, completed=line.step, state=self._state(line))

    def _print(self, text: str) -> None:
        if self._bar:
            self._console.print(text)
        else:
            print(text, flush=True)  # a job log gets each line as it is, at once

    def _state(self, record: Record) -> str:
        return f"step {record.step:,}  loss {record.metrics['loss/total']:.4f}  " + in_words(
            self._pace.seconds_left
        )

    def _is_due(self, step: int) -> bool:
        return step in (1, self._config.steps) or step % self._config.log_interval == 0


def _bar(console: rich.console.Console) -> Progress:
    columns = (BarColumn(), TextColumn("{task.percentage:.0f} %  {task.fields[state]}"))
    return Progress(*columns, console=console, transient=True)


class Pace:
    """How long the run will still take, by its last steps with all that stood between them."""

    def __init__(self, steps: int):
        self._steps = steps
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self.seconds_left: float | None = None  # before the second step nothing is known

    def add(self, record: Record) -> None:
        self._recent.append((record.step, record.time))
        (first, began), (last, now) = self._recent[0], self._recent[-1]
        if last > first:
            self.seconds_left = (now - began) / (last - first) * (self._steps - last)


def format_line(record: Record, steps: int, seconds_left: float | None) -> str:
    """`step 20/600  loss 3.1  text 3.0  8,112 positions/s  data wait 0.2 %  5 min 10 s left`."""
    metrics = record.metrics
    parts = [f"step {record.step:>{len(str(steps))}}/{steps}", f"loss {metrics['loss/total']:.4f}"]
    sources = {k.removeprefix("loss/"): v for k, v in metrics.items() if k.startswith("loss/")}
    del sources["total"]
    if len(sources) > 1:
        parts += [f"{source} {loss:.4f}" for source, loss in sources.items()]
    parts += [
        f"validation {key.removeprefix('validation/')} {loss:.4f}"
        for key, loss in metrics.items()
        if key.startswith("validation/")
    ]
    parts.append(f"{metrics['throughput/positions_per_s']:,.0f} positions/s")
    if "throughput/mfu" in metrics:
        parts.append(f"MFU {100 * metrics['throughput/mfu']:.1f} %")
    parts.append(f"data wait {metrics['throughput/data_wait_pct']:.1f} %")
    if record.step < steps and seconds_left is not None:
        parts.append(in_words(seconds_left))
    return "  ".join(parts)


def in_words(seconds_left: float | None) -> str:
    if seconds_left is None:
        return ""
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min left"
    return f"{minutes} min {seconds} s left" if minutes else f"{seconds} s left"
