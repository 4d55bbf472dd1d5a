"""Slots on their way from the data to the loop: begun early, written down, tensors by step."""

import json
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, groupby, islice
from pathlib import Path
from threading import Event
from typing import Any

import torch

from arbitor.batch import SlotBatch
from data_pipeline.pack import PackedSlot

_LOG = "slots-"  # a file a rank, in a run's folder
HEAD_START_S = 4.0  # of direct reading, unless the first step is done before


def begin(stream: Iterator[PackedSlot], direct: Generator[PackedSlot]) -> Iterator[PackedSlot]:
    """The slots that both bring: from `direct`, read in this process, until `stream` has its first.

    The stream's tasks need processes of their own. On a small machine their start takes the cores
    from the first step, which so waits for nobody; where reading takes long they start beside it.
    """
    wanted, pool = Event(), ThreadPoolExecutor(1)
    first = pool.submit(_first_of, stream, wanted)
    pool.shutdown(wait=False)
    return _direct_then_streamed(first, wanted, stream, direct)


def _first_of(stream: Iterator[PackedSlot], wanted: Event) -> list[PackedSlot]:
    wanted.wait(HEAD_START_S)
    return list(islice(stream, 1))


def _direct_then_streamed(
    first: Future[list[PackedSlot]],
    wanted: Event,
    stream: Iterator[PackedSlot],
    direct: Generator[PackedSlot],
) -> Iterator[PackedSlot]:
    steps, brought = set(), 0
    for slot in direct:
        steps.add(slot.step)
        yield slot
        brought += 1
        if len(steps) > 1:
            wanted.set()
        if first.done():
            break
    else:
        return
    direct.close()  # and with it the windows that it holds
    del slot
    slots = chain(first.result(), stream)
    del first
    yield from islice(slots, brought, None)


def log_slots(slots: Iterator[PackedSlot], folder: Path, rank: int) -> Iterator[PackedSlot]:
    """Passes the slots on and appends a line for each: what this worker really saw."""
    with open(folder / f"{_LOG}{rank}.jsonl", "a") as file:
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


def logged_slots(folder: Path) -> tuple[dict[int, list[dict[str, Any]]], int]:
    """By rank what a run's workers wrote down, replays included; how many lines a kill has torn."""
    logged: dict[int, list[dict[str, Any]]] = {}
    torn = 0
    for path in sorted(folder.glob(f"{_LOG}*.jsonl")):
        entries = logged[int(path.stem.removeprefix(_LOG))] = []
        for line in path.read_bytes().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                torn += 1
    return logged, torn


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
