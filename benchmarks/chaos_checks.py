"""Two runs of the same configuration compared: bits, rows, journal, MLflow."""

from collections import Counter
from itertools import chain
from typing import NamedTuple

from mlflow.tracking import MlflowClient

from arbitor.checkpoint import CHECKPOINTS, load_checkpoint, newest_checkpoint
from ray_jobs.config import RunConfig
from ray_jobs.journal import JournalReader
from ray_jobs.slots import logged_slots
from ray_jobs.tracking import read_note

Place = tuple[int, int]  # step, slot
Seen = tuple[str, list[int], str]  # source, row ids, sha256
DETERMINISTIC = ("loss/", "loss_by_modality/", "parts/", "trunk_gradient_rms/", "ternary/")


class Findings(NamedTuple):
    """What was compared; `faults` is empty where the runs agree."""

    tensors_equal: int
    slots_of_plan: int
    slots_logged: int
    slots_replayed: int
    torn_lines: int  # a worker was killed while it wrote one
    steps_in_journal: int
    points_in_mlflow: int
    faults: list[str]


def compare_runs(calm: RunConfig, wild: RunConfig) -> Findings:
    """`calm` ran undisturbed; what `wild` has otherwise is a fault."""
    faults: list[str] = []
    tensors = compare_checkpoints(calm, wild, faults)
    rows = compare_rows(calm, wild, faults)
    steps = compare_journals(calm, wild, faults)
    points = compare_tracking(wild, faults)
    return Findings(tensors, *rows, steps, points, faults)


def compare_so_far(calm: RunConfig, wild: RunConfig) -> list[str]:
    """Faults in what an unfinished `wild` has consumed and recorded up to now."""
    faults: list[str] = []
    compare_rows(calm, wild, faults, has_ended=False)
    compare_journals(calm, wild, faults, has_ended=False)
    return faults


def compare_checkpoints(calm: RunConfig, wild: RunConfig, faults: list[str]) -> int:
    """Number of equal tensors of the last checkpoints."""
    (calm_manifest, expected), (manifest, found) = (
        load_checkpoint(newest_checkpoint(config.folder / CHECKPOINTS)) for config in (calm, wild)
    )
    if (manifest.step, sorted(found)) != (calm_manifest.step, sorted(expected)):
        faults.append(f"the last checkpoint is of step {manifest.step}, or has other tensors")
        return 0
    unequal = [name for name, tensor in expected.items() if not tensor.equal(found[name])]
    if unequal:
        faults.append(f"{len(unequal)} tensors differ, {unequal[0]} among them")
    return len(expected) - len(unequal)


def compare_rows(
    calm: RunConfig, wild: RunConfig, faults: list[str], *, has_ended: bool = True
) -> tuple[int, int, int, int]:
    """Slots of the plan, slots logged, slots logged again, torn lines."""
    calm_entries, calm_torn = seen_slots(calm)
    expected = dict(calm_entries)
    if calm_torn or not len(calm_entries) == len(expected) == _num_slots(calm):
        faults.append("the undisturbed run did not log each slot once")
    entries, torn = seen_slots(wild)
    others = [place for place, seen in entries if expected.get(place) != seen]
    if others:
        faults.append(f"{len(others)} slots had other rows, {others[0]} among them")
    times = Counter(place for place, _ in entries)
    missing = expected.keys() - times.keys()
    if has_ended and missing:
        faults.append(f"{len(missing)} slots were never consumed, {min(missing)} among them")
    return len(expected), len(entries), len(entries) - len(times), torn


def _num_slots(config: RunConfig) -> int:
    return config.steps * config.data.slots_per_step


def seen_slots(config: RunConfig) -> tuple[list[tuple[Place, Seen]], int]:
    """All that workers wrote down, replays included, and how many lines a kill has torn."""
    logged, torn = logged_slots(config.folder)
    entries = [
        ((entry["step"], entry["slot"]), (entry["source"], entry["row_ids"], entry["sha256"]))
        for entry in chain.from_iterable(logged.values())
    ]
    return entries, torn


def compare_journals(
    calm: RunConfig, wild: RunConfig, faults: list[str], *, has_ended: bool = True
) -> int:
    """Number of steps in the journal of `wild`."""

    def metrics(config: RunConfig) -> list[tuple[int, dict[str, float]]]:
        return [
            (r.step, {k: v for k, v in r.metrics.items() if k.startswith(DETERMINISTIC)})
            for r in JournalReader(config.folder).read()
        ]

    expected, found = metrics(calm), metrics(wild)
    steps = wild.steps if has_ended else len(found)
    if [step for step, _ in found] != list(range(1, steps + 1)):
        faults.append("the journal does not have each step once")
    differing = [
        step for (step, ours), (_, calms) in zip(found, expected, strict=False) if ours != calms
    ]
    if differing:
        faults.append(f"{len(differing)} steps have other losses, step {differing[0]} the first")
    return len(found)


def compare_tracking(wild: RunConfig, faults: list[str]) -> int:
    """Number of points of loss/total in MLflow, which must be the journal's, each once."""
    note = read_note(wild)
    client = MlflowClient(note["tracking_uri"])
    info = client.get_run(note["run_id"]).info
    runs = client.search_runs([info.experiment_id])
    if len(runs) != 1 or info.status != "FINISHED":
        faults.append(f"MLflow has {len(runs)} runs, this one is {info.status}")
    points = client.get_metric_history(note["run_id"], "loss/total")
    records = JournalReader(wild.folder).read()
    expected = [(record.step, record.metrics["loss/total"]) for record in records]
    if sorted((point.step, point.value) for point in points) != expected:
        faults.append("MLflow's points of loss/total are not the journal's, each once")
    return len(points)
