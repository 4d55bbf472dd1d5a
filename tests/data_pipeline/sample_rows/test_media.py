"""Pictures, sounds and videos of the samples are what their texts say, all classes alike often."""

from collections import Counter
from importlib import import_module

import numpy as np
import pytest

from data_pipeline.decode.audio import AudioConfig, decode_audio, decode_audio_codes
from data_pipeline.decode.image import ImageConfig, decode_image
from data_pipeline.decode.video import VideoConfig, decode_video
from data_pipeline.sample_rows import audio, image, video
from data_pipeline.sample_rows.shapes import COLOURS, SHAPES

MEDIA = ("image", "audio", "video")
UNIT = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
UNIT |= {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
FILLED = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}  # of the box around a shape


@pytest.fixture(scope="module")
def tables():
    return {name: import_module(f"data_pipeline.sample_rows.{name}").rows() for name in MEDIA}


def contents(table, name: str) -> list[tuple[bytes, str]]:
    encoded = [row["bytes"] for row in table[name].to_pylist()]
    return list(zip(encoded, table["text"].to_pylist(), strict=True))


@pytest.mark.parametrize("module", [image, audio, video])
def test_the_same_bytes_again_and_a_shorter_sample_is_the_start_of_a_longer(
    module, tables, monkeypatch
):
    monkeypatch.setattr(module, "COUNT", 20)
    again = module.rows(times=2)
    assert again.equals(tables[module.__name__.split(".")[-1]].slice(0, 40))


def test_classes_are_balanced_and_all_are_in_the_held_out_tail(tables):
    for name, words in {
        "image": [" above ", " below ", " left of ", " right of ", *COLOURS, *SHAPES],
        "audio": ["rising", "falling", "chord", "noise", "clicks", "voice", "low", "high"],
        "video": ["left", "right", "up", "down", *COLOURS, *SHAPES],
    }.items():
        texts = tables[name]["text"].to_pylist()
        tail = texts[-len(texts) // 50 :]
        for word in words:
            assert any(word in text for text in tail), (name, word)
        assert len({text.split()[-1] for text in tail}) > 2
    directions = Counter(text.split()[-1] for text in tables["video"]["text"].to_pylist())
    assert set(directions.values()) == {126}
    sides = Counter(
        text.split(" a ")[0].split(" ", 3)[3] for text in tables["image"]["text"].to_pylist()
    )
    assert set(sides.values()) == {810}


def find(pixels: np.ndarray, colour: str) -> tuple[float, float, float]:
    """(x, y, share of its box that is filled) of the pixels nearer to `colour` than to others."""
    palette = np.array([COLOURS[colour], *COLOURS.values(), *([level] * 3 for level in (200, 255))])
    difference = pixels[..., None, :].astype(np.int32) - palette.astype(np.int32)
    mask = (difference**2).sum(axis=-1).argmin(axis=-1) == 0
    y, x = np.nonzero(mask)
    # A blurred edge between two colours may look like a third: half a percent either way is cut.
    low, high = np.quantile([x, y], (0.005, 0.995), axis=1)
    return np.median(x), np.median(y), mask.sum() / np.prod(high - low + 1)


def test_captions_name_the_colours_shapes_and_sides_seen(tables):
    config = ImageConfig(size=image.SIZE)
    for content, caption in contents(tables["image"], "image")[::31]:
        _, first_colour, first, *side, _, second_colour, second = caption.split()
        pixels = decode_image(content, config)
        x1, y1, filled1 = find(pixels, first_colour)
        x2, y2, filled2 = find(pixels, second_colour)
        dx, dy = UNIT[" ".join(side)]
        # Centres are 0.46 of the picture apart; a triangle's mass is lower by a tenth at most.
        assert (x1 - x2) * dx + (y1 - y2) * dy > 0.36 * image.SIZE, caption
        for shape, filled in ((first, filled1), (second, filled2)):
            assert min(FILLED, key=lambda name: abs(FILLED[name] - filled)) == shape, caption


def test_captions_name_the_direction_of_the_motion(tables):
    config = VideoConfig(size=video.SIZE)
    for content, caption in contents(tables["video"], "video")[::7]:
        _, colour, shape, _, direction = caption.split()
        frames = decode_video(content, config)
        places = np.array([find(frame, colour) for frame in frames])
        steps = np.diff(places[:, :2], axis=0) @ UNIT[direction]
        assert (steps > 2).all(), caption
        assert abs(np.diff(places[:, :2], axis=0)).sum() < 1.2 * steps.sum(), caption
        filled = np.median(places[:, 2])
        assert min(FILLED, key=lambda name: abs(FILLED[name] - filled)) == shape, caption


def test_sounds_are_told_apart_by_their_codes(tables):
    rows = contents(tables["audio"], "audio")
    features, kinds = [], []
    for content, transcript in rows:
        codes = decode_audio_codes(content, AudioConfig()).astype(float)
        thirds = [part.mean(axis=0) for part in np.array_split(codes, 3)]
        features.append(np.concatenate([*thirds, codes.std(axis=0)]))
        words = transcript.partition(" says ")[0].split()
        kinds.append(" ".join(words))
    features = np.array(features)
    assert len(set(kinds)) == 18 and set(Counter(kinds).values()) == {30}
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    distance = np.linalg.norm(features[:, None] - features, axis=-1)
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argmin(axis=1)
    right = np.mean([kinds[i] == kinds[j] for i, j in enumerate(nearest)])
    assert right > 0.97


def test_tones_rise_and_fall_and_vowels_are_the_ones_said(tables):
    for content, transcript in contents(tables["audio"], "audio"):
        wave = decode_audio(content, AudioConfig())
        if "tone" in transcript:
            start, end = (loudest_hertz(part) for part in (wave[:4000], wave[-4000:]))
            assert (end > 1.5 * start) if "rising" in transcript else (start > 1.5 * end)
        if transcript.startswith("a low voice"):
            for part, vowel in zip(np.array_split(wave, 3), transcript.split()[-3:], strict=True):
                spectrum = abs(np.fft.rfft(part)) ** 2
                hertz = np.fft.rfftfreq(len(part), 1 / audio.RATE)
                first, second, _ = audio.VOWELS[vowel]
                share = spectrum[hertz > 1900].sum() / spectrum.sum()
                assert (share > 0.15) == (vowel == "ee"), (transcript, share)
                loudest = loudest_hertz(part)
                assert min(abs(loudest - first), abs(loudest - second)) < 120, transcript


def loudest_hertz(wave: np.ndarray) -> float:
    return abs(np.fft.rfft(wave)).argmax() * audio.RATE / len(wave)
