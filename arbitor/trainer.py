"""The training loop: an iterator of steps in, a report a step out. Knows no Ray."""

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.batch import SlotBatch
from arbitor.cuda_graph import Recording, can_record
from arbitor.loss import FIGURES, LossWeight
from arbitor.main import ARBModel
from arbitor.optimizer import TernaryOptimizer, UpdateReport
from arbitor.profiling import StepProfile


@dataclass(frozen=True)
class StepReport:
    """One step as this worker saw it; the update's figures cover all workers."""

    step: int
    update: UpdateReport
    seconds: float
    data_wait_seconds: float


def train(
    model: ARBModel,
    optimizer: TernaryOptimizer,
    steps: Iterable[tuple[int, list[SlotBatch]]],
    report: Callable[[StepReport], None],
    profile: StepProfile | None = None,
    loss_weight: LossWeight | None = None,
) -> None:
    """Runs the steps in order; `steps` yields each step's number and this worker's slots of it."""
    run_slot = SlotRunner(model, optimizer, loss_weight)
    iterator = iter(steps)
    while True:
        started = time.perf_counter()
        item = next(iterator, None)
        if item is None:
            return
        step, slots = item
        data_ready = time.perf_counter()
        with profile.around(step) if profile else nullcontext():
            update = train_step(run_slot, step, slots)
        finished = time.perf_counter()
        report(StepReport(step, update, finished - started, data_ready - started))


def train_step(run_slot: "SlotRunner", step: int, slots: list[SlotBatch]) -> UpdateReport:
    """Forward and backward of this worker's slots, then the update that all workers share."""
    for batch in slots:
        run_slot(step, batch)
    return run_slot.optimizer.step(step)


class SlotRunner:
    """Forward, backward and conversion of a slot; on a GPU recorded once per shape of slot.

    The first slot of a shape runs as it is: it compiles the kernels, and weights that get their
    first gradient are calibrated after it.
    """

    def __init__(
        self,
        model: ARBModel,
        optimizer: TernaryOptimizer,
        loss_weight: LossWeight | None = None,
    ):
        self.model, self.optimizer = model, optimizer
        self.loss_weight = loss_weight or LossWeight()
        self._touched: dict[Hashable, list[str]] = {}  # weights that slots of a shape train
        self._recorded: dict[Hashable, tuple[SlotBatch, Recording]] = {}

    def __call__(self, step: int, batch: SlotBatch) -> None:
        self.optimizer.begin_slot(step, batch.slot)
        if self._is_recordable(batch):
            loss, figures, counts = self._replay(batch)
        else:
            loss, figures, counts, self._touched[batch.signature] = self._launch(batch)
        names = self._touched[batch.signature]
        self.optimizer.count_slot(batch.slot, loss, names, counts, figures)

    def _launch(self, batch: SlotBatch) -> tuple[Tensor, Tensor, list[Tensor], list[str]]:
        losses = self.model.losses(batch)
        (losses.loss * self.loss_weight.of(batch.modality)).backward()
        names = self.optimizer.convert_gradients(batch.slot)
        counts = self.optimizer.take_counts()
        return losses.loss.detach(), losses.figures_tensor(), counts, names

    def _is_recordable(self, batch: SlotBatch) -> bool:
        names = self._touched.get(batch.signature)
        calibrated = names is not None and self.optimizer.is_calibrated(names)
        return calibrated and can_record(batch.symbols_BT.device)

    def _replay(self, batch: SlotBatch) -> tuple[Tensor, Tensor, list[Tensor]]:
        if batch.signature not in self._recorded:
            fixed = batch.copy()
            self._recorded[batch.signature] = fixed, Recording(lambda: self._launch(fixed))
        fixed, recording = self._recorded[batch.signature]
        fixed.copy_from(batch)
        recording.replay()
        loss, figures, counts, _ = recording.result  # the next replay overwrites them
        return loss.clone(), figures.clone(), [count.clone() for count in counts]


@torch.no_grad()
def evaluate(model: ARBModel, slots: Iterator[SlotBatch]) -> dict[str, float]:
    """Mean loss and figures over held-out slots, each weighted by its number of targets.

    Without the figures that the slots do not have.
    """
    total, count = torch.zeros(1 + len(FIGURES), dtype=torch.float64), 0
    for batch in slots:
        targets = int((batch.targets_BT >= 0).sum())
        losses = model.losses(batch)
        values = torch.cat([losses.loss.view(1), losses.figures_tensor()])
        total, count = total + values.double().cpu() * targets, count + targets
    means = dict(zip(("loss", *FIGURES), (total / count).tolist(), strict=True))
    del means["trunk_gradient_rms"]  # there was no backward pass
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}
