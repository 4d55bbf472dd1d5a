"""Shards that are broken on purpose: counted row by row or refused with their place, soon."""

import json
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arbitor.errors import UserError
from data_pipeline import files
from data_pipeline.bad_rows import BadDataError, BadRows
from data_pipeline.files import ShardError
from data_pipeline.index import index_sources
from data_pipeline.run_data import held_out_slots, read_slots
from data_pipeline.schema import DataConfig, SourceConfig
from tests.data_pipeline.media import encode_image
from tests.data_pipeline.media_shards import (
    SHAPE,
    captions,
    media_data,
    media_rows,
    write_media_jsonl,
    write_media_parquet,
    write_tar,
)
from tests.data_pipeline.shards import numbered_rows, row_numbers, run_data, write_parquet


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(files, "RETRY_AFTER_S", (0.01, 0.01, 0.01))
    begin = time.process_time()
    yield
    assert time.process_time() - begin < 30, "seconds of this process, whatever else runs"


def flipped(data: bytes, start: int, stop: int) -> bytes:
    part = np.frombuffer(data, np.uint8).copy()
    part[start:stop] ^= 255
    return part.tobytes()


def refused(path, modality, *parts, **source):
    """The index refuses the shard in one line with its name."""
    config = DataConfig({"s": SourceConfig(modality, str(path), **source)}, **SHAPE)
    with pytest.raises(UserError) as caught:
        index_sources(config, path.parent / "storage")
    message = str(caught.value)
    assert "\n" not in message
    for part in (path.name, *parts):
        assert part in message, message


def faults_of(path, modality="image", steps=10):
    data = media_data(path, modality, path.parent / "storage", eval_fraction=0)
    slots = list(read_slots(data, 0, steps, 0, 1))
    found = {f.row: f.reason for slot in slots if slot.opened for f in slot.opened.faults}
    return found, {caption for slot in slots for caption in captions(slot.symbols)}


