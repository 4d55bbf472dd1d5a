"""Worker 0's account of a run: the journal, validation, samples and checkpoints."""

import math
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor

from arbitor.checkpoint import (
    CHECKPOINTS,
    CheckpointWriter,
    SaveOutcome,
)
from arbitor.loss import FIGURES
from arbitor.main import ARBModel
from arbitor.modality import BYTE_MODALITIES
from arbitor.trainer import StepReport, evaluate
from data_pipeline.bad_rows import BadRows
from data_pipeline.pack import PackedSlot
from data_pipeline.run_data import RunData, held_out_slots
from data_pipeline.states import StateTable
from ray_jobs.conditions import conditions
from ray_jobs.config import RunConfig
from ray_jobs.group import Group
from ray_jobs.heartbeat import Heartbeat
from ray_jobs.journal import SAVE_S, Journal
from ray_jobs.samples import write_samples
from ray_jobs.slots import to_batch
from ray_jobs.step_metrics import StepMetrics

TRAINING_AGAIN = "training again"  # how a note of the journal begins


class Recorder:
    """Worker 0's account of the run: journal, validation and checkpoints at their intervals."""

    def __init__(
        self,
        config: RunConfig,
        group: Group,
        heartbeat: Heartbeat,
        data: RunData,
        model: ARBModel,
        bad_rows: BadRows,
        world: int,
    ):
        self.config, self.group, self.heartbeat = config, group, heartbeat
        self.data, self.model, self.bad_rows = data, model, bad_rows
        self._saved = group.start  # the step of the newest checkpoint that was begun
        self.states = StateTable(config.folder, data.plan.fingerprint)
        self.journal = Journal(config.folder, group.start)
        self.restarts = self.journal.begin(group.start, "worker")
        self.metrics_of = StepMetrics(config, data, model, group.start, world)
        self.blocked: dict[str, float] = {}  # how long the last checkpoint held the loop up
        self.checkpoints = CheckpointWriter(config.folder / CHECKPOINTS, config.keep_checkpoints)
        self._reader = ThreadPoolExecutor(1)
        self._held_out: dict[str, Future[list[PackedSlot]]] = {}
        self._told: set[str] = set()  # the sources whose held-out rows were looked at

    def __call__(self, report: StepReport) -> None:
        done = report.step + 1
        self.group.check()
        if report.step == self.group.start:
            self.first_step_done()
        metrics = self.step_metrics(report) | self.checkpoint_metrics(self.checkpoints.poll())
        if self.config.eval_interval and self._due(done, self.config.eval_interval):
            started = time.perf_counter()
            with self.heartbeat.phase("validation"):
                metrics |= self.validation_metrics()
            metrics["throughput/validation_s"] = time.perf_counter() - started
        if self.config.sample_interval and self._due(done, self.config.sample_interval):
            held_out = self.held_out_slots()
            with self.heartbeat.phase("samples"):
                write_samples(self.model, self.config, done, held_out)
        self.journal.append(done, metrics | self.blocked)
        self.states.add(self.data.plan, done)
        self.blocked = {}
        if self.config.save and self._due(done, self.config.save_interval):
            started = time.perf_counter()
            self.save(done)
            self.blocked = {"checkpoint/blocked_s": time.perf_counter() - started}

    def first_step_done(self) -> None:
        """What these workers do only once."""
        if self.restarts:
            self.journal.note(f"{TRAINING_AGAIN} after step {self.group.start}")
        # Read while the next steps run: held-out images and videos take seconds to decode.
        if self.config.eval_interval > 0:
            for source in self.data.manifests:
                slots = self._reader.submit(held_out_slots, self.data, source)
                self._held_out[source] = slots

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
        for source, slots in self.held_out_slots().items():
            if slots:
                means = evaluate(self.model, (to_batch(slot, device) for slot in slots))
                metrics[f"validation/{source}"] = means.pop("loss")
                if self.modality_of(source) in BYTE_MODALITIES:
                    metrics[f"bits_per_byte/{source}"] = means["bytes"] / math.log(2)
                else:
                    metrics |= {f"validation_parts/{source}/{k}": v for k, v in means.items()}
        return metrics

    def held_out_slots(self) -> dict[str, list[PackedSlot]]:
        """By source, once they are read; what is wrong with them is told the first time."""
        held_out = {source: slots.result() for source, slots in self._held_out.items()}
        for source in held_out.keys() - self._told:
            self._told.add(source)
            self.bad_rows.list_held_out(held_out[source])
            if self.data.manifests[source].eval_segments and not held_out[source]:
                self.journal.note(
                    f"{source}: not one of its held-out rows can be decoded, so it is not validated"
                )
        return held_out

    def save(self, done: int) -> None:
        """Begins a checkpoint; the last one is written when `close` returns."""
        with self.heartbeat.phase("save"):
            self.journal.sync()  # what a checkpoint goes on from is never recorded again
            before = self.checkpoints.save(
                self.model.state_dict(),
                step=done,
                config=self.config.values(),
                plan_fingerprint=self.data.fingerprint,
                conditions=conditions(self.config),
                token=self.group.token,
            )
        self._saved = done
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
        return {SAVE_S: outcome.seconds}

    def close(self, done: int) -> None:
        """Waits for the last checkpoint; a run whose last one failed has failed."""
        if self.config.save and done != self._saved:
            self.save(done)
        self._reader.shutdown(wait=False, cancel_futures=True)
        with self.heartbeat.phase("save"):
            outcome = self.checkpoints.wait()
        self.checkpoint_metrics(outcome)
        self.journal.close()
        if outcome is not None and outcome.error:
            raise OSError(f"the last checkpoint was not written: {outcome.error}")
