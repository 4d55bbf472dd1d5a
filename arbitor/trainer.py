"""The training loop: an iterator of steps in, a report a step out. Knows no Ray."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from arbitor.batch import SlotBatch
from arbitor.main import ARBModel
from arbitor.optimizer import TernaryOptimizer, UpdateReport


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
) -> None:
    """Runs the steps in order; `steps` yields each step's number and this worker's slots of it."""
    iterator = iter(steps)
    while True:
        started = time.perf_counter()
        item = next(iterator, None)
        if item is None:
            return
        step, slots = item
        data_ready = time.perf_counter()
        update = train_step(model, optimizer, step, slots)
        finished = time.perf_counter()
        report(StepReport(step, update, finished - started, data_ready - started))


def train_step(
    model: ARBModel, optimizer: TernaryOptimizer, step: int, slots: list[SlotBatch]
) -> UpdateReport:
    """Forward and backward of this worker's slots, then the update that all workers share."""
    for batch in slots:
        loss = model(batch)
        loss.backward()
        optimizer.add_slot(step, batch.slot, loss)
    return optimizer.step(step)


@torch.no_grad()
def evaluate(model: ARBModel, slots: Iterator[SlotBatch]) -> float:
    """Mean loss over held-out slots, each weighted by its number of targets."""
    total, count = 0.0, 0
    for batch in slots:
        targets = int((batch.targets_BT >= 0).sum())
        total, count = total + model(batch).item() * targets, count + targets
    return total / count
