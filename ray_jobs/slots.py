"""Slots on their way from the data to the loop: begun early, written down, tensors by step."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from pathlib import Path

import torch

from arbitor.batch import SlotBatch
from data_pipeline.pack import PackedSlot


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
