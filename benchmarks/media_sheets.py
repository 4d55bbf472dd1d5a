"""What `benchmarks.media` sampled, as files to look at and listen to: at most seven, small.

Shape letters: P places, X bytes of a place.
"""

from pathlib import Path

import numpy as np

from arbitor.encoder.image import PatchGrid
from arbitor.media.files import enlarge, mp4, wav
from arbitor.media.patches import frames_of, from_patches
from benchmarks.media_rows import read_rows
from data_pipeline.contact_sheet import contact_sheet

PICTURE_SIDE = 96
COLUMNS = 8
SOUNDS, FILMS = 3, 2  # files of their own


def write_sheets(runs: list[Path], rows: Path, out: Path) -> None:
    """Contact sheets of pictures, of pictures that were captioned, and of films; sounds, films."""
    sources, grids = read_rows(rows)
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        with np.load(run.with_suffix(".npz")) as file:
            samples = {name: file[name] for name in file}
        if "image.content" in samples:
            contents, captions = _contents("image", samples)
            write_pictures(out / "image.png", contents, captions, grids["image"])
            said = samples["image.said"].tolist()[: len(contents)]
            shown = sources["image"].held_out.content[: len(said)]
            write_pictures(out / "caption.png", shown, said, grids["image"])
        if "audio.content" in samples:
            write_sounds(out, *_contents("audio", samples))
        if "video.content" in samples:
            write_films(out, *_contents("video", samples), grids["video"])


def write_pictures(path: Path, contents, captions: list[str], grid: PatchGrid) -> None:
    pictures = [enlarge(from_patches(content, grid.patch), PICTURE_SIDE) for content in contents]
    # A palette is enough for flat shapes and a third of the bytes.
    contact_sheet(pictures, captions, COLUMNS).quantize(128).save(path, optimize=True)


def write_sounds(out: Path, contents, captions: list[str]) -> None:
    for content, caption in list(zip(contents, captions, strict=True))[:SOUNDS]:
        (out / f"{caption.replace(' ', '-')}.wav").write_bytes(wav(content))


def write_films(out: Path, contents, captions: list[str], grid: PatchGrid) -> None:
    films = [frames_of(content, grid.frames, grid.patch) for content in contents]
    strips = [np.concatenate(enlarge(film, 48), axis=1) for film in films[:32]]
    contact_sheet(strips, captions[:32], 4).quantize(128).save(out / "video.png", optimize=True)
    for film, caption in list(zip(films, captions, strict=True))[:FILMS]:
        path = out / f"{caption.replace(' ', '-')}.mp4"
        path.write_bytes(mp4(film, grid.frames_per_second))


def _contents(name: str, samples: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    ends = np.cumsum(samples[f"{name}.lengths"])[:-1]
    return np.split(samples[f"{name}.content"], ends), samples[f"{name}.captions"].tolist()
