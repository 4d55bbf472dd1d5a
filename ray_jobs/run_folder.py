"""What a run's folder holds already, and what that means for the run that is asked for."""

import json
import os
from collections.abc import Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

from arbitor.checkpoint import CHECKPOINTS, newest_checkpoint, read_manifest
from arbitor.errors import UserError
from arbitor.settings import read_yaml
from data_pipeline.manifest import changes, manifests_from_json
from data_pipeline.run_data import RunData
from ray_jobs.config import CONFIG, RunConfig, read_config_file
from ray_jobs.construction import refuse_unbuilt
from ray_jobs.journal import CHANGED, JOURNAL, Journal, JournalReader
from ray_jobs.tracking import MLFLOW_FILE, flatten
from ray_jobs.worker import DATA_MANIFEST

DATA_CHANGES = "data-changes.jsonl"  # written where a run went on with other data

# A run that goes on may change these keys and sections; everything else decides its bits.
_MAY_CHANGE = (
    "steps",
    "log_interval",
    "eval_interval",
    "sample_interval",
    "save_interval",
    "save",
    "keep_checkpoints",
    "log_slots",
    "profile",
    "storage",
    "mirror",
    "tracking",
    "scaling.num_workers",
    "resume",
    "recovery",
    "data.decode_tasks",
    "data.max_bad_fraction",
)


def refuse_unwritable(folder: Path) -> None:
    """Raises UserError where the run could not write; `folder` need not be there yet."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = folder if folder.exists() else folder.parent
        problem = "" if os.access(place, os.W_OK, effective_ids=True) else "may not be written to"
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    if problem:
        raise UserError(f"{folder}: {problem}; mend it, or give another storage=FOLDER")


def steps_done(config: RunConfig) -> int:
    """How far the run in this folder is; refuses a folder where another configuration trained."""
    if not has_trained(config.folder):
        return 0
    before, now = configuration_there(config.folder), dict(flatten(config.values()))
    refuse_unbuilt(before, now, str(config.folder))
    if changed := changes_of(before, now):
        raise UserError(
            f"{config.folder}: holds a run of another configuration ({'; '.join(changed)});"
            " give --run another name, or delete the folder"
        )
    newest = newest_checkpoint(config.folder / CHECKPOINTS)
    return read_manifest(newest).step if newest else 0


def has_trained(folder: Path) -> bool:
    """Whether a run of this folder recorded a step or saved a checkpoint."""
    traces = chain((folder / CHECKPOINTS).glob("step-*"), JournalReader(folder).read())
    return (folder / CONFIG).exists() and any(True for _ in traces)


def configuration_there(folder: Path) -> dict[str, Any]:
    """The flattened configuration of the folder's last attempt."""
    return dict(flatten(read_config_file(folder / CONFIG).values()))


def changes_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between flattened configurations and makes another run."""
    return [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key) and not _may_change(key)
    ]


def _may_change(key: str) -> bool:
    return any(key == given or key.startswith(f"{given}.") for given in _MAY_CHANGE)


def check_data(config: RunConfig, data: RunData) -> None:
    """Refuses to go on with other data than the newest checkpoint's, or says that it does.

    Without a checkpoint the steps that the journal has are done again, with the data that they had.
    """
    newest = newest_checkpoint(config.folder / CHECKPOINTS)
    if newest is None and not (config.save and has_trained(config.folder)):
        return
    checkpoint = read_manifest(newest) if newest else None
    if checkpoint and checkpoint.plan_fingerprint == data.fingerprint:
        return
    step = checkpoint.step if checkpoint else 0
    before = manifests_from_json((config.folder / DATA_MANIFEST).read_text())
    recorded = RunData(config.data, before, config.seed)
    if checkpoint is None and recorded.fingerprint == data.fingerprint:
        return
    found = changes(before, data.manifests) or ["another version of the program plans otherwise"]
    if not config.resume.allow_changed_data:
        raise UserError(
            f"{config.folder}: its data changed since step {step} ({'; '.join(found)});"
            " restore it, give --run another name, or set resume.allow_changed_data=true"
        )
    print(f"going on after step {step} with changed data: {'; '.join(found)}")
    note_change(config, "other data")
    with open(config.folder / DATA_CHANGES, "a") as file:
        file.write(json.dumps({"after_step": step, "changes": found}) + "\n")


def announce(config: RunConfig, done: int) -> None:
    """Says what a folder that was used before means.

    A run without a checkpoint that saves nothing starts over in it, and so does one whose
    configuration was mended before its first step.
    """
    path = config.folder / CONFIG
    mended = path.exists() and changes_of(
        configuration_there(config.folder), dict(flatten(config.values()))
    )
    if done == 0 and (not config.save or mended):
        for name in (JOURNAL, MLFLOW_FILE):
            (config.folder / name).unlink(missing_ok=True)
    if path.exists() and (before := read_yaml(path)["steps"]) != config.steps:
        note_change(config, f"{config.steps} steps instead of {before}")
    last = max((record.step for record in JournalReader(config.folder).read()), default=0)
    if last > done:
        print(f"resuming after step {done}; steps {done + 1} to {last} are in the journal already")
    elif done:
        print(f"resuming after step {done}")


def note_change(config: RunConfig, what: str) -> None:
    """Steps that are replayed from here on may differ from what is recorded of them."""
    with closing(Journal(config.folder)) as journal:
        journal.note(f"{CHANGED} with {what}")
