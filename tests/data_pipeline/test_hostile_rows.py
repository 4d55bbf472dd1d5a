"""Rows that are broken on purpose in shards of every modality: counted with shard, row and reason.

The decoders' own tests say what is refused; here the rows travel the whole way to the slots.
"""

import base64
import io
import json
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import files
from data_pipeline.run_data import read_slots
from data_pipeline.schema import SourceConfig
from tests.data_pipeline.media import encode_audio, encode_image
from tests.data_pipeline.media_shards import (
    captions,
    media_data,
    media_rows,
    write_media_jsonl,
    write_media_parquet,
    write_plain_binary,
)
from tests.data_pipeline.shards import numbered_rows, row_numbers, run_data, write_parquet

MEDIA = ["image", "audio", "video"]
MEDIA_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(files, "RETRY_AFTER_S", (0.01, 0.01, 0.01))
    begin = time.process_time()
    yield
    assert time.process_time() - begin < 30, "seconds of this process, whatever else runs"


def read(path, modality, steps=20):
    """(reasons by row number, captions of all slots) of a source without held-out rows."""
    data = media_data(path, modality, path.parent / "storage", eval_fraction=0)
    slots = list(read_slots(data, 0, steps, 0, 1))
    faults = [fault for slot in slots if slot.opened for fault in slot.opened.faults]
    assert {fault.shard for fault in faults} <= {str(path)}
    seen = {caption for slot in slots for caption in captions(slot.symbols)}
    return {fault.row: fault.reason for fault in faults}, seen


def jpeg_rows(count):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return [(encode_image(picture, "JPEG"), f"n{n}.") for n, picture in enumerate(pictures)]


