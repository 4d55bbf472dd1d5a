"""Images, sound and video: rows from any format become sequences; bad ones become others."""

import re
from collections import Counter

import numpy as np
import pytest
import torch

from arbitor.batch import NO_TARGET
from arbitor.vocab import END_OF_DOCUMENT, NUM_BYTES, PADDING
from data_pipeline.files import ShardError
from data_pipeline.layout import layout_of
from data_pipeline.plan import WindowKey
from data_pipeline.row_id import media_row_ids
from data_pipeline.run_data import held_out_slots, read_slots
from ray_jobs.slots import to_batch
from tests.data_pipeline.media_shards import (
    BORDERS,
    SHAPE,
    WRITERS,
    captions,
    five_source_data,
    media_data,
    media_rows,
    write_media_parquet,
)

NO_HOLD_OUT = {"eval_fraction": 0}


def epoch(data):
    """The slots of the first round of a run of one source."""
    lengths = data.plan.lanes[0].lengths
    slots = read_slots(data, 0, int(lengths.max()), 0, 1)
    return [slot for slot in slots if slot.step < lengths[slot.slot]]


def split(sequence, modality):
    """(caption, places, whether the caption comes first) of a sequence of symbols."""
    begin, place, end = BORDERS[modality]
    symbols = sequence.tolist()
    assert symbols.pop(0) == END_OF_DOCUMENT
    while symbols[-1] == PADDING:
        symbols.pop()
    assert symbols.pop() == END_OF_DOCUMENT
    first, last = symbols.index(begin), symbols.index(end)
    assert set(symbols[first + 1 : last]) == {place}
    caption = bytes(symbols[:first] + symbols[last + 1 :]).decode()
    assert not (symbols[:first] and symbols[last + 1 :])
    return caption, last - first - 1, first > 0


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_an_epoch_takes_every_row_once_with_its_own_content(tmp_path, modality):
    rows = media_rows(modality, 37)
    write_media_parquet(tmp_path / "rows.parquet", rows, modality)
    data = media_data(tmp_path / "rows.parquet", modality, tmp_path, **NO_HOLD_OUT)
    layout, orders, seen = layout_of(SHAPE[modality]), Counter(), Counter()
    ids = media_row_ids([(content, text.encode()) for content, text in rows]).tolist()
    for slot in epoch(data):
        length = SHAPE[modality].sequence_length
        assert slot.symbols.shape == (128 // length, length + 1)
        assert slot.content.shape == (128 // length, layout.places, layout.place_bytes)
        held = [s for s in zip(slot.symbols, slot.content, strict=True) if s[0][0] != PADDING]
        assert len(held) == len(slot.row_ids)
        for (sequence, content), row_id in zip(held, slot.row_ids.tolist(), strict=True):
            caption, places, is_first = split(sequence, modality)
            number = int(re.fullmatch(r"n(\d+)\.", caption)[1])
            decoded = layout.decode(rows[number][0])
            assert places == len(decoded) and (content[:places] == decoded).all()
            assert not content[places:].any()
            assert ids[number] == row_id
            seen[number] += 1
            orders[is_first] += 1
    rounds = data.plan.lanes[0].epochs_per_round
    assert seen == {number: rounds for number in range(37)}
    assert 8 * rounds <= orders[True] <= 29 * rounds, "half and half"


def test_every_format_gives_the_same_slots(tmp_path):
    rows = media_rows("image", 30)
    found = []
    for name, write in WRITERS.items():
        write(tmp_path / name, rows, "image")
        data = media_data(tmp_path / name, "image", tmp_path, eval_fraction=0.1)
        found.append([(s.symbols, s.content, s.row_ids) for s in epoch(data)])
        held_out = [c for s in held_out_slots(data, "image") for c in captions(s.symbols)]
        assert held_out == ["n27.", "n28.", "n29."]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_captions_are_cut_to_fit_and_counted(tmp_path):
    rows = [(content, "x" * n) for n, (content, _) in enumerate(media_rows("image", 20))]
    rows[3] = (rows[3][0], None)
    write_media_parquet(tmp_path / "rows.parquet", rows, "image")
    data = media_data(tmp_path / "rows.parquet", "image", tmp_path, **NO_HOLD_OUT)
    lengths = Counter(len(caption) for s in epoch(data) for caption in captions(s.symbols))
    rounds = data.plan.lanes[0].epochs_per_round
    room = 16 - 4 - 2
    assert lengths == {0: 2 * rounds, room: 10 * rounds} | {
        n: rounds for n in range(1, room) if n != 3
    }
    keys = [WindowKey("image", 0, 0, i) for i in range(len(data.windows["image"]))]
    assert sum(data.task(key).read()[0].report.truncated for key in keys) == 9
    held = (row for slot in epoch(data) for row in slot.symbols if row[0] != PADDING)
    for sequence in held:
        is_full = np.count_nonzero(sequence < NUM_BYTES) == room
        assert np.count_nonzero(sequence[1:] == END_OF_DOCUMENT) == (not is_full)


def bad_rows():
    rows = media_rows("image", 60)
    broken = {7: rows[7][0][:40], 8: b"", 9: b"not an image", 59: None}
    return [(broken.get(n, content), text) for n, (content, text) in enumerate(rows)], broken


def test_a_bad_row_is_replaced_by_the_next_good_one_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.run_data.WINDOWS_PER_LANE", 1)
    rows, broken = bad_rows()
    write_media_parquet(tmp_path / "rows.parquet", rows, "image")
    data = media_data(tmp_path / "rows.parquet", "image", tmp_path, eval_fraction=0)
    assert [sum(s.rows for s in w) for w in data.windows["image"]] == [8] * 7 + [4]
    slots = epoch(data)
    seen = Counter(caption for slot in slots for caption in captions(slot.symbols))
    rounds = data.plan.lanes[0].epochs_per_round
    # Windows of eight: 7 is the last of its own, so its first row is the next; 56 after 59.
    expected = Counter({f"n{n}.": rounds for n in range(60) if n not in broken})
    expected.update({"n0.": rounds, "n10.": 2 * rounds, "n56.": rounds})
    assert seen == expected
    faults = {fault for slot in slots if slot.opened for fault in slot.opened.faults}
    assert {(fault.shard, fault.row) for fault in faults} == {
        (str(tmp_path / "rows.parquet"), n) for n in broken
    }
    assert {f.row: f.reason for f in faults}[59] == "image is null"
    assert all(0 < len(fault.reason) < 300 for fault in faults)


def test_a_window_without_a_good_row_is_replaced_by_the_lanes_next(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.run_data.WINDOWS_PER_LANE", 1)
    rows = [(b"" if n < 32 else c, t) for n, (c, t) in enumerate(media_rows("image", 64))]
    write_media_parquet(tmp_path / "rows.parquet", rows, "image")
    data = media_data(tmp_path / "rows.parquet", "image", tmp_path, eval_fraction=0)
    slots = epoch(data)
    assert len(slots) == 8
    seen = Counter(caption for slot in slots for caption in captions(slot.symbols))
    assert set(seen) == {f"n{n}." for n in range(32, 64)} and sum(seen.values()) == 64
    plan = {(p.step, p.slot): p for p in data.plan.walk(0, 2, 0, 1)}
    for slot in slots:
        place = plan[slot.step, slot.slot]
        if place.window > 1:  # windows of sixteen rows
            continue
        order = data.plan.lanes[0].order(place.epoch)[0].tolist()
        following = order[order.index(place.window) + 1 :] + order
        taken = next(window for window in following if window > 1)
        assert {int(c[1:-1]) // 16 for c in captions(slot.symbols)} == {taken}


def test_a_source_without_one_good_row_stops_the_run(tmp_path):
    write_media_parquet(tmp_path / "rows.parquet", [(b"", "x")] * 20, "image")
    data = media_data(tmp_path / "rows.parquet", "image", tmp_path)
    with pytest.raises(ShardError, match="image: not one row of it can be decoded"):
        next(read_slots(data, 0, 1, 0, 1))
    assert held_out_slots(data, "image") == []


def test_all_five_have_the_same_number_of_positions_for_any_world(tmp_path):
    data = five_source_data(tmp_path)
    slots = list(read_slots(data, 0, 40, 0, 1))
    assert {slot.source for slot in slots} == set(data.manifests)
    for slot in slots:
        assert slot.symbols[:, 1:].size == 128 and slot.symbols.dtype == np.uint16
        assert (slot.content is None) == (slot.modality in ("text", "code"))
    halves = [slot for rank in (0, 1) for slot in read_slots(data, 0, 40, rank, 2)]
    halves.sort(key=lambda slot: (slot.step, slot.slot))
    assert [s.sha256 for s in halves] == [s.sha256 for s in slots]
    assert [s.row_ids.tolist() for s in halves] == [s.row_ids.tolist() for s in slots]


def test_a_batch_of_tensors_has_the_slots_content(tmp_path):
    write_media_parquet(tmp_path / "rows.parquet", media_rows("image", 20), "image")
    slot = next(read_slots(media_data(tmp_path / "rows.parquet", "image", tmp_path), 0, 1, 0, 1))
    batch = to_batch(slot, torch.device("cpu"))
    assert batch.content_BPX.dtype == torch.uint8
    assert (batch.content_BPX.numpy() == slot.content).all()
    assert (batch.symbols_BT.numpy() == slot.symbols[:, :-1]).all()
    assert ((batch.targets_BT == NO_TARGET).numpy() == (slot.symbols[:, 1:] == PADDING)).all()
