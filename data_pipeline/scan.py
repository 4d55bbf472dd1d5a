"""One shard's part of the index: its groups as segments, kept in a cache from run to run."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from arbitor.errors import UserError
from arbitor.modality import BYTE_MODALITIES
from data_pipeline.files import FoundFile, ShardError, first_line
from data_pipeline.format import jsonl, plain_text, shard, webdataset
from data_pipeline.format.open_shard import open_shard
from data_pipeline.format.shard import Columns, Group
from data_pipeline.manifest import Segment
from data_pipeline.row_id import digest_of, row_ids

VERSION = 2  # of what stands in the cache; raise it with any change of groups or digests
SEGMENT_SYMBOLS = 16 << 20  # a larger group of text is cut, so that a window fits in memory


def cached_scan(file: FoundFile, modality: str, columns: Columns, cache: Path) -> list[Segment]:
    """The segments of a shard, all as of shard number 0; from `cache` where it is not changed.

    An entry that cannot be parsed, after a crash of the machine, is written again.

    Raises UserError naming the file.
    """
    sizes = (jsonl.GROUP_BYTES, plain_text.GROUP_BYTES, webdataset.GROUP_BYTES, shard.ROW_BYTES)
    kind = "text" if modality in BYTE_MODALITIES else modality
    key = json.dumps([VERSION, *file, kind, *columns, SEGMENT_SYMBOLS, *sizes])
    path = cache / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".json")
    with storage_errors(cache), suppress(FileNotFoundError, ValueError, TypeError):
        return [Segment(*values) for values in json.loads(path.read_text())]
    try:
        segments = scan(file.place, modality, columns)
    except ShardError as error:
        raise UserError(str(error)) from error
    partial = path.with_suffix(f".{os.getpid()}")
    with storage_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(segments))
        partial.replace(path)
    return segments


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """A folder that is not there to be written to is a mistake in the configuration."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"storage: {folder} cannot be written ({first_line(error)}); name another folder"
        ) from error


def scan(place: str, modality: str, columns: Columns) -> list[Segment]:
    """Reads text and code whole; of the other modalities only where the rows lie."""
    opened = open_shard(place, modality, columns)
    segments: list[Segment] = []
    first_row = 0
    if modality in BYTE_MODALITIES:
        for group in opened.groups():
            rows = opened.read(group)
            for start, stop in _row_ranges(rows):
                segments.append(text_segment(group, first_row, rows, start, stop))
            first_row += len(rows)
        return segments
    for group, count, num_bytes, digest in opened.media_groups():
        if count:
            segments.append(Segment(0, *group, first_row, 0, count, 0, num_bytes, digest))
        first_row += count
    return segments


def text_segment(group: Group, first_row: int, rows: list[bytes], start: int, stop: int) -> Segment:
    """Rows start .. stop - 1 of a group's `rows`, in shard number 0."""
    part = rows[start:stop]
    num_bytes = sum(map(len, part))
    symbols = num_bytes + sum(1 for row in part if row)
    digest = digest_of(row_ids(part))
    return Segment(0, *group, first_row, start, stop, symbols, num_bytes, digest)


def _row_ranges(rows: list[bytes]) -> Iterator[tuple[int, int]]:
    """Ranges of whole rows of at most SEGMENT_SYMBOLS symbols, or of one row."""
    start, filled = 0, 0
    for i, row in enumerate(rows):
        if i > start and filled + len(row) + 1 > SEGMENT_SYMBOLS:
            yield start, i
            start, filled = i, 0
        filled += len(row) + 1
    if rows:
        yield start, len(rows)
