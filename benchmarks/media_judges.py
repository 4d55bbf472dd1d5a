"""What is judged of generated content: whether it shows what its caption asks for.

Every judge takes content as slots hold it and captions as the sample shards write them, so that it
can be asked about true rows as well.
Shape letters: R rows, P places, X bytes of a place, F frames, H height, W width, C codes, M bands.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.audio_codec import COSINES_MC, MEAN_RANGE, STEP
from arbitor.encoder.image import PatchGrid, to_values
from arbitor.media.patches import from_patches
from benchmarks.media_rows import Rows
from data_pipeline.sample_rows.shapes import COLOURS, SHAPES

SCENE = re.compile(r"a (\w+) (\w+) (above|below|left of|right of) a (\w+) (\w+)")
ATTRIBUTES = {  # of a scene, with the number of values
    "axis": 2,
    "first colour": len(COLOURS),
    "first shape": len(SHAPES),
    "second colour": len(COLOURS),
    "second shape": len(SHAPES),
}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
CLASSIFIER_STEPS, CLASSIFIER_BATCH = 400, 64
SOUND_FRAMES = 16  # a clip's spectra are resampled to so many
LEAST_WAY = 0.1  # of a frame's side that a shape must move


class Scene(NamedTuple):
    """What a picture shows: the first shape is above the second (axis 0) or left of it (1).

    The same picture may be told either way round; this is the same for both.
    """

    axis: int
    first_colour: int
    first_shape: int
    second_colour: int
    second_shape: int


def scene_of(caption: str) -> Scene | None:
    """None for a caption that is none of the sample's."""
    match = SCENE.fullmatch(caption)
    if not match:
        return None
    colour, shape, relation, other_colour, other_shape = match.groups()
    colours = list(COLOURS)
    if not {colour, other_colour} <= set(colours) or not {shape, other_shape} <= set(SHAPES):
        return None
    first = colours.index(colour), SHAPES.index(shape)
    second = colours.index(other_colour), SHAPES.index(other_shape)
    if relation in ("below", "right of"):
        first, second = second, first
    return Scene(int(relation.endswith("of")), *first, *second)


