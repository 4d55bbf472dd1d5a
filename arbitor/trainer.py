"""The training loop: an iterator of steps in, a report a step out. Knows no Ray."""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.batch import SlotBatch
from arbitor.cuda_graph import Recording, can_record
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
) -> None:
    """Runs the steps in order; `steps` yields each step's number and this worker's slots of it."""
    run_slot = SlotRunner(model, optimizer)
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

    def __init__(self, model: ARBModel, optimizer: TernaryOptimizer):
        self.model, self.optimizer = model, optimizer
        self._touched: dict[Hashable, list[str]] = {}  # weights that slots of a shape train
        self._recorded: dict[Hashable, tuple[SlotBatch, Recording]] = {}

    def __call__(self, step: int, batch: SlotBatch) -> None:
        self.optimizer.begin_slot(step, batch.slot)
        if self._is_recordable(batch):
            loss, counts = self._replay(batch)
        else:
            loss, self._touched[batch.signature], counts = self._launch(batch)
        self.optimizer.count_slot(batch.slot, loss, self._touched[batch.signature], counts)

    def _launch(self, batch: SlotBatch) -> tuple[Tensor, list[str], list[Tensor]]:
        loss = self.model(batch)
        loss.backward()
        names = self.optimizer.convert_gradients(batch.slot)
        return loss.detach(), names, self.optimizer.take_counts()

    def _is_recordable(self, batch: SlotBatch) -> bool:
        names = self._touched.get(batch.signature)
        calibrated = names is not None and self.optimizer.is_calibrated(names)
        return calibrated and can_record(batch.symbols_BT.device)

    def _replay(self, batch: SlotBatch) -> tuple[Tensor, list[Tensor]]:
        if batch.signature not in self._recorded:
            fixed = batch.copy()
            self._recorded[batch.signature] = fixed, Recording(lambda: self._launch(fixed))
        fixed, recording = self._recorded[batch.signature]
        fixed.copy_from(batch)
        recording.replay()
        loss, _, counts = recording.result  # the next replay overwrites them
        return loss.clone(), [count.clone() for count in counts]


@torch.no_grad()
def evaluate(model: ARBModel, slots: Iterator[SlotBatch]) -> float:
    """Mean loss over held-out slots, each weighted by its number of targets."""
    total, count = 0.0, 0
    for batch in slots:
        targets = int((batch.targets_BT >= 0).sum())
        total, count = total + model(batch).item() * targets, count + targets
    return total / count
