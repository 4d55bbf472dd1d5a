"""The life of a run: folder, data, Ray, workers, the end. One path for laptops and clusters."""

import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from arbitor.checkpoint import newest_checkpoint, read_manifest
from arbitor.errors import UserError
from arbitor.modality import BYTE_MODALITIES
from arbitor.settings import build, read_yaml, write_yaml
from data_pipeline.index import index_sources
from data_pipeline.manifest import changes, manifests_from_json, manifests_to_json
from data_pipeline.run_data import RunData
from ray_jobs.config import CONFIG, RunConfig, load_run_config
from ray_jobs.console import Console
from ray_jobs.construction import refuse_unbuilt, with_needed_parts
from ray_jobs.initial_weights import with_pinned_weights
from ray_jobs.journal import NAME as JOURNAL
from ray_jobs.journal import Journal, JournalReader
from ray_jobs.report import REPORT, closing_figures, write_report
from ray_jobs.scaling import ray_scaling
from ray_jobs.tracking import NOTE, Tracker, flatten, read_note
from ray_jobs.worker import CHECKPOINTS, DATA_MANIFEST, PROFILE, run_worker

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
)
_MAY_CHANGE += ("storage", "tracking", "scaling.num_workers", "resume")
_MAY_CHANGE += ("data.decode_tasks", "data.max_bad_fraction")


def main(job: str, about: str, defaults: Mapping[str, Any]) -> None:
    """The entry point of a job: reads the command line and runs."""
    exit_with_message(lambda: run(load_run_config(job, sys.argv[1:], defaults, about)))


def exit_with_message(work: Callable[[], Any]) -> None:
    """Exit code 2 and one line for a user's mistake; 1 and the worker's error for a failed run."""
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ray.train.TrainingFailedError as error:
        print(error, file=sys.stderr)
        print("run failed; the same command resumes at the newest checkpoint", file=sys.stderr)
        sys.exit(1)


def run(config: RunConfig) -> None:
    """Trains to the last step, or goes on with an unfinished run of the same configuration."""
    config = with_pinned_weights(with_needed_parts(config))
    done = steps_done(config)
    if done >= config.steps:
        return say_finished(config, done)
    manifests = index_sources(config.data, storage=config.folder.parent)
    data = RunData(config.data, manifests, config.seed)
    config = end_with_data(config, data)
    if done >= config.steps:
        return say_finished(config, done)
    check_data(config, data)
    config.folder.mkdir(parents=True, exist_ok=True)
    announce(config, done)
    (config.folder / CONFIG).write_text(write_yaml(config.values()))
    (config.folder / DATA_MANIFEST).write_text(manifests_to_json(manifests))
    with closing(Journal(config.folder)) as journal:
        journal.begin(done, "driver")
    console, tracker = Console(config), Tracker(config)
    status = "FAILED"
    try:
        with ray_cluster(config):
            train_on_ray(config)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        console.finish()
        write_report(config)
        tracker.finish(status)
    print(closing_lines(config, tracker.uri))


def say_finished(config: RunConfig, done: int) -> None:
    """There is nothing to train; what MLflow has not taken yet is sent again."""
    print(f"run {config.name} is finished: {done} steps in {config.folder}")
    if read_note(config).get("status") != "FINISHED":
        Tracker(config).finish("FINISHED")


def announce(config: RunConfig, done: int) -> None:
    """Says what a folder that was used before means; a run that saves nothing starts over in it."""
    if not config.save:
        for name in (JOURNAL, NOTE):
            (config.folder / name).unlink(missing_ok=True)
    last = max((record.step for record in JournalReader(config.folder).read()), default=0)
    if last > done:
        print(f"resuming after step {done}; steps {done + 1} to {last} are in the journal already")
    elif done:
        print(f"resuming after step {done}")


