"""A window as any process can read it: what stands where, and how its rows become sequences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.format.shard import Columns
from data_pipeline.layout import MediaConfig, layout_of
from data_pipeline.manifest import Segment
from data_pipeline.pack import PackedWindow, pack_media_window, pack_window
from data_pipeline.plan import WindowKey
from data_pipeline.read import read_media_segments, read_segments
from data_pipeline.row_id import join_digests, media_row_ids

# Read, decoded and packed in about 100 ms by one core; of media whichever is reached first.
TEXT_BYTES_PER_COST = 16 << 20
STORED_BYTES_PER_COST = 2 << 20
PACKED_BYTES_PER_COST = {"image": 16 << 20, "audio": 16 << 20, "video": 2 << 20}


@dataclass(frozen=True)
class WindowTask:
    """One window to read: sent to whichever process reads it."""

    key: WindowKey
    modality: str
    columns: Columns
    shards: dict[int, str]  # places of the shards that the segments name
    segments: tuple[Segment, ...]
    batch_size: int
    sequence_length: int
    media: MediaConfig | None  # None for text and code
    seed: int
    shuffle_key: tuple[str | int, ...] | None

    @property
    def digest(self) -> str:
        """Of the rows, as indexed."""
        return join_digests(segment.digest for segment in self.segments)

    @property
    def cost(self) -> float:
        """Estimate of the work, in units of about 100 ms."""
        stored = sum(segment.num_bytes for segment in self.segments)
        if self.media is None:
            return stored / TEXT_BYTES_PER_COST
        packed = self.packed_bytes / PACKED_BYTES_PER_COST[self.modality]
        return max(stored / STORED_BYTES_PER_COST, packed)

    @property
    def packed_bytes(self) -> int:
        """Of symbols or content, whichever are many."""
        if self.media is None:
            return sum(segment.symbols for segment in self.segments) * np.uint16().itemsize
        layout = layout_of(self.media)
        return sum(segment.rows for segment in self.segments) * layout.places * layout.place_bytes

    def row_places(self) -> dict[int, tuple[str, int]]:
        """Shard and number of each row by its id, as the index counts rows. Reads the rows."""
        if self.media is None:
            _, ids, _ = read_segments(self.shards, self.columns, self.segments)
        else:
            rows, _ = read_media_segments(self.shards, self.modality, self.columns, self.segments)
            ids = media_row_ids(rows)
        return dict(zip(ids.tolist(), _places(self.shards, self.segments), strict=True))

    def read(self) -> tuple[PackedWindow, str]:
        """The window, and the digest of the rows that were really read.

        Raises ShardError where they cannot be read as they were indexed.
        """
        if self.media is None:
            rows, ids, digest = read_segments(self.shards, self.columns, self.segments)
            window = pack_window(rows, ids, self.batch_size, self.sequence_length, self.shuffle_key)
            return window, digest
        rows, digest = read_media_segments(self.shards, self.modality, self.columns, self.segments)
        layout = layout_of(self.media)
        places = list(_places(self.shards, self.segments))
        window = pack_media_window(
            rows, places, layout, self.batch_size, self.seed, self.shuffle_key
        )
        return window, digest


def _places(shards: dict[int, str], segments: Sequence[Segment]) -> Iterator[tuple[str, int]]:
    """The shard of each row and its number in it."""
    for segment in segments:
        for row in range(segment.row_start, segment.row_stop):
            yield shards[segment.shard], segment.first_row + row
