"""Packing, and the slots read in this process: every symbol is a target exactly once."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from arbitor.vocab import END_OF_DOCUMENT, PADDING
from data_pipeline import files
from data_pipeline.files import ShardError
from data_pipeline.pack import num_micro_batches, pack_window, slice_micro_batch
from data_pipeline.row_id import row_ids
from data_pipeline.run_data import held_out_slots, read_slots
from data_pipeline.schema import SourceConfig
from data_pipeline.states import StateTable
from data_pipeline.statistics import bigram_entropy, unigram_entropy
from tests.data_pipeline.shards import numbered_rows, row_numbers, run_data, write_parquet


def targets_of(symbols):
    targets = symbols[..., 1:].ravel()
    return targets[targets != PADDING]


@pytest.mark.parametrize("shuffle_key", [None, (3, "text", 1)])
def test_a_window_unpacks_into_its_rows(shuffle_key):
    rng = random.Random(0)
    for _ in range(50):
        rows = [rng.randbytes(rng.choice([0, 1, 5, 40])) for _ in range(rng.randint(1, 30))]
        rows.append(b"at least one")
        batch_size, length = rng.randint(1, 4), rng.randint(1, 20)
        window = pack_window(rows, row_ids(rows), batch_size, length, shuffle_key)
        symbols = sum(len(row) + 1 for row in rows if row)
        count = num_micro_batches(symbols, batch_size, length)
        assert window.sequences.shape == (count * batch_size, length + 1)

        in_order = np.empty((len(window.sequence_order), length + 1), np.uint16)
        in_order[window.sequence_order] = window.sequences[: len(window.sequence_order)]
        assert (in_order[1:, 0] == in_order[:-1, -1]).all() and in_order[0, 0] == END_OF_DOCUMENT
        stream = targets_of(in_order)
        found = np.split(stream, np.nonzero(stream == END_OF_DOCUMENT)[0] + 1)[:-1]
        found = [bytes(part[:-1].tolist()) for part in found]
        assert Counter(found) == Counter(row for row in rows if row)
        assert (row_ids(found) == window.row_ids).all()
        assert shuffle_key or found == [row for row in rows if row]

        for i in range(count):
            part, ids, _ = slice_micro_batch(window, i, batch_size)
            assert (part == window.sequences[i * batch_size : (i + 1) * batch_size]).all()
            assert ids.tolist() == touched_ids(window, found, i, batch_size, length)


def touched_ids(window, rows, micro_batch, batch_size, length):
    """The ids of the rows of a micro-batch, target by target."""
    owner = [i for i, row in enumerate(rows) for _ in range(len(row) + 1)]
    order = window.sequence_order[micro_batch * batch_size : (micro_batch + 1) * batch_size]
    places = [p for q in order.tolist() for p in range(q * length, (q + 1) * length)]
    touched = {owner[p] for p in places if p < len(owner)}
    return row_ids([rows[i] for i in sorted(touched)]).tolist()


def test_an_epoch_trains_on_every_row_once_and_never_on_held_out_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.run_data.WINDOW_SYMBOLS", 2000)
    rows = numbered_rows(200)
    write_parquet(tmp_path / "rows.parquet", rows)
    data = run_data(
        tmp_path,
        {"text": SourceConfig(path=str(tmp_path / "rows.parquet"))},
        batch_size=2,
        sequence_length=64,
        eval_fraction=0.1,
    )
    assert len(data.windows["text"]) > 8
    lengths = data.plan.lanes[0].lengths  # slots of each lane in an epoch
    slots = read_slots(data, 0, lengths.max(), 0, 1)
    slots = [slot for slot in slots if slot.step < lengths[slot.slot]]
    symbols = np.stack([slot.symbols for slot in slots])
    expected = Counter("".join(rows[:180]).encode())
    expected[END_OF_DOCUMENT] = 180
    assert Counter(targets_of(symbols).tolist()) == expected
    assert set(row_ids(row.encode() for row in rows[:180])) == {i for s in slots for i in s.row_ids}

    held_out = held_out_slots(data, "text")
    assert set(row_numbers(np.stack([s.symbols[:, 1:] for s in held_out]))) <= set(range(180, 200))
    assert {i for s in held_out for i in s.row_ids} == set(row_ids(r.encode() for r in rows[180:]))


def test_held_out_slots_are_few_even_and_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.run_data.WINDOW_SYMBOLS", 2000)
    write_parquet(tmp_path / "rows.parquet", numbered_rows(400))
    sources = {"text": SourceConfig(path=str(tmp_path / "rows.parquet"))}
    shape = {"batch_size": 1, "sequence_length": 64, "eval_fraction": 0.5}
    every = held_out_slots(run_data(tmp_path, sources, **shape, eval_slots=10_000), "text")
    some = held_out_slots(run_data(tmp_path, sources, seed=7, **shape, eval_slots=10), "text")
    assert len(every) > 400 and len(some) == 10
    for k, slot in enumerate(some):
        assert (slot.symbols == every[k * len(every) // 10].symbols).all()
    assert held_out_slots(run_data(tmp_path, sources, eval_fraction=0), "text") == []


def test_a_changed_shard_stops_the_run(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, numbered_rows(50))
    data = run_data(tmp_path, {"text": SourceConfig(path=str(path))})
    write_parquet(path, numbered_rows(50)[::-1])
    with pytest.raises(ShardError, match="rows.parquet: changed since it was indexed"):
        next(read_slots(data, 0, 1, 0, 1))
    path.write_text("no longer Parquet")
    with pytest.raises(ShardError, match="rows.parquet: .*readable when indexed"):
        next(read_slots(data, 0, 1, 0, 1))


def test_an_io_error_is_retried_and_then_stops_the_run(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    write_parquet(path, numbered_rows(50))
    data = run_data(tmp_path, {"text": SourceConfig(path=str(path))})
    first = next(read_slots(data, 0, 1, 0, 1))

    away, sleeps = tmp_path / "away", []
    path.rename(away)

    def come_back(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 2:
            away.rename(path)

    monkeypatch.setattr(files.time, "sleep", come_back)
    assert (next(read_slots(data, 0, 1, 0, 1)).symbols == first.symbols).all()
    path.unlink()
    with pytest.raises(ShardError, match="rows.parquet: cannot be read .* tried 4 times"):
        next(read_slots(data, 0, 1, 0, 1))
    assert len(sleeps) == 2 + 3


def test_entropies_of_known_sources(tmp_path):
    """Sixteen letters in a fixed cycle: ln 16 alone, almost nothing after the one before."""
    write_parquet(tmp_path / "cycle.parquet", ["abcdefghijklmnop" * 500] * 20)
    data = run_data(tmp_path, {"text": SourceConfig(path=str(tmp_path / "cycle.parquet"))})
    assert unigram_entropy(data, "text") == pytest.approx(math.log(16), abs=0.01)
    assert bigram_entropy(data, "text") == pytest.approx(0, abs=0.01)


def test_states_of_a_plan_are_kept_in_the_run_folder(tmp_path):
    write_parquet(tmp_path / "rows.parquet", numbered_rows(50))
    source = {"text": SourceConfig(path=str(tmp_path / "rows.parquet"))}
    data = run_data(tmp_path, source, batch_size=1, sequence_length=64)
    table = StateTable(tmp_path, data.plan.fingerprint)
    for step in range(1, 3000):
        table.add(data.plan, step)
    states = StateTable(tmp_path, data.plan.fingerprint).load()
    assert list(states) == [1024, 2048]
    assert replace(data, states=states).plan.step(2500) == data.plan.step(2500)
    assert states[2048] == data.plan.served(2048).tolist()
    assert StateTable(tmp_path, "of another plan").load() == {}
    path = tmp_path / "plan-states.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert list(StateTable(tmp_path, data.plan.fingerprint).load()) == [1024]
