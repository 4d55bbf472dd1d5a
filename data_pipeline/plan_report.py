"""What a run will read, before it starts: `python -m data_pipeline.plan CONFIG [key=value ...]`.

Indexes the shards as the run does (its cache serves the run) and asks the plan itself: slots and
steps are counted, not estimated; memory is an estimate. A source repeats from the step before which
it has served an epoch's slots; its lanes pass that border a few slots earlier or later.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from arbitor.modality import BYTE_MODALITIES
from data_pipeline.command import DataSettings, in_units, open_data, read_settings, table
from data_pipeline.layout import layout_of
from data_pipeline.mixture import MILLION
from data_pipeline.plan import Plan, PlannedSource
from data_pipeline.run_data import RunData
from data_pipeline.stream import OBJECT_STORE_BYTES

REPEATS_SHOWN = 4
ABOUT = """usage: python -m data_pipeline.plan CONFIG [key.path=value ...]

Prints what the run of a configuration will read: slots and mix, epochs and when they end, memory.
CONFIG is a run's YAML file, of which only data, steps, seed, storage and the number of workers are
read; key.path=value overrides it: steps=5000 data.sources.code.weight=0.1"""


def plan_command(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(ABOUT)
        return 0
    settings = read_settings(words)
    run_data = open_data(settings)
    print("\n\n".join(describe_plan(settings, run_data)))
    return 0


def describe_plan(settings: DataSettings, run_data: RunData) -> Iterator[str]:
    """Paragraphs: the run, an epoch of each source, the mix, epochs, memory."""
    shares = [_Share(run_data.plan, i, settings.steps) for i in range(len(run_data.plan.sources))]
    yield _summary(settings, run_data)
    yield _sources(run_data)
    yield _mix(shares)
    yield "\n".join(_epochs(run_data.plan, shares, settings.steps))
    yield _memory(settings, run_data)


def _summary(settings: DataSettings, run_data: RunData) -> str:
    config, plan = settings.data, run_data.plan
    steps = min(settings.steps, plan.end)
    positions = config.batch_size * config.sequence_length
    slots = plan.slots_per_step
    return (
        f"{steps:,} steps of {slots} slots of {positions:,} positions:"
        f" {steps * slots:,} slots, {steps * slots * positions:,} positions; seed {settings.seed}"
    )


def _sources(run_data: RunData) -> str:
    """What an epoch of each source holds."""
    rows = [("source", "modality", "shards", "rows", "held out", "stored", "windows", "slots")]
    for name, manifest in sorted(run_data.manifests.items()):
        held_out = sum(segment.rows for segment in manifest.eval_segments)
        windows = run_data.windows[name]
        slots = sum(_planned(run_data.plan, name).micro_batches_per_window)
        counts = (manifest.rows, held_out)
        rows.append(
            (
                name,
                manifest.modality,
                f"{len(manifest.shards):,}",
                *(f"{count:,}" for count in counts),
                in_units(manifest.num_bytes),
                f"{len(windows):,}",
                f"{slots:,}",
            )
        )
    return "One epoch of each source, held-out rows aside:\n" + table(rows)


def _planned(plan: Plan, name: str) -> PlannedSource:
    return next(source for source in plan.sources if source.name == name)


@dataclass(frozen=True)
class _Share:
    """Slots of one source in steps 0 .. stop - 1: due by the weights, and planned."""

    plan: Plan
    index: int
    steps: int

    @property
    def source(self) -> PlannedSource:
        return self.plan.sources[self.index]

    @property
    def stop(self) -> int:
        return min(self.steps, self.plan.end)

    @property
    def due(self) -> float:
        return self._due_before(self.stop) / MILLION

    @property
    def planned(self) -> int:
        return self.served(self.stop)

    @property
    def epoch_slots(self) -> int:
        return sum(self.source.micro_batches_per_window)

    def served(self, step: int) -> int:
        return int(self.plan.served(step)[self.index].sum())

    def at(self, step: int) -> float:
        """The share that is due in `step`."""
        due = self._due_before(step + 1) - self._due_before(step)
        return due / MILLION / self.plan.slots_per_step

    def step_after(self, slots: int) -> int | None:
        """The first step before which `slots` have been served; None if not in this run.

        Planned is within one slot of due, so that few steps have to be counted.
        """
        first, last = (
            bisect_left(range(self.stop), value * MILLION, key=self._due_before)
            for value in (slots - 1, slots + 1)
        )
        steps = range(first, min(last, self.stop) + 1)
        place = bisect_left(steps, slots, key=self.served)
        return steps[place] if place < len(steps) else None

    def _due_before(self, step: int) -> int:
        if not step:
            return 0
        return self.plan.mixture.due(self.index, step * self.plan.slots_per_step - 1)


def _mix(shares: list[_Share]) -> str:
    rows = [("source", "target at start", "at end", "target slots", "planned slots", "share")]
    total = max(1, sum(share.planned for share in shares))
    for share in shares:
        rows.append(
            (
                share.source.name,
                f"{share.at(0):.2%}",
                f"{share.at(max(0, share.stop - 1)):.2%}",
                f"{share.due:,.2f}",
                f"{share.planned:,}",
                f"{share.planned / total:.2%}",
            )
        )
    return "Mix:\n" + table(rows)


def _epochs(plan: Plan, shares: list[_Share], steps: int) -> Iterator[str]:
    rows = [("source", "epochs", "repeats, in a new order, from step")]
    rows += [
        (share.source.name, f"{share.planned / share.epoch_slots:.2f}", _repeats(share))
        for share in shares
    ]
    yield "Epochs:\n" + table(rows)
    for share in shares:
        limit = share.source.limit
        end = share.step_after(limit.slots) if limit and not limit.stops else None
        if end is not None:
            yield f"{share.source.name} is dropped from step {end:,} ({_limit(share.source)})"
    if plan.end < steps:
        stopping = [s.source for s in shares if s.source.limit and s.source.limit.stops]
        reason = " or ".join(map(_limit, stopping)) or "no source is left"
        yield f"the run ends before step {plan.end:,} of {steps:,}: {reason}"


def _repeats(share: _Share) -> str:
    count = (share.planned - 1) // share.epoch_slots
    if count <= 0:
        return "-"
    shown = range(1, min(count, REPEATS_SHOWN) + 1)
    steps = ", ".join(f"{share.step_after(k * share.epoch_slots):,}" for k in shown)
    return f"{steps} and {count - len(shown):,} more" if count > len(shown) else steps


def _limit(source: PlannedSource) -> str:
    return f"data.sources.{source.name}.max_epochs is {source.max_epochs}"


def _memory(settings: DataSettings, run_data: RunData) -> str:
    workers, config = settings.num_workers, run_data.config
    lanes = -(-config.slots_per_step // workers)
    rows = [("source", "lanes", "a window", "the largest", "held")]
    sizes = {source.name: window_bytes(run_data, source) for source in run_data.plan.sources}
    held = 0
    for name, lengths in sizes.items():
        mean = sum(lengths) / len(lengths)
        held += lanes * mean
        figures = (mean, max(lengths), lanes * mean)
        rows.append((name, str(lanes), *map(in_units, figures)))
    store = min(held + OBJECT_STORE_BYTES, _read_first(settings, run_data, sizes))
    largest = max(map(max, sizes.values()))
    return "\n".join(
        (
            f"Memory of each of {workers} workers, estimated:"
            if workers > 1
            else "Memory of the worker, estimated:",
            table(rows),
            f"object store: up to {in_units(store)}, the windows that its lanes hold"
            f" ({in_units(held)}) and others read ahead (at most {in_units(OBJECT_STORE_BYTES)})",
            f"decode processes: {config.decode_tasks}, each up to about {in_units(2 * largest)}"
            f" above its interpreter",
        )
    )


def _read_first(settings: DataSettings, run_data: RunData, sizes: dict[str, list[int]]) -> int:
    """Bytes of the windows that worker 0 reads, counted no further than matters."""
    read, most = 0, 2 * OBJECT_STORE_BYTES + sum(map(sum, sizes.values()))
    for key in run_data.plan.windows(0, settings.steps, 0, settings.num_workers):
        read += sizes[key.source][key.window]
        if read > most:
            break
    return read


def window_bytes(run_data: RunData, source: PlannedSource) -> list[int]:
    """Packed bytes of each window: symbols of 2 bytes, and content."""
    modality = run_data.manifests[source.name].modality
    config = run_data.config
    sequence = 2 * (config.sequence_length_of(modality) + 1)
    if modality not in BYTE_MODALITIES:
        layout = layout_of(config.media(modality))
        sequence += layout.places * layout.place_bytes
    micro_batch = config.batch_size_of(modality) * sequence
    return [count * micro_batch for count in source.micro_batches_per_window]
