"""Sequences turned back into files that people read, look at and listen to.

Shape letters: T positions, P places of a sequence, X bytes of a place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from arbitor import vocab
from arbitor.media.files import FRAME_SIDE, enlarge, mp4, wav
from arbitor.media.patches import frames_of, from_patches
from data_pipeline.contact_sheet import contact_sheet
from data_pipeline.decode.audio import AudioConfig
from data_pipeline.decode.image import ImageConfig
from data_pipeline.layout import MediaConfig, layout_of
from data_pipeline.plan import SlotPlan

PICTURE_SIDE = 192  # pixels at least; smaller pictures are enlarged
FRAME_GAP = 3
PICTURES_A_LINE = 4
END_MARK = b"<end of document>\n"


@dataclass(frozen=True)
class SeenSequence:
    """One sequence of a slot; `rows` are all rows of the slot for text and code.

    A row is (shard, number), or None where the row of another window stands in.
    """

    slot: SlotPlan
    number: int
    symbols: np.ndarray  # uint16 [T + 1]
    content: np.ndarray | None  # uint8 [P, X]
    rows: list[tuple[str, int] | None]

    @property
    def text(self) -> str:
        """The bytes among the targets, and the ends of documents where there may be several."""
        marks = {vocab.END_OF_DOCUMENT: END_MARK} if self.content is None else {}
        targets = self.symbols[1:].tolist()
        parts = (bytes([s]) if s < vocab.NUM_BYTES else marks.get(s, b"") for s in targets)
        return b"".join(parts).decode("utf-8", "replace")


def write_source(
    out: Path, source: str, media: MediaConfig | None, sequences: Sequence[SeenSequence]
) -> list[str]:
    """Writes the files of one source; the lines of Markdown that say what is what."""
    if media is None:
        return _write_text(out / f"{source}.txt", sequences)
    contents = [_content(sequence, media) for sequence in sequences]
    sheet = [f"![{source}]({source}.png)", ""]
    if isinstance(media, ImageConfig):
        pictures = [enlarge(from_patches(p, media.patch), PICTURE_SIDE) for p in contents]
        _write_sheet(out / f"{source}.png", pictures, sequences, PICTURES_A_LINE)
        return [*sheet, *_table(sequences, media, [f"{source}.png"] * len(sequences))]
    ending = "wav" if isinstance(media, AudioConfig) else "mp4"
    files = [f"{source}-{i:02}.{ending}" for i in range(len(sequences))]
    if isinstance(media, AudioConfig):
        for file, codes in zip(files, contents, strict=True):
            (out / file).write_bytes(wav(codes))
        return _table(sequences, media, files)
    films = [frames_of(patches, media.num_frames, media.patch) for patches in contents]
    for file, film in zip(files, films, strict=True):
        (out / file).write_bytes(mp4(film, media.frames_per_second))
    between = ((0, 0), (0, 0), (0, FRAME_GAP), (0, 0))
    strips = [
        np.concatenate(np.pad(enlarge(f, FRAME_SIDE), between, constant_values=255), axis=1)
        for f in films
    ]
    _write_sheet(out / f"{source}.png", strips, sequences, columns=1)
    return [*sheet, *_table(sequences, media, files)]


def _write_text(path: Path, sequences: Sequence[SeenSequence]) -> list[str]:
    lines = [f"[{path.name}]({path.name}) holds these slots, sequence by sequence:", ""]
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        for slot, members in groupby(sequences, key=lambda sequence: sequence.slot):
            place = f"step {slot.step}, slot {slot.slot}"
            for sequence in members:
                file.write(f"===== {place}, sequence {sequence.number}\n{sequence.text}\n")
            lines.append(f"- {place}: {', '.join(map(_name, sequence.rows))}")
    return lines


def _write_sheet(
    path: Path,
    pictures: Sequence[np.ndarray],
    sequences: Sequence[SeenSequence],
    columns: int,
) -> None:
    captions = [f"{i}: {sequence.text}" for i, sequence in enumerate(sequences)]
    contact_sheet(pictures, captions, columns).save(path)


def _table(
    sequences: Sequence[SeenSequence], media: MediaConfig, files: Sequence[str]
) -> list[str]:
    """A line a sequence, numbered as on the contact sheet."""
    lines = ["| | file | step | slot | sequence | row | places | text | stands |", "|" + "---|" * 9]
    for i, (file, sequence) in enumerate(zip(files, sequences, strict=True)):
        first = sequence.symbols[1] == layout_of(media).begin
        cells = (
            i,
            f"[{file}]({file})",
            *(sequence.slot.step, sequence.slot.slot, sequence.number),
            _name(sequence.rows[0]),
            len(_content(sequence, media)),
            " ".join(sequence.text.replace("|", "\\|").split()),
            "after" if first else "before",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _name(row: tuple[str, int] | None) -> str:
    return "a row of another window" if row is None else f"{row[0]} row {row[1]}"


def _content(sequence: SeenSequence, media: MediaConfig) -> np.ndarray:
    """uint8 [P, X]: the places that are used."""
    return sequence.content[: np.count_nonzero(sequence.symbols == layout_of(media).place)]
