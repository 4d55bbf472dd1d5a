"""The life of a run: folder, data, Ray, workers, the end. One path for laptops and clusters."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from arbitor.errors import UserError, end_with
from arbitor.modality import BYTE_MODALITIES
from arbitor.settings import write_yaml
from data_pipeline.index import index_sources
from data_pipeline.manifest import manifests_to_json
from data_pipeline.run_data import RunData
from ray_jobs.attempts import RunFailedError, train_on_ray
from ray_jobs.config import CONFIG, RunConfig, load_run_config
from ray_jobs.console import Console
from ray_jobs.construction import with_needed_parts
from ray_jobs.heartbeat import Watch
from ray_jobs.initial_weights import with_pinned_weights
from ray_jobs.journal import Journal, JournalReader
from ray_jobs.lease import Lease, refuse_if_in_use
from ray_jobs.mirror import fetch, mirrored
from ray_jobs.processes import replace_text
from ray_jobs.report import REPORT, closing_figures, write_report
from ray_jobs.run_folder import announce, check_data, refuse_unwritable, steps_done
from ray_jobs.scaling import check_gpus
from ray_jobs.stop import StoppedError, StopSignals, warn_of_short_grace
from ray_jobs.tracking import Tracker, read_note, tracking_uri
from ray_jobs.worker import DATA_MANIFEST, PROFILE


def main(job: str, about: str, defaults: Mapping[str, Any]) -> None:
    """The entry point of a job: reads the command line and runs."""
    exit_with_message(lambda: run(load_run_config(job, sys.argv[1:], defaults, about)))


def exit_with_message(work: Callable[[], Any]) -> None:
    """Exit code 2 and one line for a user's mistake, 1 and the cause for a failed run, 128 + its
    number for a signal that stopped it.
    """

    def command(_: list[str]) -> int:
        try:
            work()
        except StoppedError as error:
            print(f"{error}; the same command goes on", file=sys.stderr)
            return error.exit_code
        except RunFailedError as error:
            print(f"run failed: {error}", file=sys.stderr)
            print("the same command resumes at the newest checkpoint", file=sys.stderr)
            return 1
        return 0

    end_with(command)


def run(config: RunConfig) -> None:
    """Trains to the last step, or goes on with an unfinished run of the same configuration."""
    config = with_needed_parts(config)
    refuse_unwritable(config.folder)
    refuse_if_in_use(config.folder)
    fetch(config)
    config = with_pinned_weights(config)
    done = steps_done(config)
    if done >= config.steps:
        return say_finished(config, done)
    manifests = index_sources(config.data, storage=config.folder.parent)
    data = RunData(config.data, manifests, config.seed)
    config = end_with_data(config, data)
    if done >= config.steps:
        return say_finished(config, done)
    with mirrored(config), held(config.folder, done) as holder:
        check_data(config, data)
        announce(config, done)
        warn_of_short_grace(config.folder)
        replace_text(config.folder / CONFIG, write_yaml(config.values()), durable=True)
        replace_text(config.folder / DATA_MANIFEST, manifests_to_json(manifests), durable=True)
        with closing(Journal(config.folder)) as journal:
            journal.begin(done, "driver")
        train_and_track(config, holder)
    print(closing_lines(config))


@contextmanager
def held(folder: Path, after_step: int) -> Iterator[dict[str, Any]]:
    """Makes the run's folder and holds its lease; gives the holder's name."""
    folder.mkdir(exist_ok=True)
    lease = Lease(folder, after_step)
    try:
        yield lease.holder
    finally:
        lease.release()


def train_and_track(config: RunConfig, holder: dict[str, Any]) -> None:
    """Trains with console and MLflow beside it."""
    console, tracker = Console(config), Tracker(config)
    status = "FAILED"
    with StopSignals(config.folder) as signals:
        try:
            with ray_cluster(config), watched(config):
                signals.listen()  # Ray has taken SIGTERM for itself
                done = train_on_ray(config, holder)
            status = "FINISHED" if done >= config.steps else "KILLED"
        finally:
            console.finish()
            try:
                write_report(config)
            except OSError as error:
                print(f"{config.folder}: report not written ({error})")
            finally:
                tracker.finish(status)
    if status == "KILLED":
        raise StoppedError(signals.received, done)


def say_finished(config: RunConfig, done: int) -> None:
    """There is nothing to train; what MLflow and the mirror have not taken yet is sent again."""
    print(f"run {config.name} is finished: {done} steps in {config.folder}")
    with mirrored(config):
        note = read_note(config)
        if (note.get("status"), note.get("tracking_uri")) != ("FINISHED", tracking_uri(config)):
            Tracker(config).finish("FINISHED")


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


@contextmanager
def watched(config: RunConfig) -> Iterator[None]:
    """Workers that give no sign of life, or make no step, are killed meanwhile."""
    watch = Watch(config.folder, config.recovery.step_timeout_s, config.scaling.min_workers)
    try:
        yield
    finally:
        watch.close()


@contextmanager
def ray_cluster(config: RunConfig) -> Iterator[None]:
    """The cluster that this process is in or that RAY_ADDRESS names; else one on this machine."""
    if ray.is_initialized():
        check_gpus(config.scaling, ray.cluster_resources(), can_grow=True)
        yield
        return
    # Below errors Ray tells of its own set-up, which is not the user's business.
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if can_grow := bool(os.environ.get("RAY_ADDRESS")):
        ray.init(**options)
    else:
        cpus = max(os.cpu_count() or 1, config.scaling.min_workers)
        ray.init("local", num_cpus=cpus, include_dashboard=False, **options)
    try:
        check_gpus(config.scaling, ray.cluster_resources(), can_grow=can_grow)
        yield
    finally:
        ray.shutdown()


def closing_lines(config: RunConfig) -> str:
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
    lines.append(f"dashboard:  mlflow ui --backend-store-uri {tracking_uri(config)}")
    return "\n".join(lines)
