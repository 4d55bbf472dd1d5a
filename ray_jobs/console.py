"""What a run says on the console: a line per log interval, and where things are at the end."""

import threading
import time

from ray_jobs.config import RunConfig
from ray_jobs.journal import JournalReader, Note, Record

_POLL_SECONDS = 0.2


class Console:
    """A thread of the driver that prints the journal's lines as they come."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._reader = JournalReader(config.folder)
        self._started = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="console", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Prints what is left."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._print_lines()
        self._print_lines()

    def _print_lines(self) -> None:
        for record in self._reader.read_lines():
            if record.time < self._started:
                continue  # from before this start of the run
            if isinstance(record, Note):
                print(record.note, flush=True)
                continue
            validation = any(key.startswith("validation/") for key in record.metrics)
            if validation or self._is_due(record.step):
                print(format_line(record, self._config.steps), flush=True)

    def _is_due(self, step: int) -> bool:
        return step in (1, self._config.steps) or step % self._config.log_interval == 0


def format_line(record: Record, steps: int) -> str:
    """`step 20/600  loss 3.1074  text 3.0012  code 3.2136  8,112 positions/s  data wait 0.2 %`."""
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
    parts.append(f"data wait {metrics['throughput/data_wait_pct']:.1f} %")
    return "  ".join(parts)