@pytest.mark.parametrize("modality", MEDIA)
def test_truncated_rows_are_counted_and_flipped_ones_counted_or_decoded(tmp_path, modality):
    """JPEG, FLAC and MP4; the rows around them come whole."""
    rows = jpeg_rows(24) if modality == "image" else media_rows(modality, 24)
    rng = np.random.default_rng(0)
    for n in range(3):
        content, text = rows[n]
        rows[n] = (content[: len(content) * (n + 1) // 4], text)
    for n in range(8, 14):
        flipped = np.frombuffer(rows[n][0], np.uint8).copy()
        flipped[rng.integers(0, len(flipped), 6)] ^= np.uint8(1) << rng.integers(0, 8, 6, np.uint8)
        rows[n] = (flipped.tobytes(), rows[n][1])
    path = tmp_path / "rows.parquet"
    write_media_parquet(path, rows, modality)
    found, seen = read(path, modality)
    assert {0, 1, 2} <= set(found) <= {0, 1, 2, *range(8, 14)}
    assert all(found.values())
    assert seen == {f"n{n}." for n in range(24) if n not in found}
    assert read(path, modality) == (found, seen)


def test_ten_hours_of_audio_claimed_in_a_header_are_counted(tmp_path):
    samples = 10 * 3600 * 16_000
    wave = 0.3 * np.sin(np.arange(1600) * 0.2)
    flac = bytearray(encode_audio(wave, 16_000, "FLAC"))
    flac[21] = flac[21] & 0xF0 | samples >> 32  # total samples: 36 bits of STREAMINFO
    flac[22:26] = (samples & 0xFFFF_FFFF).to_bytes(4, "big")
    wav = bytearray(encode_audio(wave, 16_000, "WAV"))
    for start in (4, 40):
        wav[start : start + 4] = (samples * 2).to_bytes(4, "little")
    rows = media_rows("audio", 16)
    rows[2], rows[9] = (bytes(flac), "flac"), (bytes(wav), "wav")
    path = tmp_path / "rows.parquet"
    write_media_parquet(path, rows, "audio")
    found, seen = read(path, "audio")
    assert set(found) == {2, 9} and len(seen) == 14


@pytest.mark.parametrize("modality", MEDIA)
def test_a_null_in_every_column_in_turn(tmp_path, modality):
    contents = [{"bytes": data, "path": None} for data, _ in media_rows(modality, 16)]
    contents[3] = None
    contents[4] = {"bytes": None, "path": None}
    texts = [None if n == 5 else f"n{n}." for n in range(16)]
    rates = [None if n == 6 else 16_000 for n in range(16)]
    columns = {modality: pa.array(contents, MEDIA_TYPE), "text": texts, "sampling_rate": rates}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=8)
    found, seen = read(path, modality)
    assert found == {3: f"{modality} is null", 4: f"{modality} is null"}
    assert seen == {"", *(f"n{n}." for n in range(16) if n not in (3, 4, 5))}
    rows = media_rows(modality, 16)
    rows[3], rows[5] = (None, "n3."), (rows[5][0], None)
    write_plain_binary(path, rows, modality)
    assert read(path, modality)[0] == {3: f"{modality} is null"}


def test_a_null_among_texts_is_an_empty_row(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, [None if n == 7 else row for n, row in enumerate(numbered_rows(40))])
    data = run_data(tmp_path, {"text": SourceConfig(path=str(path))}, eval_fraction=0)
    slots = list(read_slots(data, 0, 12, 0, 1))
    seen = {n for slot in slots for n in row_numbers(slot.symbols)}
    assert seen == set(range(40)) - {7}


def test_a_path_that_is_not_utf8_matters_only_where_it_is_read(tmp_path):
    paths = pa.array([b"\xff.png"] * 16, pa.binary()).view(pa.string())
    contents = [None if n == 3 else data for n, (data, _) in enumerate(media_rows("image", 16))]
    column = pa.StructArray.from_arrays([pa.array(contents, pa.binary()), paths], ["bytes", "path"])
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": column, "text": [f"n{n}." for n in range(16)]}), path)
    found, seen = read(path, "image")
    assert found == {3: r"its path b'\xff.png' is not UTF-8"} and len(seen) == 15


def test_what_cannot_be_a_path_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_media_jsonl(path, media_rows("image", 16), "image")
    lines = path.read_text().splitlines()
    names = ["", base64.b64encode(bytes(range(256)) * 24).decode(), "x" * 300]
    lines[:3] = [json.dumps({"image": name, "text": "x"}) for name in names]
    path.write_text("\n".join(lines))
    found, seen = read(path, "image")
    assert set(found) == {0, 1, 2} and len(seen) == 13
    for reason in found.values():
        assert reason.endswith('is not a path; give encoded content as {"bytes": base64}')
        assert len(reason) < 160


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "tar"])
@pytest.mark.parametrize("is_uri", [False, True])
def test_names_with_spaces_and_unicode(tmp_path, ending, is_uri):
    """Of the folder, of the shard, and of the files that its rows name or hold."""
    folder = tmp_path / "my data \N{SNOWMAN}%20#?"
    folder.mkdir()
    path = folder / f"\N{LATIN SMALL LETTER E WITH ACUTE}t\N{COMBINING ACUTE ACCENT} 1.{ending}"
    rows = media_rows("image", 16)
    if ending == "tar":
        write_odd_tar(path, rows)
    else:
        {"parquet": write_media_parquet, "jsonl": write_media_jsonl}[ending](path, rows, "image")
    place = path.as_uri() if is_uri else str(path)
    data = media_data(place, "image", tmp_path / "storage", eval_fraction=0)
    slots = list(read_slots(data, 0, 8, 0, 1))
    assert not any(slot.opened.faults for slot in slots if slot.opened)
    assert {c for slot in slots for c in captions(slot.symbols)} == {text for _, text in rows}


def write_odd_tar(path, rows):
    with tarfile.open(path, "w") as tar:
        for i, (data, text) in enumerate(rows):
            for suffix, content in (("png", data), ("json", json.dumps({"text": text}).encode())):
                member = tarfile.TarInfo(f"a \N{SNOWMAN} folder/row {i:03} \N{EURO SIGN}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
