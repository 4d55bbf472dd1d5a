"""One worker of a run: builds the model, wires data to the loop, keeps journal and checkpoints."""

import json
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch.distributed import all_reduce

from arbitor.batch import SlotBatch
from arbitor.checkpoint import (
    CHECKPOINTS,
    CheckpointWriter,
    SaveOutcome,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
)
from arbitor.kernel.backend import set_backend
from arbitor.loss import FIGURES
from arbitor.main import ARBModel
from arbitor.modality import BYTE_MODALITIES
from arbitor.optimizer import TernaryOptimizer
from arbitor.profiling import StepProfile
from arbitor.settings import build
from arbitor.trainer import StepReport, evaluate, train
from data_pipeline.bad_rows import BadRows
from data_pipeline.manifest import manifests_from_json
from data_pipeline.pack import PackedSlot
from data_pipeline.run_data import RunData, held_out_slots
from data_pipeline.states import StateTable
from data_pipeline.stream import stream_slots
from ray_jobs.config import RunConfig
from ray_jobs.initial_weights import load_initial_weights
from ray_jobs.journal import Journal
from ray_jobs.samples import write_samples
from ray_jobs.step_metrics import StepMetrics

DATA_MANIFEST = "data.json"
PROFILE = "profile.txt"
PROFILED_STEP = 5  # of this start of the run: kernels are compiled and recorded by then


def run_worker(values: dict[str, Any]) -> None:
    """The function that every Ray Train worker runs; `values` are those of the `RunConfig`."""
    config = build(RunConfig, values)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    set_conditions(config)
    set_backend(config.backend)

    data = open_run_data(config)
    checkpoint = newest_checkpoint(config.folder / CHECKPOINTS)
    start = read_manifest(checkpoint).step if checkpoint else 0
    bad_rows = BadRows(config.folder, rank, data)
    slots = begin(bad_rows.watch(stream_slots(data, start, config.steps, rank, world)))
    if config.log_slots:
        slots = log_slots(slots, config.folder / f"slots-{rank}.jsonl")
    model = ARBModel(config.model, config.seed, config.update)
    if checkpoint:
        restore(model, checkpoint, config, data)
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
    recorder = Recorder(config, data, model, bad_rows, start, world) if rank == 0 else None
    profile = None
    if config.profile and rank == 0:
        profile = StepProfile(min(start + PROFILED_STEP, config.steps - 1), config.folder / PROFILE)
    steps = by_step(slots, device)
    train(model, optimizer, steps, recorder or ignore, profile, config.loss_weight)
    if recorder:
        recorder.close()


def open_run_data(config: RunConfig) -> RunData:
    """The run's data as its index, which the driver left in the run folder, describes it."""
    manifests = manifests_from_json((config.folder / DATA_MANIFEST).read_text())
    data = RunData(config.data, manifests, config.seed)
    return replace(data, states=StateTable(config.folder, data.plan.fingerprint).load())


def set_conditions(config: RunConfig) -> None:
    """What the bits of a slot's gradient depend on is fixed here, never left to the host."""
    torch.set_num_threads(config.scaling.threads_per_worker)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every kernel writes all of it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses the above
    torch.backends.cuda.matmul.allow_tf32 = False


def conditions(config: RunConfig) -> dict[str, Any]:
    """The conditions under which a run's bits repeat, for the checkpoint's manifest."""
    if config.scaling.use_gpu:
        device = torch.cuda.get_device_name()
    else:
        device = torch.backends.cpu.get_cpu_capability()
    return {
        "device": device,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads_per_worker": config.scaling.threads_per_worker,
    }


def restore(model: ARBModel, checkpoint: Path, config: RunConfig, data: RunData) -> None:
    """Loads a checkpoint if data, plan and conditions are those that it was made with."""
    manifest, tensors = load_checkpoint(checkpoint)
    if manifest.plan_fingerprint != data.fingerprint and not config.resume.allow_changed_data:
        raise RuntimeError(f"{checkpoint}: was made with other data or another plan; cannot go on")
    now = conditions(config)
    changed = [f"{k} {old} -> {now[k]}" for k, old in manifest.conditions.items() if now[k] != old]
    if changed:
        raise RuntimeError(f"{checkpoint}: bits would differ here ({'; '.join(changed)})")
    model.load_state_dict(tensors)