class SceneClassifier(nn.Module):
    """Pictures, float32 [R, 3, H, W] in -1..1 -> logits of every attribute, [R, sum of values]."""

    def __init__(self, side: int, channels: int = 32):
        super().__init__()
        layers, width = [], 3
        for number in range(3):
            wider = channels << number
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
            width = wider
        features = width * (side // 8) ** 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3))
        self.heads = nn.Linear(features, sum(ATTRIBUTES.values()))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.heads(self.layers(pictures))


class SceneJudge:
    """Trains a classifier on true pixels, then says what pictures show."""

    def __init__(self, train: Rows, grid: PatchGrid, device: str):
        self.grid, self.device = grid, device
        pictures = self._pictures(train.content)
        truth = torch.tensor([scene_of(caption) for caption in train.captions], device=device)
        torch.manual_seed(0)
        self.model = SceneClassifier(grid.patch * grid.side).to(device)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, CLASSIFIER_STEPS)
        for _ in range(CLASSIFIER_STEPS):
            rows = torch.randint(len(pictures), (CLASSIFIER_BATCH,)).to(device)
            # Noise of a few levels: what a sampler leaves is no attribute.
            noisy = pictures[rows] + 0.05 * torch.randn_like(pictures[rows])
            logits = self.model(noisy).split(list(ATTRIBUTES.values()), dim=1)
            loss = sum(F.cross_entropy(x, truth[rows, i]) for i, x in enumerate(logits))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.model.eval()

    def judge(self, contents: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        """Shares of right attributes over uint8 [R, P, X]; `all` = the whole scene is right."""
        with torch.no_grad():
            logits = self.model(self._pictures(contents)).split(list(ATTRIBUTES.values()), dim=1)
        seen = torch.stack([x.argmax(1) for x in logits], dim=1).cpu().numpy()
        right = seen == np.array([scene_of(caption) for caption in captions])
        shares = dict(zip(ATTRIBUTES, right.mean(axis=0).tolist(), strict=True))
        return {
            "axis": shares["axis"],
            "colour": (shares["first colour"] + shares["second colour"]) / 2,
            "shape": (shares["first shape"] + shares["second shape"]) / 2,
            "all": float(right.all(axis=1).mean()),
        }

    def _pictures(self, contents: np.ndarray) -> Tensor:
        pixels = from_patches(contents, self.grid.patch)
        return to_values(torch.from_numpy(pixels).to(self.device)).permute(0, 3, 1, 2)


SCENE_CHANCE = {
    "axis": 1 / 2,
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "all": 1 / (2 * len(COLOURS) * (len(COLOURS) - 1) * len(SHAPES) ** 2),
}


def judge_captions(said: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """`right`: tells the picture's scene, either way round; `verbatim`: as the row does."""
    scenes = [(scene_of(a), scene_of(b)) for a, b in zip(said, truth, strict=True)]
    return {
        "right": float(np.mean([a == b for a, b in scenes])),
        "verbatim": float(np.mean([a == b for a, b in zip(said, truth, strict=True)])),
    }


class SoundJudge:
    """The class of a sound is that of the nearest true clip, by its spectra over time."""

    def __init__(self, train: Rows):
        self.spectra = np.stack([_spectra(codes) for codes in train.used])
        self.classes = [sound_class(caption) for caption in train.captions]

    @property
    def chance(self) -> float:
        return 1 / len(set(self.classes))

    def judge(self, clips: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, float]:
        """Shares of the clips, uint8 [F, C], that are of the class asked for."""
        found = [self.classes[self._nearest(codes)] for codes in clips]
        asked = [sound_class(caption) for caption in captions]
        pairs = list(zip(found, asked, strict=True))
        return {
            "class": float(np.mean([a == b for a, b in pairs])),
            "kind": float(np.mean([a[0] == b[0] for a, b in pairs])),
            "height": float(np.mean([a[1] == b[1] for a, b in pairs])),
        }

    def _nearest(self, codes: np.ndarray) -> int:
        distance = np.square(self.spectra - _spectra(codes)).mean(axis=(1, 2))
        return int(distance.argmin())


def sound_class(caption: str) -> tuple[str, str]:
    """(kind, height): ('tone rising', 'low') of 'a low rising tone'; what a voice says is none."""
    words = caption.partition(" says ")[0].split()
    (height,) = {"low", "middle", "high"} & set(words)
    return " ".join(sorted(set(words) - {height})), height


def _spectra(codes_FC: np.ndarray) -> np.ndarray:
    """float32 [SOUND_FRAMES, M] in dB: the mel levels that the codes tell, over the clip's time."""
    cepstrum = (codes_FC.astype(np.float32) - 128) * np.float32(STEP)
    cepstrum[:, 0] = (1 - codes_FC[:, 0] / np.float32(255)) * MEAN_RANGE
    levels = np.einsum("fc,mc->fm", cepstrum, COSINES_MC)
    edges = np.linspace(0, len(levels), SOUND_FRAMES + 1)
    parts = [
        levels[int(a) : max(int(a) + 1, int(b))] for a, b in zip(edges, edges[1:], strict=False)
    ]
    return np.stack([part.mean(axis=0) for part in parts])


def judge_films(films_RFHW3: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Shares of films, uint8, whose shape moves as asked and has the colour asked for."""
    moved, coloured = [], []
    for film_FHW3, caption in zip(films_RFHW3, captions, strict=True):
        _, colour, _, _, direction = caption.split()
        way_F2, seen = _track(film_FHW3.astype(np.float32))
        way = (way_F2[-1] - way_F2[0]) / film_FHW3.shape[1]
        along = float(way @ DIRECTIONS[direction])
        moved.append(along > LEAST_WAY and along >= abs(way).max())
        distances = [np.square(seen - rgb).sum() for rgb in COLOURS.values()]
        coloured.append(list(COLOURS)[int(np.argmin(distances))] == colour)
    return {"direction": float(np.mean(moved)), "colour": float(np.mean(coloured))}


FILM_CHANCE = {"direction": 1 / len(DIRECTIONS), "colour": 1 / len(COLOURS)}


def _track(film_FHW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the shape's centre in each frame, [F, 2] in pixels down and right; its colour)."""
    ground = np.median(film_FHW3, axis=(0, 1, 2))
    distance_FHW = abs(film_FHW3 - ground).sum(-1)
    weight_FHW = np.where(distance_FHW > distance_FHW.max() / 2, distance_FHW, 0) + 1e-6
    total_F = weight_FHW.sum(axis=(1, 2))
    down, right = (np.arange(n) for n in weight_FHW.shape[1:])
    centre_F2 = np.stack(
        [
            (weight_FHW.sum(2) * down).sum(1) / total_F,
            (weight_FHW.sum(1) * right).sum(1) / total_F,
        ],
        axis=1,
    )
    is_shape_FHW = distance_FHW > 0.75 * distance_FHW.max()
    return centre_F2, np.median(film_FHW3[is_shape_FHW], axis=0)
