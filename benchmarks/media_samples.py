"""Samples of a trained model for captions of held-out rows, and the judges' word on them and truth.

Shape letters: R rows, P places, X bytes of a place.
"""

import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from arbitor.audio_codec import FRAMES_PER_SECOND
from arbitor.content import describe, generate_content
from arbitor.decoder import Sampling
from arbitor.encoder.image import PatchGrid
from arbitor.main import ARBModel
from arbitor.media.patches import frames_of
from benchmarks.media_judges import (
    FILM_CHANCE,
    SCENE_CHANCE,
    SceneJudge,
    SoundJudge,
    judge_captions,
    judge_films,
)
from benchmarks.media_rows import Rows, Source

LONGEST_CAPTION = 60  # bytes
DESCRIBED_AT_ONCE = 64


def judge_samples(
    model: ARBModel,
    names: Sequence[str],
    sources: dict[str, Source],
    grids: dict[str, PatchGrid],
    options: Namespace,
) -> tuple[dict, dict[str, np.ndarray]]:
    """(shares by judge: of samples, of the held-out rows themselves and by chance; the samples).

    Of pictures and films the samples of the last guidance are kept.
    """
    judged, kept = {}, {}
    for name in (name for name in names if name in _JUDGES):
        rows = sources[name].held_out
        captions = [rows.captions[i % len(rows.captions)] for i in range(options.judged)]
        for guidance in [1.0] if name == "audio" else options.guidance:
            what = name if guidance == 1 else f"{name} guided by {guidance:g}"
            started = time.perf_counter()
            contents = sample(model, name, captions, rows, guidance, options)
            seconds = round(time.perf_counter() - started, 1)
            judged[what] = _JUDGES[name](contents, captions, sources[name], grids, options)
            judged[what] |= {"samples": len(contents), "sampling seconds": seconds}
            kept |= keep(name, contents, captions)
        if name == "image":
            judged["caption"], said = judge_descriptions(model, rows)
            kept["image.said"] = np.array(said)
    return judged, kept


def sample(
    model: ARBModel,
    modality: str,
    captions: Sequence[str],
    rows: Rows,
    guidance: float,
    options: Namespace,
) -> list[np.ndarray]:
    """Content for each caption, in order; captions of one length are sampled together."""
    longest = rows.content.shape[1] / FRAMES_PER_SECOND
    by_length = defaultdict(list)
    for number, caption in enumerate(captions):
        by_length[len(caption)].append(number)
    found: list[np.ndarray] = [np.empty(0)] * len(captions)
    for length, numbers in by_length.items():
        # A seed of its own: else the first of each would come of the same noise.
        seed = options.seed + length
        sampling = Sampling(
            seed=seed, steps=options.euler_steps, guidance=guidance, seconds=longest
        )
        same_length = [captions[i].encode() for i in numbers]
        for i, content in zip(
            numbers, generate_content(model, modality, same_length, sampling), strict=True
        ):
            found[i] = content
    return found


def judge_descriptions(model: ARBModel, rows: Rows) -> tuple[dict, list[str]]:
    """Greedy captions of the held-out pictures."""
    said: list[str] = []
    for start in range(0, len(rows.content), DESCRIBED_AT_ONCE):
        contents = rows.content[start : start + DESCRIBED_AT_ONCE]
        said += describe(model, "image", contents, LONGEST_CAPTION, Sampling(temperature=0))
    judged = {"samples": judge_captions(said, rows.captions)}
    return judged | {"chance": {"right": SCENE_CHANCE["all"]}}, said


def keep(name: str, contents: list[np.ndarray], captions: Sequence[str]) -> dict[str, np.ndarray]:
    lengths = np.array([len(content) for content in contents])
    kept = {f"{name}.content": np.concatenate(contents), f"{name}.lengths": lengths}
    return kept | {f"{name}.captions": np.array(captions)}


def _judge_pictures(contents, captions, source: Source, grids, options) -> dict:
    judge, truth = SceneJudge(source.train, grids["image"], options.device), source.held_out
    return {
        "sampled": judge.judge(np.stack(contents), captions),
        "truth": judge.judge(truth.content, truth.captions),
        "chance": SCENE_CHANCE,
    }


def _judge_sounds(contents, captions, source: Source, grids, options) -> dict:
    judge, truth = SoundJudge(source.train), source.held_out
    return {
        "sampled": judge.judge(contents, captions),
        "truth": judge.judge(truth.used, truth.captions),
        "chance": {"class": judge.chance},
    }


def _judge_films(contents, captions, source: Source, grids, options) -> dict:
    grid, truth = grids["video"], source.held_out

    def films(contents):
        return np.stack([frames_of(content, grid.frames, grid.patch) for content in contents])

    return {
        "sampled": judge_films(films(contents), captions),
        "truth": judge_films(films(truth.content), truth.captions),
        "chance": FILM_CHANCE,
    }


_JUDGES = {"image": _judge_pictures, "audio": _judge_sounds, "video": _judge_films}
