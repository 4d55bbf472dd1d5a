"""Slots through Ray Data: windows are read, decoded and packed in tasks, ahead of the training.

`stream_slots` is the front door. Inside the train function of each worker, so that restarts and
resizes need no coordinator: window tasks in order of first use, generated lazily ->
`decode_windows` in a few parallel tasks, one row a window -> a thread of the worker keeps each
lane's window and slices it as the plan walks, some slots ahead. Every window that arrives is
checked against the plan, in case the order or the content is not the plan's.

The options here are not Ray's defaults; each of them was found necessary (order, one window a
block, no wait for CPUs that the trainers hold).
"""

import json
import logging
import pickle
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, ExecutionOptions, ExecutionResources, TaskPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_pipeline.files import ShardError
from data_pipeline.layout import layout_of
from data_pipeline.pack import Fault, PackedSlot, PackedWindow, WindowReport
from data_pipeline.plan import Held, Plan, WindowKey
from data_pipeline.run_data import RunData, slots_from
from data_pipeline.window import WindowTask

OBJECT_STORE_BYTES = 1 << 30  # how far the tasks may run ahead, a rank
# Ray Data takes 10 ms for a task and 0.15 s to see that it has ended, so a task has many windows.
# But what all tasks have to give waits for the first of them, so it has to fit the store.
TASK_COST = 64  # at most, of 100 ms each
TASK_GROWTH = 1.5  # of a task over the one before: the first are small, so that windows come soon
TASK_BYTES = OBJECT_STORE_BYTES // 8
WINDOWS_PER_TASK = 16
WINDOWS_AHEAD = 2  # opened by slots that the worker does not need yet
SLOTS_TOGETHER = 64  # handed over at a time, if no window has to be opened for them
SEGMENT_WINDOWS = 4096  # of one execution of Ray Data
FIRST_SEGMENT_WINDOWS = 1024  # counted before the first window comes: 0.3 s of text
SEGMENT_LEAD = 32  # windows of a segment that are left when the next one starts

_ARRAYS = {
    "sequences": np.uint16,
    "sequence_order": np.int64,
    "row_ids": np.int64,
    "row_starts": np.int64,
    "content": np.uint8,
}


class StreamError(RuntimeError):
    """Ray Data did not deliver what the plan asked for. The run must not go on."""


def stream_slots(
    run_data: RunData, start: int, stop: int, rank: int, world: int
) -> Iterator[PackedSlot]:
    """The same slots as `read_slots`, read ahead by Ray Data on this node. Ray must be running.

    Closing the iterator ends its tasks. Raises ShardError as `read_slots` does, StreamError where
    a window is not the one that the plan expects.
    """
    yield from _made_ahead(_slots(run_data, start, stop, rank, world))


def _made_ahead(slots: Generator[PackedSlot]) -> Generator[PackedSlot]:
    """The slots, the next ones made by a thread meanwhile."""
    pool = ThreadPoolExecutor(1)
    try:
        made = deque(pool.submit(_next_slots, slots) for _ in range(WINDOWS_AHEAD))
        while True:
            some, error = made.popleft().result()
            if not some and error is None:
                return
            made.append(pool.submit(_next_slots, slots))
            while some:
                yield some.popleft()
            if error is not None:
                raise error
    finally:
        pool.shutdown(cancel_futures=True)
        slots.close()


def _next_slots(slots: Iterator[PackedSlot]) -> tuple[deque[PackedSlot], Exception | None]:
    """Those up to the next that opens a window, and what went wrong after them."""
    some: deque[PackedSlot] = deque()
    try:
        for slot in slots:
            some.append(slot)
            if slot.opened is not None or len(some) == SLOTS_TOGETHER:
                break
    except Exception as error:
        return some, error
    return some, None


def _slots(
    run_data: RunData, start: int, stop: int, rank: int, world: int
) -> Generator[PackedSlot]:
    tables = _windows(run_data, start, stop, rank, world)

    def pull(key: WindowKey) -> PackedWindow:
        table = next(tables, None)
        if table is None:
            raise StreamError(f"the stream ended where {key} was expected")
        return _unpack(table, run_data.task(key))

    try:
        yield from slots_from(pull, run_data, start, stop, rank, world)
    finally:
        tables.close()


def decode_windows(batch: pa.Table) -> Iterator[pa.Table]:
    """One row a window of the batch's tasks; a shard's fault is sent along, not raised.

    Raised in a task it would reach the trainer wrapped in Ray's own error and trace.
    """
    for task in pickle.loads(batch["tasks"][0].as_py()):
        header = {"key": task.key, "digest": "", "error": ""}
        try:
            window, header["digest"] = task.read()
        except ShardError as error:
            header["error"], window = str(error), None
        yield _row(header, window)


def _row(header: dict, window: PackedWindow | None) -> pa.Table:
    if window is not None:
        header = header | {"report": window.report}
    arrays = [getattr(window, name, None) for name in _ARRAYS]
    columns = [_cell(np.empty(0) if array is None else array) for array in arrays]
    return pa.table([pa.array([json.dumps(header)]), *columns], ["header", *_ARRAYS])


def _cell(array: np.ndarray) -> pa.Array:
    """One large_binary value with the array's bytes, without a copy."""
    offsets = pa.py_buffer(np.array([0, array.nbytes], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(array)])


def _values(cell: pa.Array, dtype: type[np.generic]) -> np.ndarray:
    """Inverse of `_cell`, a view: a scalar taken from an Arrow array is a copy."""
    _, offsets, data = cell.buffers()
    begin, end = np.frombuffer(offsets, np.int64)[cell.offset : cell.offset + 2]
    return np.frombuffer(data, np.uint8)[begin:end].view(dtype)