def begin(slots: Iterator[PackedSlot]) -> Iterator[PackedSlot]:
    """Fetches the first slot at once, on a thread: data starts while the model is being built."""
    pool = ThreadPoolExecutor(1)
    first = pool.submit(next, slots)
    pool.shutdown(wait=False)
    return chain((future.result() for future in [first]), slots)


def log_slots(slots: Iterator[PackedSlot], path: Path) -> Iterator[PackedSlot]:
    """Passes the slots on and appends a line for each: what this worker really saw."""
    with open(path, "a") as file:
        for slot in slots:
            entry = {
                "step": slot.step,
                "slot": slot.slot,
                "source": slot.source,
                "row_ids": slot.row_ids.tolist(),
                "sha256": slot.sha256,
            }
            file.write(json.dumps(entry) + "\n")
            file.flush()
            yield slot


def by_step(
    slots: Iterator[PackedSlot], device: torch.device
) -> Iterator[tuple[int, list[SlotBatch]]]:
    """This worker's slots, gathered by step."""
    for step, group in groupby(slots, key=lambda slot: slot.step):
        yield step, [to_batch(slot, device) for slot in group]


def to_batch(slot: PackedSlot, device: torch.device) -> SlotBatch:
    return SlotBatch.from_symbols(
        slot.symbols,
        step=slot.step,
        slot=slot.slot,
        source=slot.source,
        modality=slot.modality,
        content=slot.content,
        device=device,
    )


def ignore(report: StepReport) -> None:
    """What workers other than the first do with a report."""


