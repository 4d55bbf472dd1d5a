"""What the model makes at a step of a run: files in the run's folder, which MLflow gets too."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from arbitor.content import Piece, describe, generate_content, speakable
from arbitor.decoder import Sampling, texts
from arbitor.generate import ENDINGS, encoded, generate
from arbitor.main import ARBModel
from arbitor.media.files import enlarge, png
from arbitor.media.patches import from_patches
from arbitor.modality import BYTE_MODALITIES
from arbitor.vocab import NUM_BYTES, PADDING
from data_pipeline.contact_sheet import contact_sheet
from data_pipeline.pack import PackedSlot
from ray_jobs.config import RunConfig

SAMPLES = "samples"  # in the run's folder
_TEXTS, _TEXT_LENGTH = 4, 256
_PICTURES, _PICTURE_SIDE = 4, 96
_CLIPS = 2  # of sound and of film each
_CAPTION_LENGTH = 64
_EULER_STEPS = 16  # a run waits for its samples


def write_samples(
    model: ARBModel, config: RunConfig, step: int, held_out: Mapping[str, list[PackedSlot]]
) -> None:
    """Of each modality of the run, with the same seed at every step: texts from their beginning,
    contents for captions of held-out rows, and captions of held-out pictures.

    `held_out` are slots by source; without any, content is made without a caption.
    """
    stem = f"step-{step:08d}"
    folder = config.folder / SAMPLES
    folder.mkdir(exist_ok=True)
    sources = {source.modality: name for name, source in config.data.active_sources.items()}
    rows = {name: _rows(held_out.get(source, ())) for name, source in sources.items()}
    if set(sources) & set(BYTE_MODALITIES):
        _write(folder / f"{stem}.txt", _texts(model).encode())
    for name in speakable(model):
        captions = [caption for caption, _ in rows.get(name, ())] or [b""]
        contents = _contents(model, name, captions, config)
        if name == "image":
            _write(folder / f"{stem}-{name}.png", _sheet(contents, captions, model))
            continue
        for number, content in enumerate(contents):
            path = folder / f"{stem}-{name}-{number}.{ENDINGS[name]}"
            _write(path, encoded(model, Piece(name, content)))
    if model.image_encoder is not None and rows.get("image"):
        _write(folder / f"{stem}-captions.txt", _captions(model, rows["image"]).encode())


def _rows(slots: list[PackedSlot]) -> list[tuple[bytes, np.ndarray]]:
    """(caption, content) of the first rows; none of text and code."""
    found = []
    for slot in slots:
        if slot.content is None:
            return []
        used = slot.symbols[:, 0] != PADDING
        for symbols, content in zip(slot.symbols[used], slot.content[used], strict=True):
            found.append((bytes(s for s in symbols.tolist() if s < NUM_BYTES), content))
    return found[:_PICTURES]


def _texts(model: ARBModel) -> str:
    symbols = list(generate(model, b"", _TEXT_LENGTH, Sampling(), _TEXTS))
    return "".join(f"--- {i}\n{text}\n" for i, text in enumerate(texts(symbols), start=1))


def _contents(
    model: ARBModel, modality: str, captions: list[bytes], config: RunConfig
) -> list[np.ndarray]:
    sampling = Sampling(steps=_EULER_STEPS, seconds=config.data.audio.seconds_max)
    count = _PICTURES if modality == "image" else _CLIPS
    return [
        generate_content(model, modality, [caption], sampling)[0] for caption in captions[:count]
    ]


def _sheet(contents: list[np.ndarray], captions: list[bytes], model: ARBModel) -> bytes:
    patch = model.config.image.patch
    pictures = [enlarge(from_patches(content, patch), _PICTURE_SIDE) for content in contents]
    words = [caption.decode(errors="replace") for caption in captions]
    return png(np.asarray(contact_sheet(pictures, words, columns=2)))


def _captions(model: ARBModel, rows: list[tuple[bytes, np.ndarray]]) -> str:
    contents = np.stack([content for _, content in rows])
    said = describe(model, "image", contents, _CAPTION_LENGTH, Sampling(temperature=0))
    lines = (
        f"{caption.decode(errors='replace')}\n-> {words}\n"
        for (caption, _), words in zip(rows, said, strict=True)
    )
    return "".join(lines)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: MLflow gets what is there."""
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content)
    partial.rename(path)
