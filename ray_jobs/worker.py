"""One worker of a run: builds the model, wires data to the loop and the loop to the account."""

import traceback
from dataclasses import replace
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
from torch.distributed import all_reduce

from arbitor.kernel.backend import set_backend
from arbitor.main import ARBModel
from arbitor.optimizer import TernaryOptimizer
from arbitor.profiling import StepProfile
from arbitor.settings import build
from arbitor.trainer import StepReport, train
from data_pipeline.bad_rows import BadRows
from data_pipeline.manifest import manifests_from_json
from data_pipeline.run_data import RunData, read_slots
from data_pipeline.states import StateTable
from data_pipeline.stream import stream_slots
from ray_jobs.conditions import restore, set_conditions
from ray_jobs.config import RunConfig
from ray_jobs.group import join_group
from ray_jobs.heartbeat import Heartbeat
from ray_jobs.initial_weights import load_initial_weights
from ray_jobs.memory import refuse_too_large
from ray_jobs.recorder import Recorder
from ray_jobs.slots import begin, by_step, log_slots
from ray_jobs.stop import StopBoundary

DATA_MANIFEST = "data.json"
PROFILE = "profile.txt"
PROFILED_STEP = 5  # of this start of the run: kernels are compiled and recorded by then


def run_worker(values: dict[str, Any]) -> int:
    """The function that every Ray Train worker runs: the steps done in the end.

    `values` are the `config` as plain data and the `holder` of the run's lease.
    """
    try:
        return _run_worker(build(RunConfig, values["config"]), values["holder"])
    except Exception as error:
        error.add_note(traceback.format_exc())  # travels with it, as the trace does not
        raise


def _run_worker(config: RunConfig, holder: dict[str, Any]) -> int:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    set_conditions(config)
    set_backend(config.backend)

    group = join_group(config.folder, holder)
    if group.checkpoint is None:
        refuse_too_large(config, device, context.get_local_world_size())
    heartbeat = Heartbeat(config.folder, rank, group.token)
    data = open_run_data(config)
    bad_rows = BadRows(config.folder, rank, data)
    span = (data, group.start, config.steps, rank, world)
    slots = bad_rows.watch(begin(stream_slots(*span), read_slots(*span)))
    if config.log_slots:
        slots = log_slots(slots, config.folder, rank)
    model = ARBModel(config.model, config.seed, config.update)
    if group.checkpoint:
        restore(model, group.checkpoint, config, data)
    elif config.init_from:
        load_initial_weights(model, config)
    model.to(device)
    optimizer = TernaryOptimizer(
        model,
        config.update,
        total_steps=config.steps,
        slots_per_step=config.data.slots_per_step,
        seed=config.seed,
        all_reduce=partial(all_reduce, async_op=True) if world > 1 else None,
    )
    recorder = None
    if rank == 0:
        recorder = Recorder(config, group, heartbeat, data, model, bad_rows, world)
    profile = None
    if config.profile and rank == 0:
        profiled = min(group.start + PROFILED_STEP, config.steps - 1)
        profile = StepProfile(profiled, config.folder / PROFILE)
    steps = StopBoundary(config.folder, rank, world).watch(by_step(slots, device))
    done = group.start

    def report(step: StepReport) -> None:
        nonlocal done
        done = step.step + 1
        heartbeat.step(step.step)
        if recorder:
            recorder(step)

    train(model, optimizer, steps, report, profile, config.loss_weight)
    if recorder:
        recorder.close(done)
    heartbeat.close()
    return done


def open_run_data(config: RunConfig) -> RunData:
    """The run's data as its index, which the driver left in the run folder, describes it."""
    manifests = manifests_from_json((config.folder / DATA_MANIFEST).read_text())
    data = RunData(config.data, manifests, config.seed)
    return replace(data, states=StateTable(config.folder, data.plan.fingerprint).load())
