"""Members of tar shards: which make a row, which of them is its content, and which its text."""

import io
import json
import tarfile

import numpy as np
import pytest

from arbitor.errors import UserError
from data_pipeline.decode.audio import AudioConfig, decode_audio
from data_pipeline.decode.content import ContentError
from data_pipeline.decode.video import VideoConfig, decode_video
from data_pipeline.format.shard import Columns
from data_pipeline.format.webdataset import WebDatasetShard
from tests.data_pipeline.media import encode_audio, encode_video


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read(path, modality="image", **columns):
    """(content, text, problem) of each row."""
    named = Columns(columns.get("text", "text"), columns.get("content", modality))
    shard = WebDatasetShard(str(path), named, modality)
    rows = []
    for group, count, _, digest in shard.media_groups():
        found, again = shard.read_media(group, 0, count)
        assert len(found) == count and digest == again
        rows += found
    return [tuple(row) for row in rows]


def texts(path, modality="text", **columns):
    shard = WebDatasetShard(str(path), Columns(columns.get("text", "text"), modality), modality)
    return [row for group in shard.groups() for row in shard.rows(group)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.tar"


def test_a_row_is_the_first_member_of_its_modality_or_the_named_one(path):
    write(path, [("1.PNG", b"a"), ("1.seg.png", b"mask"), ("1.jpg", b"b"), ("1.png", b"again")])
    assert read(path) == [(b"a", b"", "")]
    assert read(path, content="seg.png") == [(b"mask", b"", "")]
    assert read(path, content="jpg") == [(b"b", b"", "")]
    write(path, [("1.image", b"a"), ("1.png", b"b"), ("2.seg.png", b"mask")])
    missing = "no image member, found seg.png; set content_column"
    assert read(path) == [(b"a", b"", ""), (b"", b"", missing)]


def test_what_is_no_member_of_a_row_is_passed_over(path):
    names = ["._1.png", "1.png", "README", "x/.DS_Store", "x/._2.png", "x/2.png", "x.y/3"]
    write(path, [(name, name.encode()) for name in names])
    assert [content for content, _, _ in read(path)] == [b"1.png", b"x/2.png"]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_is_refused(path, kind):
    with tarfile.open(path, "w") as tar:
        for name, link in (("1.png", None), ("2.png", kind)):
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = link, "1.png"
            tar.addfile(member)
    for modality in ("image", "text"):
        with pytest.raises(UserError, match="rows.tar: 2.png is a link to 1.png .*dereference"):
            list(WebDatasetShard(str(path), Columns("text", "image"), modality).groups())


def test_text_is_a_txt_member_the_named_one_or_a_key(path):
    write(
        path,
        [
            ("0.json", json.dumps({"content": "zero"}).encode()),
            ("1.py", b"one"),
            ("2.txt", b"two"),
            ("2.json", json.dumps({"text": "not this"}).encode()),
            ("3.json", json.dumps({"text": None}).encode()),
            ("README", b"about"),
        ],
    )
    zero, one, two, three = texts(path)
    expected = "no .txt or .text member and no key 'text' in a .json, found {}; set text_column"
    assert isinstance(zero, ContentError)
    assert str(zero) == "0.json: " + expected.format("json (content)")
    assert str(one) == "1.py: " + expected.format("py")
    assert (two, three) == (b"two", b"")
    assert texts(path, text="content")[0] == b"zero"
    assert texts(path, "code", text="py")[1] == b"one"
    shard = WebDatasetShard(str(path), Columns("text", "text"), "text")
    with pytest.raises(UserError, match="rows.tar: 0.json: no .txt or .text member"):
        shard.read(next(shard.groups()))


def test_media_need_no_caption(path):
    write(path, [("1.png", b"a"), ("1.json", b"{}"), ("2.png", b"b"), ("2.text", b"caption")])
    assert read(path) == [(b"a", b"", ""), (b"b", b"caption", "")]
    write(path, [("1.png", b"a"), ("1.json", b"[")])
    assert "its .json is no object with a text" in read(path)[0][2]


def test_endings_of_video_and_sound(path, tmp_path):
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    films = {"mov": "mov", "mkv": "matroska", "m4v": "mp4"}
    write(
        path, [(f"{ending}.{ending}", encode_video(frames, 4, films[ending])) for ending in films]
    )
    for content, _, problem in read(path, "video"):
        assert not problem and decode_video(content, VideoConfig()).shape[0] == 8
    wave = 0.5 * np.sin(np.arange(16_000) / 5)
    opus, vorbis = encode_audio(wave, 16_000, "OGG", "OPUS"), encode_audio(wave, 16_000, "OGG")
    write(path, [("1.opus", opus), ("2.oga", vorbis)])
    for content, _, problem in read(path, "audio"):
        assert not problem and len(decode_audio(content, AudioConfig())) == 16_000
