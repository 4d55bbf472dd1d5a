"""The index of a run's shards: what is where, how long it is and what it hashes to.

Made once, by `index.py`, and written into the run folder as JSON; every worker reads it there, so
the plan follows from it alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple


class Segment(NamedTuple):
    """Consecutive rows of one group of a shard, on one side of the hold-out border.

    `location` and `length` are the group's (`decode.text.Group`); rows row_start .. row_stop - 1
    of it belong to the segment. `symbols` counts their bytes and one END_OF_DOCUMENT a row that is
    not empty; `digest` is over their row ids.
    """

    shard: int
    location: int
    length: int
    row_start: int
    row_stop: int
    symbols: int
    digest: str

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start


@dataclass(frozen=True)
class SourceManifest:
    """The indexed shards of one source; the held-out rows are the last ones."""

    modality: str
    text_column: str
    shards: tuple[str, ...]  # paths
    train_segments: tuple[Segment, ...]
    eval_segments: tuple[Segment, ...]

    @cached_property
    def rows(self) -> int:
        """Training rows, empty ones included."""
        return sum(segment.rows for segment in self.train_segments)

    @cached_property
    def symbols(self) -> int:
        """Training targets in an epoch."""
        return sum(segment.symbols for segment in self.train_segments)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of content and layout; the same wherever the shards lie."""
        content = json.dumps([self.modality, self.train_segments, self.eval_segments])
        return hashlib.sha256(content.encode()).hexdigest()


def window_segments(segments: Sequence[Segment], symbols: int) -> tuple[tuple[Segment, ...], ...]:
    """`segments` cut into windows: runs of segments with at least `symbols` symbols each.

    A rest below half of that joins the window before it; only a sole window may be smaller.
    """
    windows, window, filled = [], [], 0
    for segment in segments:
        window.append(segment)
        filled += segment.symbols
        if filled >= symbols:
            windows.append(window)
            window, filled = [], 0
    if windows and 2 * filled < symbols:
        windows[-1] += window
    elif window:
        windows.append(window)
    return tuple(map(tuple, windows))


def manifests_to_json(manifests: Mapping[str, SourceManifest]) -> str:
    """The text of `manifest.json`."""
    sources = {
        name: {field.name: getattr(manifest, field.name) for field in fields(manifest)}
        for name, manifest in manifests.items()
    }
    return json.dumps({"sources": sources})


def manifests_from_json(text: str) -> dict[str, SourceManifest]:
    """Inverse of `manifests_to_json`."""
    return {
        name: SourceManifest(
            modality=entry["modality"],
            text_column=entry["text_column"],
            shards=tuple(entry["shards"]),
            train_segments=tuple(Segment(*values) for values in entry["train_segments"]),
            eval_segments=tuple(Segment(*values) for values in entry["eval_segments"]),
        )
        for name, entry in json.loads(text)["sources"].items()
    }