@pytest.mark.parametrize("modality", ["text", "image"])
def test_truncated_and_flipped_parquet(tmp_path, modality):
    path = tmp_path / "r\N{SNOWMAN} x.parquet"
    if modality == "text":
        write_parquet(path, numbered_rows(50))
    else:
        write_media_parquet(path, media_rows("image", 50), "image")
    data = path.read_bytes()
    for keep in (3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        refused(path, modality, "not a readable Parquet file")
    path.write_bytes(flipped(data, len(data) - 200, len(data) - 8))
    refused(path, modality, "not a readable Parquet file")


def test_a_flipped_page_of_images_is_a_row_groups_fault(tmp_path):
    path = tmp_path / "rows.parquet"
    write_media_parquet(path, media_rows("image", 48), "image")
    chunk = pq.read_metadata(path).row_group(2).column(1)
    assert chunk.path_in_schema == "image.bytes"
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    path.write_bytes(flipped(path.read_bytes(), start, start + 300))
    found, seen = faults_of(path)
    assert set(found) == set(range(16, 24)) and "row group 2 is corrupt" in found[16]
    assert seen == {f"n{n}." for n in range(48) if not 16 <= n < 24}


def test_broken_tar_is_refused_with_its_place(tmp_path):
    path = tmp_path / "rows.tar"
    write_tar(path, media_rows("image", 30), "image")
    data = path.read_bytes()
    (tmp_path / "whole.tar").write_bytes(data)
    path.write_bytes(data[: len(data) // 2])
    refused(path, "image", "not a whole tar file")
    with tarfile.open(path.parent / "whole.tar") as tar:
        header = tar.getmembers()[9].offset
    path.write_bytes(flipped(data, header, header + 100))
    refused(path, "image", "not a whole tar file")
    path.write_bytes(b"this is no tar file" * 100)
    refused(path, "image", "not a whole tar file")


def test_members_of_a_tar_that_make_no_row(tmp_path):
    path = tmp_path / "rows.tar"
    rows = media_rows("image", 20)
    rows[4] = (b"", "x")
    rows[5] = (rows[5][0][:50], "y")
    write_tar(path, rows, "image")
    found, seen = faults_of(path)
    assert set(found) == {4, 5} and len(seen) == 18
    assert found[4] == "no bytes" and "truncated" in found[5]


def test_a_null_in_every_column_and_wrong_types(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = media_rows("image", 20)
    rows[2], rows[3] = (None, None), (rows[3][0], None)
    write_media_parquet(path, rows, "image")
    found, seen = faults_of(path)
    assert found == {2: "image is null"} and "" in seen
    pq.write_table(pa.table({"image": pa.nulls(20), "text": pa.nulls(20)}), path)
    refused(path, "image", "has type null, expected struct<bytes")
    for column, kind in ((list(range(20)), "int64"), (["x"] * 20, "string")):
        pq.write_table(pa.table({"image": column, "text": ["x"] * 20}), path)
        refused(path, "image", f"'image' has type {kind}")
    pq.write_table(pa.table({"image": [b"x"] * 20, "text": list(range(20))}), path)
    refused(path, "image", "'text' has type int64, expected string")
    refused(path, "image", "no column 'picture'; it has image, text", content_column="picture")
    pq.write_table(pa.table({"text": pa.nulls(20, pa.string())}), path)
    refused(path, "text", "all training rows")


def test_a_row_group_that_no_memory_holds_is_refused(tmp_path, monkeypatch):
    write_media_parquet(tmp_path / "rows.parquet", media_rows("image", 20), "image", group=20)
    monkeypatch.setattr("data_pipeline.format.parquet.GROUP_BYTES", 1000)
    refused(tmp_path / "rows.parquet", "image", "row group 0 has 0.0 GB", "row_group_size")
    write_parquet(tmp_path / "text.parquet", numbered_rows(50), group=20)
    refused(tmp_path / "text.parquet", "text", "row group 0 has 0.0 GB", "row_group_size")


def test_wrong_json_of_images_is_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_media_jsonl(path, media_rows("image", 20), "image")
    lines = path.read_text().splitlines()
    lines[0] = "{"
    lines[1] = "[]"
    lines[2] = json.dumps({"image": {"bytes": "!"}, "text": "x"})
    lines[3] = json.dumps({"image": 5})
    lines[4] = json.dumps({"image": None})
    lines[5] = json.dumps({"image": lines[6], "text": 5})
    lines[6] = json.dumps({"image": "a\0b.png"})
    lines[7] = json.dumps({"image": "https://nowhere/x.png"})
    lines[8] = "[" * 100_000
    path.write_text("\n".join(lines))
    found, _ = faults_of(path)
    assert set(found) == set(range(9))
    assert found[4] == "image is null" and "base64" in found[2]


def test_text_from_a_tar(tmp_path):
    path = tmp_path / "rows.tar"
    write_tar(path, [(b"", text) for text in numbered_rows(40)], "image")
    data = run_data(tmp_path, {"text": SourceConfig(path=str(path))}, eval_fraction=0)
    seen = {n for slot in read_slots(data, 0, 4, 0, 1) for n in row_numbers(slot.symbols)}
    assert seen == set(range(40))
    write_tar(path, [(b"", "a text")] * 3, "image")
    content = path.read_bytes().replace(b'{"text": "a text"}', b'{"text": ["text"]}')
    path.write_bytes(content)
    refused(path, "text", "its .json is no object with a text")


def test_a_row_of_100_mb_text_is_cut(tmp_path):
    path = tmp_path / "rows.parquet"
    text = ["short", "x" * 100_000_000, "row7 end"]
    write_parquet(path, text)
    data = run_data(tmp_path / "storage", {"text": SourceConfig(path=str(path))}, eval_fraction=0)
    assert data.manifests["text"].rows == 2 + 24
    assert data.manifests["text"].symbols == sum(map(len, text)) + 26
    assert max(s.symbols for s in data.manifests["text"].train_segments) <= 16 << 20
    assert next(read_slots(data, 0, 1, 0, 1)).symbols.size


def test_an_image_that_claims_to_be_enormous_is_counted(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = media_rows("image", 16)
    png = encode_image(np.zeros((16, 16, 3), np.uint8), "PNG")
    side = (30_000).to_bytes(4, "big")
    rows[6] = (png[:16] + side + side + png[24:], "x")
    write_media_parquet(path, rows, "image")
    assert set(faults_of(path)[0]) == {6}


def test_an_empty_shard_among_full_ones(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_media_parquet(folder / "a.parquet", media_rows("image", 8), "image")
    write_media_parquet(folder / "b.parquet", [], "image")
    (folder / "c.parquet").write_bytes(b"")
    (folder / "README.md").write_text("about these images")
    write_tar(folder / "d.tar", [], "image")
    write_tar(folder / "e.tar", media_rows("image", 8, 8), "image")
    found, seen = faults_of(folder)
    assert not found and seen == {f"n{n}." for n in range(16)}


@pytest.mark.parametrize("name", ["rows.parquet", "rows.tar", "rows.jsonl"])
def test_a_shard_removed_or_changed_during_the_run_stops_it(tmp_path, name):
    path = tmp_path / name
    write = {"t": write_tar, "p": write_media_parquet, "j": write_media_jsonl}
    write = write[name.split(".")[1][0]]
    write(path, media_rows("image", 40), "image")
    data = media_data(path, "image", tmp_path / "storage")
    assert next(read_slots(data, 0, 1, 0, 1))
    longer = [(content, text + "!!") for content, text in media_rows("image", 40)]
    write(path, longer, "image")
    with pytest.raises(ShardError, match=f"{name}: changed since it was indexed"):
        list(read_slots(data, 0, 9, 0, 1))
    path.unlink()
    with pytest.raises(ShardError, match=f"{name}: cannot be read .* restore it"):
        list(read_slots(data, 0, 9, 0, 1))


def test_a_file_that_a_row_names_is_missing(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_media_jsonl(path, media_rows("image", 20), "image")
    data = media_data(path, "image", tmp_path / "storage")
    (tmp_path / "files of rows" / "3.png").unlink()
    with pytest.raises(ShardError, match="files of rows/3.png: cannot be read"):
        list(read_slots(data, 0, 9, 0, 1))


def bad_images(tmp_path, bad, count=60):
    rows = media_rows("image", count)
    rows = [(b"" if n in bad else content, text) for n, (content, text) in enumerate(rows)]
    write_media_parquet(tmp_path / "rows.parquet", rows, "image")
    return media_data(tmp_path / "rows.parquet", "image", tmp_path / "storage", eval_fraction=0)


def test_bad_rows_are_written_down_once_and_counted(tmp_path):
    data = bad_images(tmp_path, {5, 41}, count=200)
    for rank in (0, 1, 0):  # the last one is worker 0 again, after a restart
        watched = BadRows(tmp_path, rank, data)
        assert len(list(watched.watch(read_slots(data, 0, 40, rank, 2)))) == 80
    entries = [
        json.loads(line) for f in tmp_path.glob("bad-rows-*") for line in f.read_text().splitlines()
    ]
    shard = str(tmp_path / "rows.parquet")
    assert sorted((e["source"], e["shard"], e["row"]) for e in entries) == [
        ("image", shard, 5),
        ("image", shard, 41),
    ]
    assert all(e["reason"] == "no bytes" for e in entries)
    assert watched.counts() == {"image": 2}


def test_a_torn_last_line_of_bad_rows_is_written_again(tmp_path):
    data = bad_images(tmp_path, {5, 41}, count=200)
    list(BadRows(tmp_path, 0, data).watch(read_slots(data, 0, 40, 0, 1)))
    path = tmp_path / "bad-rows-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    for _ in range(2):
        watched = BadRows(tmp_path, 0, data)
        list(watched.watch(read_slots(data, 0, 40, 0, 1)))
        assert path.read_bytes() == whole and watched.counts() == {"image": 2}


def test_bad_rows_among_held_out_ones_are_listed_and_stop_nothing(tmp_path):
    bad_images(tmp_path, {50, *range(56, 59)})
    data = media_data(tmp_path / "rows.parquet", "image", tmp_path / "storage", eval_fraction=0.2)
    watched = BadRows(tmp_path, 0, data)
    for _ in range(2):
        watched.list_held_out(held_out_slots(data, "image"))
    assert watched.counts() == {"image": 4}


def test_too_many_bad_rows_stop_the_run_with_their_list(tmp_path):
    data = bad_images(tmp_path, set(range(20, 30)))
    with pytest.raises(BadDataError) as caught:
        list(BadRows(tmp_path, 0, data).watch(read_slots(data, 0, 60, 0, 1)))
    message = str(caught.value)
    assert "data.sources.image" in message and "data.max_bad_fraction=0.01" in message
    assert "rows.parquet row 2" in message and "no bytes" in message and "\n" not in message
    generous = media_data(
        tmp_path / "rows.parquet", "image", tmp_path, eval_fraction=0, max_bad_fraction=0.5
    )
    assert list(BadRows(tmp_path, 0, generous).watch(read_slots(generous, 0, 60, 0, 1)))


def test_text_rows_say_their_numbers_through_a_shard_with_an_odd_name(tmp_path):
    path = tmp_path / "a b \N{SNOWMAN}%20#.parquet"
    write_parquet(path, numbered_rows(50))
    for place in (str(path), "file://" + str(tmp_path) + "/*.parquet"):
        data = run_data(tmp_path, {"text": SourceConfig(path=place)}, eval_fraction=0)
        slots = list(read_slots(data, 0, 5, 0, 1))
        assert {n for slot in slots for n in row_numbers(slot.symbols)} == set(range(50))