def steps_done(config: RunConfig) -> int:
    """How far the run in this folder is; refuses a folder that belongs to another configuration."""
    path = config.folder / CONFIG
    if not path.exists():
        return 0
    before = dict(flatten(build(RunConfig, read_yaml(path)).values()))
    now = dict(flatten(config.values()))
    refuse_unbuilt(before, now, str(config.folder))
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key) and not key.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{config.folder}: holds a run of another configuration ({'; '.join(changed)});"
            " give --run another name, or delete the folder"
        )
    newest = newest_checkpoint(config.folder / CHECKPOINTS)
    return read_manifest(newest).step if newest else 0


def end_with_data(config: RunConfig, data: RunData) -> RunConfig:
    """The same run, ending where sources that must not repeat any more leave it without data."""
    end = data.plan.end
    if end == 0:
        raise UserError(
            "data.sources: max_epochs leaves less data than one step needs; raise it, or lower"
            " data.slots_per_step"
        )
    if end >= config.steps:
        return config
    print(f"data.sources: max_epochs is reached after step {end}; the run ends there")
    return replace(config, steps=end)


def check_data(config: RunConfig, data: RunData) -> None:
    """Refuses to go on with other data than the newest checkpoint's, or says that it does."""
    newest = newest_checkpoint(config.folder / CHECKPOINTS)
    if newest is None:
        return
    checkpoint = read_manifest(newest)
    if checkpoint.plan_fingerprint == data.fingerprint:
        return
    before = manifests_from_json((config.folder / DATA_MANIFEST).read_text())
    found = changes(before, data.manifests) or ["another version of the program plans otherwise"]
    if not config.resume.allow_changed_data:
        raise UserError(
            f"{config.folder}: its data changed since step {checkpoint.step} ({'; '.join(found)});"
            " restore it, give --run another name, or set resume.allow_changed_data=true"
        )
    print(f"going on after step {checkpoint.step} with changed data: {'; '.join(found)}")
    with open(config.folder / DATA_CHANGES, "a") as file:
        file.write(json.dumps({"after_step": checkpoint.step, "changes": found}) + "\n")


@contextmanager
def ray_cluster(config: RunConfig) -> Iterator[None]:
    """The cluster that this process is in or that RAY_ADDRESS names; else one on this machine."""
    if ray.is_initialized():
        yield
        return
    # Below errors Ray tells of its own set-up, which is not the user's business.
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
    else:
        cpus = max(os.cpu_count() or 1, config.scaling.min_workers)
        ray.init("local", num_cpus=cpus, include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def train_on_ray(config: RunConfig) -> None:
    # Ray asks its workers every 2 s whether they live or have ended; sooner is cheap.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    trainer = TorchTrainer(
        run_worker,
        train_loop_config=config.values(),
        scaling_config=ray_scaling(config.scaling),
        run_config=ray.train.RunConfig(
            name="attempt-" + uuid.uuid4().hex[:8], storage_path=str(config.folder / "ray")
        ),
    )
    trainer.fit()


def closing_lines(config: RunConfig, tracking_uri: str) -> str:
    """Where the run went and how to look at it."""
    records = list(JournalReader(config.folder).read())
    first, last = records[0].metrics, records[-1].metrics
    lines = [
        f"{len(records)} steps done; loss {first['loss/total']:.4f} -> {last['loss/total']:.4f}"
    ]
    for source in config.data.active_sources:
        if f"validation/{source}" in last:
            is_bytes = config.data.sources[source].modality in BYTE_MODALITIES
            unit = " nats per symbol" if is_bytes else ", the sum of its parts"
            lines.append(f"validation of {source}: {last[f'validation/{source}']:.4f}{unit}")
    lines += closing_figures(config)
    lines.append(f"run folder: {config.folder}")
    if config.profile:
        lines.append(f"profile:    {config.folder / PROFILE}")
    lines.append(f"report:     {config.folder / REPORT}")
    lines.append(f"dashboard:  mlflow ui --backend-store-uri {tracking_uri}")
    return "\n".join(lines)
