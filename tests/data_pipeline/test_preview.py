"""preview on five small sources: files say what the rows they name really hold."""

import io
import re

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from arbitor.audio_codec import HOP, spectral_distance
from arbitor.errors import UserError
from arbitor.settings import write_yaml
from data_pipeline.contact_sheet import MARGIN, contact_sheet
from data_pipeline.preview import preview_command
from data_pipeline.preview_files import PICTURE_SIDE
from tests.data_pipeline.media_shards import (
    SHAPE,
    five_sources,
    media_rows,
    write_media_parquet,
)

FIRST_IMAGE = {"struct.parquet": 0, "binary.parquet": 12, "rows.jsonl": 24, "rows.tar": 36}


@pytest.fixture(scope="module")
def preview(tmp_path_factory):
    """(the folder of shards, the folder written, what was printed)"""
    folder = tmp_path_factory.mktemp("preview")
    sources = five_sources(folder)
    entries = {
        name: {"modality": name, "path": source.path, "weight": source.weight}
        for name, source in sources.items()
    }
    data = SHAPE | {"sources": entries}
    data |= {name: vars(data[name]) for name in ("image", "audio", "video")}
    config = folder / "run.yaml"
    config.write_text(write_yaml({"data": data, "seed": 3, "storage": str(folder / "runs")}))
    assert preview_command([str(config), "--out", str(folder / "out")]) == 0
    return folder, folder / "out"


def entries(out, source):
    """The cells of the source's table in index.md."""
    section = (out / "index.md").read_text().split(f"## {source}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section.splitlines()
        if re.match(r"\| \d", line)
    ]


def test_there_are_sixteen_of_each_source(preview):
    _, out = preview
    for source in ("image", "audio", "video"):
        assert [cells[0] for cells in entries(out, source)] == [str(i) for i in range(16)]
    assert len(list(out.glob("audio-*.wav"))) == len(list(out.glob("video-*.mp4"))) == 16
    for source in ("text", "code"):
        assert (out / f"{source}.txt").read_text().count("===== step ") == 16


def test_pictures_and_captions_are_those_of_the_rows_named(preview):
    folder, out = preview
    sheet = np.asarray(Image.open(out / "image.png"))
    tile_height = (sheet.shape[0] - MARGIN) // 4
    shards = set()
    for i, cells in enumerate(entries(out, "image")):
        shard, row = re.fullmatch(rf"{folder}/images/(\S+) row (\d+)", cells[5]).groups()
        shards.add(shard)
        number = FIRST_IMAGE[shard] + int(row)
        assert cells[6] == "4" and cells[7] == f"n{number}."
        x, y = MARGIN + i % 4 * (PICTURE_SIDE + MARGIN), MARGIN + i // 4 * tile_height
        tile = sheet[y : y + PICTURE_SIDE, x : x + PICTURE_SIDE]
        assert (tile == number).all()  # a picture of one grey, losslessly stored
        assert (sheet[y + PICTURE_SIDE : y + tile_height - MARGIN] < 128).any(), "its caption"
    assert len(shards) > 1
    assert {cells[8] for cells in entries(out, "image")} == {"before", "after"}


def test_sounds_are_those_of_the_rows_named(preview):
    folder, out = preview
    originals = dict(enumerate(media_rows("audio", 40)))
    for cells in entries(out, "audio"):
        number = int(cells[5].removeprefix(f"{folder}/audio.tar row "))
        assert cells[7] == f"n{number}."
        sound, rate = soundfile.read(out / f"audio-{int(cells[0]):02}.wav", dtype="float32")
        original, _ = soundfile.read(io.BytesIO(originals[number][0]), dtype="float32")
        assert (
            rate == 16_000 and len(sound) == HOP * int(cells[6]) == -(-len(original) // HOP) * HOP
        )
        other = np.sin(2 * np.pi * 3000 * np.arange(len(original)) / rate).astype(np.float32)
        distance = spectral_distance(sound, original)
        assert distance < 14 and distance + 4 < spectral_distance(sound, other)


def test_films_have_the_frames_of_the_rows_named(preview):
    folder, out = preview
    for cells in entries(out, "video"):
        number = int(cells[5].removeprefix(f"{folder}/video.parquet row "))
        assert cells[6] == "8" and cells[7] == f"n{number}."
        with av.open(str(out / f"video-{int(cells[0]):02}.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert float(container.streams.video[0].average_rate) == 4.0
        assert len(frames) == 2
        assert max(abs(frame.astype(int) - number).max() for frame in frames) <= 8


def test_text_is_that_of_the_rows_named(preview):
    folder, out = preview
    rows = pq.read_table(folder / "text.parquet")["text"].to_pylist()
    sections = re.split(r"^===== (.*), sequence \d+\n", (out / "text.txt").read_text(), flags=re.M)
    index = (out / "index.md").read_text().split("## text\n")[1].split("\n## ")[0]
    for place, text in zip(sections[1::2], sections[2::2], strict=True):
        (line,) = [line for line in index.splitlines() if line.startswith(f"- {place}:")]
        named = {int(row) for row in re.findall(r"row (\d+)", line)}
        begun = {int(number) for number in re.findall(r"row(\d+) ", text)}
        assert begun <= named
        for piece in text.split("<end of document>\n"):
            assert any(piece.rstrip("\n") in rows[number] for number in named)


def test_a_folder_in_use_is_refused_and_a_row_that_stands_in_is_named(tmp_path, capsys):
    images = media_rows("image", 40)
    images[3] = (b"no image", "bad")
    write_media_parquet(tmp_path / "a.parquet", images, "image")
    source = {"modality": "image", "path": str(tmp_path / "a.parquet")}
    idle = {"path": str(tmp_path / "a.parquet"), "weight": [[0, 0.0], [9000, 0.0], [9001, 1.0]]}
    data = {"sources": {"image": source, "late": idle}, "eval_fraction": 0}
    config = tmp_path / "run.yaml"
    config.write_text(write_yaml({"data": data, "storage": str(tmp_path / "runs"), "steps": 40}))
    words = [str(config), "--out", str(tmp_path / "out")]
    assert preview_command(words) == 0
    assert "late: has no slot in 40 steps" in capsys.readouterr().out
    for cells in entries(tmp_path / "out", "image"):
        number = int(cells[5].rpartition(" ")[2])
        assert number != 3 and cells[7] == f"n{number}."
    with pytest.raises(UserError, match="out: is there and not empty; name another folder"):
        preview_command(words)


def test_an_out_that_cannot_be_made_is_told_before_anything_is_read(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(write_yaml({"data": {"sources": {"text": {"path": "nowhere"}}}}))
    with pytest.raises(UserError, match="--out .*/run.yaml/out: cannot be made .*; name another"):
        preview_command([str(config), "--out", str(config / "out")])


def test_a_long_caption_is_broken_and_cut():
    picture = np.zeros((40, 100, 3), np.uint8)
    sheet = np.asarray(contact_sheet([picture] * 3, ["", "words " * 50, "x" * 200], columns=2))
    assert sheet.shape == (MARGIN + 2 * (40 + 3 * 17 + 2 * MARGIN), MARGIN + 2 * (100 + MARGIN), 3)
    assert (sheet[:, -MARGIN:] == 255).all() and (sheet[-MARGIN:] == 255).all()
