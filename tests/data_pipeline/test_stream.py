"""Ray Data delivers the plan: the same slots as read in this process, or an exception."""

import json
import os
import pickle
import signal
import threading
import time
from contextlib import nullcontext
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import ray

from data_pipeline import stream
from data_pipeline.files import ShardError
from data_pipeline.pack import PackedSlot, WindowReport
from data_pipeline.plan import WindowKey
from data_pipeline.run_data import read_slots
from data_pipeline.schema import SourceConfig
from data_pipeline.stream import StreamError, stream_slots
from tests.data_pipeline.media_shards import (
    SHAPE,
    five_sources,
    media_data,
    media_rows,
    write_media_parquet,
    write_tar,
)
from tests.data_pipeline.shards import (
    numbered_rows,
    row_numbers,
    run_data,
    write_jsonl,
    write_parquet,
)

pytestmark = [
    pytest.mark.usefixtures("ray_head"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray's own making
]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two sources, windows of a few slots, two windows a task: many of each in few steps."""
    monkeypatch.setattr("data_pipeline.run_data.WINDOW_SYMBOLS", 2000)
    monkeypatch.setattr(stream, "WINDOWS_PER_TASK", 2)
    write_parquet(tmp_path / "rows.parquet", numbered_rows(300))
    write_jsonl(tmp_path / "code.jsonl", numbered_rows(100, "code"))
    sources = {
        "text": SourceConfig(path=str(tmp_path / "rows.parquet"), weight=0.7),
        "code": SourceConfig("code", str(tmp_path / "code.jsonl"), weight=[[0, 0.1], [30, 0.6]]),
    }
    return run_data(tmp_path, sources, seed=3, batch_size=2, sequence_length=64)


def assert_same_slots(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.step, one.slot, one.source) == (other.step, other.slot, other.source)
        assert one.modality == other.modality
        assert one.row_ids.tolist() == other.row_ids.tolist()
        assert one.symbols.dtype == other.symbols.dtype
        assert one.sha256 == other.sha256, (one.step, one.slot)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (1, 2)])
def test_streamed_slots_are_those_of_the_plan(data, rank, world):
    streamed = list(stream_slots(data, 0, 60, rank, world))
    assert len(streamed) == 60 * 4 // world
    assert_same_slots(streamed, read_slots(data, 0, 60, rank, world))
    assert {slot.source for slot in streamed} == {"text", "code"}
    seen = {n for slot in streamed if slot.source == "text" for n in row_numbers(slot.symbols)}
    assert len(seen) > 40 and max(seen) < 294, "held-out rows are the last six"


@pytest.fixture
def five(tmp_path, monkeypatch):
    """Five sources; some images cannot be decoded."""
    monkeypatch.setattr("data_pipeline.run_data.WINDOW_SYMBOLS", 2000)
    sources = five_sources(tmp_path)
    rows = media_rows("image", 16, 100)
    bad = [(b"" if n % 3 == 0 else content, text) for n, (content, text) in enumerate(rows)]
    write_media_parquet(tmp_path / "images" / "with bad \N{SNOWMAN} rows.parquet", bad, "image")
    return run_data(tmp_path, sources, seed=3, **SHAPE)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_five_sources_come_as_read_in_this_process(five, rank, world):
    streamed = list(stream_slots(five, 0, 40, rank, world))
    expected = list(read_slots(five, 0, 40, rank, world))
    assert_same_slots(streamed, expected)
    assert [slot.opened for slot in streamed] == [slot.opened for slot in expected]
    assert {slot.source for slot in streamed} == set(five.manifests)
    assert any(slot.opened.faults for slot in streamed if slot.opened)


def test_two_workers_that_hold_every_cpu_see_the_plan_together(five):
    """Each streams inside its own process, as train functions do; together they log the plan."""

    def consume(data, rank):
        from data_pipeline.stream import stream_slots

        return [(s.step, s.slot, s.sha256) for s in stream_slots(data, 0, 25, rank, 2)]

    expected = [(slot.step, slot.slot, slot.sha256) for slot in read_slots(five, 0, 25, 0, 1)]
    worker = ray.remote(num_cpus=1)(consume)
    logs = ray.get([worker.remote(five, rank) for rank in (0, 1)], timeout=120)
    assert sorted(logs[0] + logs[1]) == expected
    assert len(logs[0]) == len(logs[1]) == 50


def test_a_killed_worker_and_then_two_log_the_plan(five, tmp_path):
    """SIGKILL in the middle of a step; what is replayed is the same."""

    def consume(data, rank, world, start, stop, kill_at):
        import os
        import signal

        from data_pipeline.stream import stream_slots

        for number, slot in enumerate(stream_slots(data, start, stop, rank, world)):
            with open(f"{tmp_path}/log", "a") as file:
                file.write(json.dumps([slot.step, slot.slot, slot.sha256]) + "\n")
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    expected = {(s.step, s.slot): s.sha256 for s in read_slots(five, 0, 30, 0, 1)}
    worker = ray.remote(num_cpus=0, max_retries=0)(consume)
    for start, stop, world, kill_at in ((0, 30, 1, 41), (10, 30, 2, None)):
        ranks = [worker.remote(five, r, world, start, stop, kill_at) for r in range(world)]
        for rank in ranks:
            with nullcontext() if kill_at is None else pytest.raises(ray.exceptions.RayError):
                ray.get(rank, timeout=60)
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(logged) == 42 + 20 * 4
    assert {(step, slot): expected[step, slot] for step, slot, _ in logged} == expected
    assert all(expected[step, slot] == sha256 for step, slot, sha256 in logged)


def test_swapped_windows_of_images_are_refused(five, monkeypatch):
    monkeypatch.setattr(stream, "WINDOWS_PER_TASK", 2)
    monkeypatch.setattr(stream, "decode_windows", reversed_tasks())
    with pytest.raises(StreamError, match="the stream brought .* was expected"):
        list(stream_slots(five, 0, 40, 0, 1))


def test_a_flaky_file_system_gives_the_same_slots(five, monkeypatch):
    """Every third read fails, and every fourth comes short, in the tasks' own processes."""

    def decode(batch):
        from data_pipeline.stream import decode_windows
        from tests.data_pipeline.flaky import flaky_files

        with flaky_files():
            yield from decode_windows(batch)

    monkeypatch.setattr(stream, "decode_windows", decode)
    assert_same_slots(stream_slots(five, 0, 20, 0, 1), read_slots(five, 0, 20, 0, 1))


def test_a_restart_in_the_middle_goes_on_alike(data):
    """And a stream may be left unfinished: closing it ends its tasks."""
    begun = stream_slots(data, 0, 10_000, 0, 1)
    first = [next(begun) for _ in range(4 * 17)]
    begun.close()
    rest = list(stream_slots(data, 17, 40, 0, 1))
    assert_same_slots(first + rest, read_slots(data, 0, 40, 0, 1))


def test_slots_are_made_while_the_worker_computes():
    """In order, no more than a few windows' and a few slots; closing ends what makes them."""
    begun, ended = [], threading.Event()

    def slots():
        try:
            for number in range(10_000):
                begun.append(number)
                opened = WindowReport() if number < 8 or number % 100 == 0 else None
                yield PackedSlot(0, number, "text", "text", None, None, opened=opened)
        finally:
            ended.set()

    def until(condition):
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "nothing is made before it is asked for"
            time.sleep(0.001)

    made = stream._made_ahead(slots())
    assert next(made).slot == 0
    until(lambda: len(begun) == 1 + stream.WINDOWS_AHEAD)
    assert [slot.slot for slot in islice(made, 500)] == list(range(1, 501))
    assert len(begun) <= 501 + (1 + stream.WINDOWS_AHEAD) * stream.SLOTS_TOGETHER
    made.close()
    assert ended.is_set()


def test_what_is_wrong_with_a_slot_comes_after_those_before_it():
    def slots():
        yield from (PackedSlot(0, i, "text", "text", None, None) for i in range(100))
        raise StreamError("no more")

    found, made = [], stream._made_ahead(slots())
    with pytest.raises(StreamError, match="no more"):
        for slot in made:
            found.append(slot.slot)
    assert found == list(range(100))


def test_arrays_are_seen_where_they_lie():
    """A copy of a window costs the training thread 17 ms."""
    first, second = np.arange(1000), np.arange(7)
    cell = stream._cell(first)
    assert np.shares_memory(stream._values(cell, np.int64), first)
    both = pa.concat_arrays([cell, stream._cell(second)])
    assert stream._values(both[1:], np.int64).tolist() == second.tolist()


def reversed_tasks():
    """A decode step that turns the windows of each task around. Nested, so that it is pickled."""

    def decode(batch):
        import pickle

        from data_pipeline.stream import _row

        for task in pickle.loads(batch["tasks"][0].as_py())[::-1]:
            window, digest = task.read()
            yield _row({"key": task.key, "digest": digest, "error": ""}, window)

    return decode


def test_windows_in_another_order_are_refused(data, monkeypatch):
    monkeypatch.setattr(stream, "decode_windows", reversed_tasks())
    with pytest.raises(StreamError, match="the stream brought .* was expected"):
        list(stream_slots(data, 0, 60, 0, 1))


def test_other_rows_under_the_right_key_are_refused(data, monkeypatch):
    def swapped(batch):
        import pickle
        from dataclasses import replace

        from data_pipeline.stream import _row

        tasks = pickle.loads(batch["tasks"][0].as_py())
        for task, other in zip(tasks, tasks[::-1], strict=True):
            window, digest = replace(task, segments=other.segments, shards=other.shards).read()
            yield _row({"key": task.key, "digest": digest, "error": ""}, window)

    monkeypatch.setattr(stream, "decode_windows", swapped)
    with pytest.raises(StreamError, match="came with other rows than were indexed"):
        list(stream_slots(data, 0, 60, 0, 1))


def test_without_the_checks_the_comparison_sees_swapped_windows(data, monkeypatch):
    """The equality above is not empty: it goes red where the stream takes any window for any."""
    unchecked = stream._unpack
    tasks = [data.task(key) for key in data.plan.windows(0, 60, 0, 1)]

    def any_window(table, expected):
        brought = WindowKey(*json.loads(table["header"][0].as_py())["key"])
        return unchecked(table, next(task for task in tasks if task.key == brought))

    monkeypatch.setattr(stream, "_unpack", any_window)
    monkeypatch.setattr(stream, "decode_windows", reversed_tasks())
    with pytest.raises((AssertionError, ValueError)):
        assert_same_slots(stream_slots(data, 0, 60, 0, 1), read_slots(data, 0, 60, 0, 1))


def test_segments_join_without_a_seam(five, monkeypatch):
    """Each is an execution of its own; windows open at its start are not read again."""
    monkeypatch.setattr(stream, "FIRST_SEGMENT_WINDOWS", 10)
    monkeypatch.setattr(stream, "SEGMENT_WINDOWS", 60)
    segments = list(stream._segments(five.plan, 5, 40, 0, 1))
    assert len(segments) >= 3 and segments[0].start == 5 and segments[-1].stop == 40
    assert sum(s.windows for s in segments) == len(list(five.plan.windows(5, 40, 0, 1)))
    assert_same_slots(stream_slots(five, 5, 40, 0, 1), read_slots(five, 5, 40, 0, 1))
    begun = stream_slots(five, 0, 1000, 0, 1)
    for _ in range(20):
        next(begun)
    begun.close()  # while the next segment may be starting


def test_a_decoding_process_that_dies_is_started_again(five, monkeypatch, tmp_path):
    """Killed after its second window, that is in the middle of a task."""
    dead = tmp_path / "dead"

    def decode(batch):
        from data_pipeline.stream import decode_windows

        for number, row in enumerate(decode_windows(batch)):
            if number == 2 and not dead.exists():
                dead.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    monkeypatch.setattr(stream, "decode_windows", decode)
    assert_same_slots(stream_slots(five, 0, 60, 0, 1), read_slots(five, 0, 60, 0, 1))
    assert dead.exists()


def test_a_missing_window_is_noticed(data, monkeypatch):
    def lossy(batch):
        from data_pipeline.stream import decode_windows

        yield next(decode_windows(batch))

    monkeypatch.setattr(stream, "decode_windows", lossy)
    with pytest.raises(StreamError, match="the stream brought .* was expected"):
        list(stream_slots(data, 0, 60, 0, 1))


def test_a_shard_that_changed_stops_the_stream(data, tmp_path):
    write_parquet(tmp_path / "rows.parquet", numbered_rows(300, "other"))
    with pytest.raises(ShardError, match="rows.parquet: changed since it was indexed"):
        list(stream_slots(data, 0, 60, 0, 1))


@pytest.mark.parametrize("ending", ["parquet", "tar"])
def test_a_shard_removed_during_the_run_stops_it_soon(tmp_path, ending):
    path = tmp_path / f"removed \N{SNOWMAN}.{ending}"
    write = {"parquet": write_media_parquet, "tar": write_tar}[ending]
    write(path, media_rows("image", 64), "image")
    data = media_data(path, "image", tmp_path / "storage")
    slots = stream_slots(data, 0, 1_000_000, 0, 1)
    assert next(slots).row_ids.size
    path.unlink()
    begin = time.monotonic()
    with pytest.raises(ShardError, match="removed .* cannot be read .* restore it"):
        list(slots)
    assert time.monotonic() - begin < 30


def test_tasks_are_plain_data(data):
    task = data.task(next(data.plan.windows(0, 1, 0, 1)))
    assert pickle.loads(pickle.dumps(task)) == task
