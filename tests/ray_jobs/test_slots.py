"""First slots come straight from the shards, later ones from the stream: none twice, none lost."""

import threading
import weakref

import pytest

from data_pipeline.run_data import read_slots
from data_pipeline.schema import SourceConfig
from ray_jobs import slots
from tests.data_pipeline.shards import numbered_rows, run_data, write_parquet

STEPS = 12


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Small windows, so that lanes open several of them."""
    monkeypatch.setattr("data_pipeline.run_data.WINDOW_SYMBOLS", 200)
    write_parquet(tmp_path / "rows.parquet", numbered_rows(200), group=2)
    sources = {"text": SourceConfig("text", str(tmp_path / "rows.parquet"), 1.0)}
    return run_data(tmp_path, sources, batch_size=2, sequence_length=32, slots_per_step=4)


class Observed:
    """Passes slots on once it may, and tells what it did."""

    def __init__(self, slots, may_begin=None):
        self._slots, self._may_begin = slots, may_begin
        self.begun, self.closed, self.brought = threading.Event(), False, []

    def __iter__(self):
        assert self._may_begin is None or self._may_begin.wait(timeout=30)
        try:
            for slot in self._slots:
                self.brought.append(weakref.ref(slot))
                self.begun.set()
                yield slot
        finally:
            self.closed = True


def content(slot):
    """With `opened`, from which bad rows are counted."""
    return slot.step, slot.slot, slot.sha256, slot.row_ids.tolist(), slot.opened


@pytest.mark.parametrize("start, rank, world", [(0, 0, 1), (5, 1, 2)])
@pytest.mark.parametrize("ready_after", [1, 6, 9])
def test_the_stream_takes_over_where_direct_reading_is(data, start, rank, world, ready_after):
    span = (data, start, STEPS, rank, world)
    may_begin = threading.Event()
    direct, stream = Observed(read_slots(*span)), Observed(read_slots(*span), may_begin)
    found = []
    for slot in slots.begin(iter(stream), iter(direct)):
        found.append(content(slot))
        if len(found) == ready_after:
            may_begin.set()
        if len(found) > ready_after and len(direct.brought) == len(found):
            assert found[-1][0] <= start + 1 or stream.begun.wait(timeout=30)
    assert found == [content(slot) for slot in read_slots(*span)]
    assert sum(slot[-1] is not None for slot in found) > 4  # windows were opened on the way
    assert ready_after <= len(direct.brought) < len(stream.brought) == len(found)
    assert direct.closed and stream.brought[0]() is None  # neither holds memory


def test_a_run_that_ends_before_the_stream_begins_does_without(data):
    stream, direct = Observed(read_slots(data, 0, 1, 0, 1)), Observed(read_slots(data, 0, 1, 0, 1))
    assert len(list(slots.begin(iter(stream), iter(direct)))) == len(direct.brought) == 4
    assert not stream.brought


def test_the_stream_begins_beside_a_first_step_that_takes_its_time(data, monkeypatch):
    monkeypatch.setattr(slots, "HEAD_START_S", 0.01)
    stream = Observed(read_slots(data, 0, STEPS, 0, 1))
    next(slots.begin(iter(stream), read_slots(data, 0, STEPS, 0, 1)))
    assert stream.begun.wait(timeout=30)


@pytest.mark.parametrize("broken", [0, 1])
def test_what_is_wrong_with_either_ends_the_slots(data, broken):
    def fail():
        raise OSError("no shard")
        yield

    both = [read_slots(data, 0, 10**6, 0, 1), read_slots(data, 0, 10**6, 0, 1)]
    both[broken] = fail()
    with pytest.raises(OSError, match="no shard"):
        for _ in slots.begin(*both):
            pass


def test_what_workers_logged_is_read_without_the_lines_that_a_kill_has_torn(data, tmp_path):
    for rank in (0, 1):
        for _ in slots.log_slots(read_slots(data, 0, 2, rank, 2), tmp_path, rank):
            pass
    with open(tmp_path / "slots-1.jsonl", "a") as file:
        file.write('{"step": 2, "sl')
    logged, torn = slots.logged_slots(tmp_path)
    assert torn == 1
    assert [(slot["step"], slot["slot"]) for slot in logged[1]] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert len(logged[0]) == 4 and logged[0][0]["row_ids"]
