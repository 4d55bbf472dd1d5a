"""The judges of generated content: what is true is told as true, and what is not is not."""

import numpy as np
import pytest

from arbitor.audio_codec import SAMPLING_RATE, encode
from benchmarks.media_judges import SoundJudge, judge_captions, judge_films, scene_of, sound_class
from benchmarks.media_rows import Rows
from data_pipeline.sample_rows.audio import KINDS
from data_pipeline.sample_rows.shapes import COLOURS


def test_a_scene_may_be_told_either_way_round():
    scene = scene_of("a red circle above a blue square")
    assert scene == scene_of("a blue square below a red circle")
    assert scene != scene_of("a red circle below a blue square")
    assert scene != scene_of("a red circle left of a blue square")
    assert scene != scene_of("a red square above a blue circle")
    assert scene_of("a red circle above a blue") is None
    assert scene_of("a pink circle above a blue square") is None
    truth = ["a red circle above a blue square"] * 4
    said = [truth[0], "a blue square below a red circle", "a red circle above a red square", ""]
    assert judge_captions(said, truth) == {"right": 0.5, "verbatim": 0.25}


@pytest.mark.parametrize(
    ("direction", "way"), [("left", (0, -1)), ("right", (0, 1)), ("up", (-1, 0)), ("down", (1, 0))]
)
def test_a_film_is_judged_by_where_its_shape_goes_and_its_colour(direction, way):
    film = np.full((5, 24, 24, 3), 230, np.uint8)
    for number, frame in enumerate(film):
        down, right = (10 + (number - 2) * 3 * step for step in way)
        frame[down : down + 5, right : right + 5] = COLOURS["green"]
    film = film[None] - np.random.default_rng(0).integers(0, 9, film.shape, dtype=np.uint8)
    right = {"direction": 1.0, "colour": 1.0}
    assert judge_films(film, [f"a green square moves {direction}"]) == right
    others = {"left", "right", "up", "down"} - {direction}
    for other in others:
        assert judge_films(film, [f"a red square moves {other}"]) == {"direction": 0, "colour": 0}
    still = np.repeat(film[:, :1], 5, axis=1)
    assert judge_films(still, [f"a green square moves {direction}"])["direction"] == 0


def test_a_sound_is_of_the_class_of_the_nearest_true_one():
    time = np.arange(SAMPLING_RATE // 2) / SAMPLING_RATE
    clips, captions = [], []
    for chance in (0.2, 0.7):
        for kind in ("rising", "falling", "chord"):
            for height, factor in (("low", 1.0), ("high", 4.0)):
                sound, words = KINDS[kind](time, factor, np.full(6, chance))
                clips.append(encode((0.3 * sound / abs(sound).max()).astype(np.float32)))
                captions.append(words.format(height=height))
    content = np.stack(clips)
    symbols = np.full((len(clips), 80), 257, np.uint16)
    for row, caption in zip(symbols, captions, strict=True):
        row[: len(clips[0])] = 265
        row[len(clips[0]) : len(clips[0]) + len(caption)] = list(caption.encode())
    judge = SoundJudge(Rows("audio", symbols[:6], content[:6]))
    right = {"class": 1.0, "kind": 1.0, "height": 1.0}
    assert judge.judge(clips[6:], captions[6:]) == right and judge.chance == 1 / 6
    assert judge.judge(clips[6:], captions[6:][::-1])["class"] == 0
    assert sound_class("a high voice says ah oo") == sound_class("a high voice says ee ee ee")
