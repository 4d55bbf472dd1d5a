"""Reading indexed rows again, and only as they were indexed.

A shard that changed stops the run, as a fault of the disk or the network does (`files.py`):
neither may ever change the data.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from arbitor.errors import UserError
from data_pipeline.files import ShardError
from data_pipeline.format.open_shard import open_shard
from data_pipeline.format.shard import Columns, Group, MediaRow, MediaShard, TextShard
from data_pipeline.manifest import Segment
from data_pipeline.row_id import digest_of, join_digests, row_ids


def read_segments(
    shards: Mapping[int, str], columns: Columns, segments: Sequence[Segment]
) -> tuple[list[bytes], np.ndarray, str]:
    """The rows of text or code of `segments` in order, their ids, and the digest of what was read.

    Raises ShardError naming the file whose rows are not those that were indexed.
    """
    rows: list[bytes] = []
    ids = [np.empty(0, np.int64)]
    digests: list[str] = []
    shard, group_rows = _Shards(shards, "text", columns), {}
    for segment in segments:
        place = (segment.shard, segment.location)
        if place not in group_rows:
            with _as_indexed():
                group = Group(segment.location, segment.length)
                group_rows = {place: shard[segment.shard].read(group)}
        part = group_rows[place][segment.row_start : segment.row_stop]
        ids.append(row_ids(part))
        digests.append(digest_of(ids[-1]))
        _check(shards[segment.shard], digests[-1], segment)
        rows += part
    return rows, np.concatenate(ids), join_digests(digests)


def read_media_segments(
    shards: Mapping[int, str], modality: str, columns: Columns, segments: Sequence[Segment]
) -> tuple[list[MediaRow], str]:
    """The encoded rows of `segments` in order, and the digest of their groups' layout.

    Raises ShardError naming the file whose layout is not the one that was indexed.
    """
    rows: list[MediaRow] = []
    digests: list[str] = []
    shard = _Shards(shards, modality, columns)
    for segment in segments:
        group = Group(segment.location, segment.length)
        with _as_indexed():
            part, digest = shard[segment.shard].read_media(
                group, segment.row_start, segment.row_stop
            )
        _check(shards[segment.shard], digest, segment)
        digests.append(digest)
        rows += part
    return rows, join_digests(digests)


class _Shards(dict):
    """Opened shards by number; each is opened once."""

    def __init__(self, places: Mapping[int, str], modality: str, columns: Columns):
        self._places, self._arguments = places, (modality, columns)

    def __missing__(self, number: int) -> TextShard | MediaShard:
        self[number] = open_shard(self._places[number], *self._arguments)
        return self[number]


@contextmanager
def _as_indexed() -> Iterator[None]:
    """What the index could read and is a mistake of the user's now has changed since."""
    try:
        yield
    except UserError as error:
        message = f"{error}; it was readable when indexed: restore it or start a new run"
        raise ShardError(message) from error


def _check(place: str, digest: str, segment: Segment) -> None:
    if digest != segment.digest:
        raise ShardError(f"{place}: changed since it was indexed; restore it or start a new run")
