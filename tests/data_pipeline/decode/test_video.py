"""Video: the right frames at the right times, no more decoded than needed; what is refused."""

import io
import struct

import av
import numpy as np
import pytest

from arbitor.errors import UserError
from data_pipeline.decode.video import VideoConfig, decode_video
from tests.data_pipeline.media import BLUE, RED, WHITE, damaged, encode_video, refused

CONFIG = VideoConfig(size=32, patch=16, num_frames=4, frames_per_second=4.0, sequence_length=64)
FORMATS = [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("matroska", "libx264")]


def numbered(count: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Frame i is grey of level 10 i + 5, modulo 250."""
    levels = (10 * np.arange(count) + 5) % 250
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    return [round((frame.mean() - 5) / 10) for frame in frames]


@pytest.mark.parametrize(("kind", "codec"), FORMATS)
@pytest.mark.parametrize(
    ("rate", "expected"), [(4, [0, 1, 2, 3]), (8, [0, 2, 4, 6]), (6, [0, 2, 3, 5])]
)
def test_frames_are_the_first_at_or_after_their_time(kind, codec, rate, expected):
    frames = decode_video(encode_video(numbered(16), rate, kind, codec), CONFIG)
    assert frames.shape == (4, 32, 32, 3) and frames.dtype == np.uint8
    assert numbers(frames) == expected


@pytest.mark.parametrize(("kind", "codec"), FORMATS)
def test_times_that_a_container_rounds_down_are_not_missed(kind, codec):
    thirds = VideoConfig(size=32, num_frames=5, frames_per_second=3.0)
    assert numbers(decode_video(encode_video(numbered(12), 6, kind, codec), thirds)) == [
        0,
        2,
        4,
        6,
        8,
    ]


def test_a_short_or_slow_video_repeats_frames():
    assert numbers(decode_video(encode_video(numbered(3), 4), CONFIG)) == [0, 1, 2, 2]
    assert numbers(decode_video(encode_video(numbered(1), 4), CONFIG)) == [0, 0, 0, 0]
    assert numbers(decode_video(encode_video(numbered(3), 2), CONFIG)) == [0, 1, 1, 2]
    assert numbers(decode_video(encode_video(numbered(5), 8), CONFIG)) == [0, 2, 4, 4]


def test_what_lies_behind_the_last_frame_needed_is_not_decoded():
    content = encode_video(numbered(200), 8, tune="zerolatency")
    with av.open(io.BytesIO(content)) as container:
        sizes = [packet.size for packet in container.demux(video=0)]
    behind = content.index(b"mdat") + 4 + sum(sizes[:12])
    broken = content[:behind] + bytes(sum(sizes[12:])) + content[behind + sum(sizes[12:]) :]
    np.testing.assert_array_equal(decode_video(broken, CONFIG), decode_video(content, CONFIG))


def test_the_centre_square_is_cut_and_scaled():
    frames = np.full((4, 64, 160, 3), WHITE, np.uint8)
    frames[:, :32, 48:80] = RED
    frames[:, 32:, 80:112] = BLUE
    for picture in (frames, frames.swapaxes(1, 2)):
        decoded = decode_video(encode_video(picture, 4, crf="10"), CONFIG).astype(int)
        # 4:2:0 colour and this quality err by less than 20 inside a flat area.
        assert abs(decoded[:, 4:12, 4:12] - RED).max() < 20
        assert abs(decoded[:, 20:28, 20:28] - BLUE).max() < 20
        assert abs(decoded[:, 4:12, 20:28] - WHITE).max() < 20


def test_a_phone_s_rotation_is_applied():
    frames = np.full((4, 64, 64, 3), WHITE, np.uint8)
    frames[:, :32, :32] = RED
    content = encode_video(frames, 4, crf="10")
    matrix = content.index(b"tkhd") + 44
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # a quarter clockwise
    assert content[matrix + 32 : matrix + 36] == turned[-4:]
    decoded = decode_video(content[:matrix] + turned + content[matrix + 36 :], CONFIG).astype(int)
    assert abs(decoded[:, 4:12, 20:28] - RED).max() < 20
    assert abs(decoded[:, 4:12, 4:12] - WHITE).max() < 20


@pytest.mark.parametrize(("kind", "codec"), FORMATS)
def test_truncated_and_flipped_content_is_refused_or_decoded(kind, codec):
    noise = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3)).astype(np.uint8)
    content = encode_video(noise, 4, kind, codec)
    for length in (0, 1, 20, len(content) // 3, len(content) // 2):
        refused(decode_video, content[:length], CONFIG)
    damaged(decode_video, content, CONFIG)


def test_a_truncated_file_with_its_index_first_is_refused():
    noise = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3)).astype(np.uint8)
    content = index_first(encode_video(noise, 4))
    slow = VideoConfig(size=32, num_frames=8, frames_per_second=4.0)
    assert decode_video(content, slow).shape == (8, 32, 32, 3)
    refused(decode_video, content[: int(len(content) * 0.6)], slow)
    refused(decode_video, content[:-50], slow, "ends early")


def index_first(content: bytes) -> bytes:
    """An MP4 made for the web: its `moov` box before `mdat`, the one chunk's offset moved along."""
    box = content.index(b"moov") - 4
    moov = bytearray(content[box:])
    offset = moov.index(b"stco") + 12
    assert int.from_bytes(moov[offset - 4 : offset], "big") == 1
    moved = int.from_bytes(moov[offset : offset + 4], "big") + len(moov)
    moov[offset : offset + 4] = moved.to_bytes(4, "big")
    data = content.index(b"mdat") - 4
    return content[:data] + bytes(moov) + content[data:box]


def test_other_containers_and_content_are_refused(tmp_path):
    refused(decode_video, encode_video(numbered(8), 4, "avi", "mpeg4"), CONFIG)
    real = tmp_path / "real.mp4"
    real.write_bytes(encode_video(numbered(8), 4))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\n{real}\n#EXT-X-ENDLIST\n"
    refused(decode_video, playlist.encode(), CONFIG)
    refused(decode_video, f"ffconcat version 1.0\nfile {real}\n".encode(), CONFIG)
    refused(decode_video, b"", CONFIG)
    refused(decode_video, bytes(5000), CONFIG)


def test_impossible_shapes_are_refused():
    strip = np.zeros((2, 16, 1024, 3), np.uint8)
    refused(decode_video, encode_video(strip, 4), CONFIG, "1024 x 16")
    fast = encode_video(numbered(300), 1000)
    refused(decode_video, fast, VideoConfig(num_frames=2, frames_per_second=4.0), "240 frames")


@pytest.mark.parametrize("key", ["size", "num_frames", "frames_per_second", "sequence_length"])
def test_a_configuration_that_does_not_fit_names_its_key(key):
    VideoConfig().validate()
    with pytest.raises(UserError, match=f"data.video.{key}"):
        VideoConfig(**{key: 0}).validate()
