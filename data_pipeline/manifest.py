"""The index of a run's shards: what is where, how long it is and what it hashes to.

Made once, by `index.py`, and written into the run folder as JSON; every worker reads it there, so
the plan follows from it alone.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from data_pipeline.format.shard import Columns


class Segment(NamedTuple):
    """Consecutive rows of one group of a shard, on one side of the hold-out border.

    `location` and `length` are the group's (`format.shard.Group`), which starts with row
    `first_row` of the shard; rows row_start .. row_stop - 1 of the group belong to the segment.
    `symbols` counts the bytes of text and code and one END_OF_DOCUMENT a row that is not empty;
    0 for other modalities. `num_bytes` are those to be read. `digest` is over the row ids of text
    and code; over the layout of the whole group for other modalities, whose content no index reads.
    """

    shard: int
    location: int
    length: int
    first_row: int
    row_start: int
    row_stop: int
    symbols: int
    num_bytes: int
    digest: str

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start

    def part(self, start: int, stop: int) -> "Segment":
        """Rows start .. stop - 1, counted within the segment; of a modality that is not bytes."""
        num_bytes = self.num_bytes * (stop - start) // self.rows
        begin = self.row_start + start
        return self._replace(row_start=begin, row_stop=begin + stop - start, num_bytes=num_bytes)


@dataclass(frozen=True)
class SourceManifest:
    """The indexed shards of one source; the held-out rows are the last ones."""

    modality: str
    columns: Columns
    shards: tuple[str, ...]  # absolute paths or URIs
    shard_digests: tuple[str, ...]  # of all rows of each shard; of media, their layout
    train_segments: tuple[Segment, ...]
    eval_segments: tuple[Segment, ...]

    @cached_property
    def rows(self) -> int:
        """Training rows, empty ones included."""
        return sum(segment.rows for segment in self.train_segments)

    @cached_property
    def symbols(self) -> int:
        """Training targets in an epoch, of text and code."""
        return sum(segment.symbols for segment in self.train_segments)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the training rows as they are stored."""
        return sum(segment.num_bytes for segment in self.train_segments)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of content (of media, the layout); the same wherever the shards lie."""
        content = json.dumps([self.modality, self.train_segments, self.eval_segments])
        return hashlib.sha256(content.encode()).hexdigest()


def changes(before: Mapping[str, SourceManifest], now: Mapping[str, SourceManifest]) -> list[str]:
    """What differs between two indices: `text: removed a.parquet`; empty where nothing does.

    Shards are told apart by content: the same ones at another place are the same.
    """
    found = []
    for name in sorted(before | now):
        if name not in now or name not in before:
            found.append(f"{name}: {'removed' if name in before else 'added'} the whole source")
        elif before[name].fingerprint != now[name].fingerprint:
            found += [f"{name}: {change}" for change in _shard_changes(before[name], now[name])]
    return found


def _shard_changes(before: SourceManifest, now: SourceManifest) -> list[str]:
    old, new = _shards_by_content(before), _shards_by_content(now)
    gone = {_base(old[key]): old[key] for key in old if key not in new}
    come = {_base(new[key]): new[key] for key in new if key not in old}
    found = [f"changed {come[base]}" for base in sorted(gone.keys() & come.keys())]
    found += [f"removed {gone[base]}" for base in sorted(gone.keys() - come.keys())]
    found += [f"added {come[base]}" for base in sorted(come.keys() - gone.keys())]
    return found or ["the same shards, in another order or split otherwise"]


def _shards_by_content(manifest: SourceManifest) -> dict[tuple[str, int], str]:
    """Place of each shard by (digest, how many with the same digest came before it)."""
    seen: Counter[str] = Counter()
    places = {}
    for place, digest in zip(manifest.shards, manifest.shard_digests, strict=True):
        places[digest, seen[digest]] = place
        seen[digest] += 1
    return places


def _base(place: str) -> str:
    return place.rpartition("/")[2]


def windows_of_symbols(
    segments: Sequence[Segment], symbols: int
) -> tuple[tuple[Segment, ...], ...]:
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


def windows_of_rows(segments: Sequence[Segment], rows: int) -> tuple[tuple[Segment, ...], ...]:
    """`segments` cut into windows of `rows` rows each; the last one has what is left."""
    windows, window, wanted = [], [], rows
    for segment in segments:
        start = 0
        while start < segment.rows:
            stop = min(segment.rows, start + wanted)
            window.append(segment.part(start, stop))
            wanted -= stop - start
            start = stop
            if not wanted:
                windows.append(window)
                window, wanted = [], rows
    if window:
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
            columns=Columns(*entry["columns"]),
            shards=tuple(entry["shards"]),
            shard_digests=tuple(entry["shard_digests"]),
            train_segments=tuple(Segment(*values) for values in entry["train_segments"]),
            eval_segments=tuple(Segment(*values) for values in entry["eval_segments"]),
        )
        for name, entry in json.loads(text)["sources"].items()
    }