class Recorder:
    """Worker 0's account of the run: journal, validation and checkpoints at their intervals."""

    def __init__(
        self,
        config: RunConfig,
        data: RunData,
        model: ARBModel,
        bad_rows: BadRows,
        start: int,
        world: int,
    ):
        self.config, self.data, self.model, self.bad_rows = config, data, model, bad_rows
        self.states = StateTable(config.folder, data.plan.fingerprint)
        self.journal = Journal(config.folder)
        self.restarts = self.journal.begin(start, "worker")
        self.metrics_of = StepMetrics(config, data, model, start, world)
        self.blocked: dict[str, float] = {}  # how long the last checkpoint held the loop up
        self.checkpoints = CheckpointWriter(config.folder / CHECKPOINTS, config.keep_checkpoints)
        # Read while the first steps run: held-out images and videos take seconds to decode.
        self._reader = ThreadPoolExecutor(1)
        self._held_out = {
            source: self._reader.submit(held_out_slots, data, source)
            for source in data.manifests
            if config.eval_interval > 0
        }

    def __call__(self, report: StepReport) -> None:
        done = report.step + 1
        metrics = self.step_metrics(report) | self.checkpoint_metrics(self.checkpoints.poll())
        if self._due(done, self.config.eval_interval):
            started = time.perf_counter()
            metrics |= self.validation_metrics()
            metrics["throughput/validation_s"] = time.perf_counter() - started
        if self.config.sample_interval and self._due(done, self.config.sample_interval):
            held_out = {source: slots.result() for source, slots in self._held_out.items()}
            write_samples(self.model, self.config, done, held_out)
        self.journal.append(done, metrics | self.blocked)
        self.states.add(self.data.plan, done)
        self.blocked = {}
        if self.config.save and self._due(done, self.config.save_interval):
            started = time.perf_counter()
            self.save(done)
            self.blocked = {"checkpoint/blocked_s": time.perf_counter() - started}

    def _due(self, done: int, interval: int) -> bool:
        return done == self.config.steps or (interval > 0 and done % interval == 0)

    def step_metrics(self, report: StepReport) -> dict[str, float]:
        """Losses of the sources that the step served, and how it went."""
        return {
            **self.loss_metrics(report),
            **self.data_metrics(),
            **self.metrics_of(report),
            "run/restarts": self.restarts,
            "ternary/flip_rate": report.update.flip_rate,
            "ternary/zero_fraction": report.update.zero_fraction,
            "ternary/saturated_fraction": report.update.saturated_fraction,
            "ternary/clipped_fraction": report.update.clipped_fraction,
            **report.update.parts,
        }

    def loss_metrics(self, report: StepReport) -> dict[str, float]:
        """`loss/total` is weighted, all others are as they are; means over the slots of the step.

        `parts/<source>/<figure>` where the loss has several parts.
        """
        values: dict[str, list[float]] = defaultdict(list)
        weighted = []
        for slot in self.data.plan.step(report.step):
            loss, modality = report.update.losses[slot.slot], self.modality_of(slot.source)
            weighted.append(loss * self.config.loss_weight.of(modality))
            values[f"loss/{slot.source}"].append(loss)
            values[f"loss_by_modality/{modality}"].append(loss)
            figures = dict(zip(FIGURES, report.update.figures[slot.slot], strict=True))
            values[f"trunk_gradient_rms/{modality}"].append(figures.pop("trunk_gradient_rms"))
            if modality not in BYTE_MODALITIES:
                for name, value in figures.items():
                    values[f"parts/{slot.source}/{name}"].append(value)
        means = {key: math.fsum(v) / len(v) for key, v in values.items()}
        means = {key: mean for key, mean in means.items() if not math.isnan(mean)}
        return {"loss/total": math.fsum(weighted) / len(weighted)} | means

    def modality_of(self, source: str) -> str:
        return self.config.data.sources[source].modality

    def data_metrics(self) -> dict[str, float]:
        """Bad rows by source as all workers know of them now, cut captions as this one does."""
        counts, cut = self.bad_rows.counts(), self.bad_rows.truncated
        return {f"data/bad_rows/{source}": count for source, count in counts.items()} | {
            f"data/truncated_captions/{source}": count for source, count in cut.items() if count
        }

    def validation_metrics(self) -> dict[str, float]:
        """Mean loss over each source's fixed held-out slots."""
        metrics = {}
        device = next(self.model.buffers()).device
        for source, slots in self._held_out.items():
            if slots.result():
                means = evaluate(self.model, (to_batch(slot, device) for slot in slots.result()))
                metrics[f"validation/{source}"] = means.pop("loss")
                if self.modality_of(source) in BYTE_MODALITIES:
                    metrics[f"bits_per_byte/{source}"] = means["bytes"] / math.log(2)
                else:
                    metrics |= {f"validation_parts/{source}/{k}": v for k, v in means.items()}
        return metrics

    def save(self, done: int) -> None:
        """Begins a checkpoint; the last one is written when `close` returns."""
        before = self.checkpoints.save(
            self.model.state_dict(),
            step=done,
            config=self.config.values(),
            plan_fingerprint=self.data.fingerprint,
            conditions=conditions(self.config),
        )
        self.checkpoint_metrics(before)

    def checkpoint_metrics(self, outcome: SaveOutcome | None) -> dict[str, float]:
        """Tells the end of a checkpoint: from here on it is durable, or known to have failed."""
        if outcome is None:
            return {}
        if outcome.error:
            self.journal.note(
                f"checkpoint of step {outcome.step} not written: {outcome.error};"
                " the ones before it are untouched"
            )
            return {}
        self.journal.note(f"checkpoint of step {outcome.step} is durable")
        return {"checkpoint/save_s": outcome.seconds}

    def close(self) -> None:
        """Waits for the last checkpoint; a run whose last one failed has failed."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        outcome = self.checkpoints.wait()
        self.checkpoint_metrics(outcome)
        self.journal.close()
        if outcome is not None and outcome.error:
            raise RuntimeError(f"the last checkpoint was not written: {outcome.error}")