def _unpack(table: pa.Table, expected: WindowTask) -> PackedWindow:
    """The window in `table` without a copy, once its header is what the plan says."""
    header = json.loads(table["header"][0].as_py())
    if header["error"]:
        raise ShardError(header["error"])
    found = WindowKey(*header["key"])
    if found != expected.key:
        raise StreamError(f"the stream brought {found} where {expected.key} was expected")
    if header["digest"] != expected.digest:
        raise StreamError(f"{found} came with other rows than were indexed")
    arrays = {name: _values(table[name].chunk(0), dtype) for name, dtype in _ARRAYS.items()}
    arrays["sequences"] = arrays["sequences"].reshape(-1, expected.sequence_length + 1)
    content = arrays.pop("content")
    if expected.media is not None:
        layout = layout_of(expected.media)
        arrays["content"] = content.reshape(-1, layout.places, layout.place_bytes)
    rows, faults, truncated = header["report"]
    report = WindowReport(rows, tuple(Fault(*fault) for fault in faults), truncated)
    return PackedWindow(**arrays, report=report)


def _windows(
    run_data: RunData, start: int, stop: int, rank: int, world: int
) -> Generator[pa.Table]:
    """A table of one row a window, in the order of the plan.

    Segment by segment, because an executor of Ray Data keeps some kB of every window for its life;
    the next one starts before the last windows of a segment are used.
    """
    segments = _segments(run_data.plan.with_states(run_data.states), start, stop, rank, world)
    streams: list[Iterator[pa.Table]] = []

    def open_next() -> tuple[int, Iterator[pa.Table]] | None:
        segment = next(segments, None)
        if segment is None:
            return None
        streams.append(_stream_segment(run_data, segment, rank, world))
        first = next(streams[-1], None)  # starts it
        return segment.windows, chain([] if first is None else [first], streams[-1])

    pool, following = ThreadPoolExecutor(1), None
    try:
        opened = open_next()
        while opened is not None:
            windows, tables = opened
            for number, table in enumerate(tables, 1):
                if following is None and number > windows - SEGMENT_LEAD:
                    following = pool.submit(open_next)
                yield table
            opened = following.result() if following else open_next()
            following = None
            streams.pop(0).close()
    finally:
        pool.shutdown()
        for stream in streams:
            stream.close()


class _Segment(NamedTuple):
    """Steps start .. stop - 1, which open `windows` windows; `held` are open before."""

    start: int
    stop: int
    windows: int
    held: Held
    states: dict[int, list[list[int]]]  # of the plan, near the start


def _segments(plan: Plan, start: int, stop: int, rank: int, world: int) -> Iterator[_Segment]:
    held: Held = {}
    size, stop = FIRST_SEGMENT_WINDOWS, min(stop, plan.end)
    while start < stop:
        before, first, count = dict(held), start, 0
        steps = max(1, size // 8 // plan.slots_per_step)  # which open an eighth of them at most
        while start < stop and count < size:
            after = min(stop, start + steps)
            count += sum(1 for _ in plan.windows(start, after, rank, world, held))
            start = after
        if count:
            yield _Segment(first, start, count, before, dict([plan.state(first)]))
        size = SEGMENT_WINDOWS


def _stream_segment(
    run_data: RunData, segment: _Segment, rank: int, world: int
) -> Iterator[pa.Table]:
    def list_tasks(_: pa.Table) -> Iterator[pa.Table]:
        batch, filled, cost = [], 0.0, 1.0
        span = (segment.start, segment.stop, rank, world)
        plan = run_data.plan.with_states(segment.states)
        for key in plan.windows(*span, dict(segment.held)):
            task = run_data.task(key)
            batch.append(task)
            filled += max(task.cost / cost, task.packed_bytes / TASK_BYTES, 1 / windows_per_task)
            if filled >= 1:
                yield pa.table({"tasks": [pickle.dumps(batch)]})
                batch, filled, cost = [], 0.0, min(cost * TASK_GROWTH, TASK_COST)
        if batch:
            yield pa.table({"tasks": [pickle.dumps(batch)]})

    windows_per_task, decode_tasks = WINDOWS_PER_TASK, run_data.config.decode_tasks
    node = ray.get_runtime_context().get_node_id()
    options = {
        "batch_size": None,
        "batch_format": "pyarrow",
        "num_cpus": 0,  # trainers may hold every logical CPU: a task that needs one waits for ever
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
        "max_retries": 3,  # Ray Data's default is to retry a crashing task for ever
    }
    _silence_ray_data()
    with DataContext.current(_context()):
        dataset = (
            ray.data.from_items([{"start": segment.start}], override_num_blocks=1)
            .map_batches(list_tasks, compute=TaskPoolStrategy(size=1), **options)
            .map_batches(decode_windows, compute=TaskPoolStrategy(size=decode_tasks), **options)
        )
    # Blocks are on this node. A window would wait for as many others as were to be prefetched.
    yield from dataset.iterator().iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )


def _context() -> DataContext:
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1  # a block is one row, so no window is merged with another
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources.for_limits(object_store_memory=OBJECT_STORE_BYTES),
    )
    return context


def _silence_ray_data() -> None:
    """What Ray Data says at every start about choices that are made here on purpose."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    for message in ("`ray_remote_args` is deprecated", "The maximum number of concurrent tasks"):
        warnings.filterwarnings("ignore", message)
