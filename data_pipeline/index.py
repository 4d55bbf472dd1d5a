"""The index pass: finds the shards of every active source and writes down the manifest.

Runs in the driver, before anything starts, so that each mistake in a path or a file is told at
once. Text and code are read whole, by threads (reading and hashing leave the interpreter free); of
the other modalities only where the rows lie. What is known of a shard is cached beside the runs,
shard by shard: an index pass that was cut off goes on, and a shard that did not change is not read.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from arbitor.errors import UserError
from arbitor.modality import BYTE_MODALITIES
from data_pipeline.files import FoundFile, find_files
from data_pipeline.format.open_shard import MEDIA_SUFFIXES, open_shard
from data_pipeline.format.shard import Columns, Group
from data_pipeline.manifest import Segment, SourceManifest
from data_pipeline.row_id import join_digests
from data_pipeline.sample import SAMPLE_PREFIX, ensure_sample
from data_pipeline.scan import cached_scan, text_segment
from data_pipeline.schema import DataConfig, SourceConfig

NUM_THREADS = max(4, os.cpu_count() or 1)  # each may hold one group in memory
PROGRESS_SECONDS = 5.0  # a longer pass says how far it is


def index_sources(config: DataConfig, storage: Path) -> dict[str, SourceManifest]:
    """The manifest of each active source.

    `storage` is where runs stand: `samples` in it holds the sample:// shards, `index` the cache.
    Raises UserError naming the source's key or the file.
    """
    return {
        name: _index_source(f"data.sources.{name}", source, config.eval_fraction, storage)
        for name, source in config.active_sources.items()
    }


def find_shards(key: str, source: SourceConfig, storage: Path) -> list[FoundFile]:
    """The shards of a source; of a folder or glob of media, only the files that hold rows."""
    path = source.path
    if path.startswith(SAMPLE_PREFIX):
        path = str(ensure_sample(path.removeprefix(SAMPLE_PREFIX), storage / "samples"))
    found = find_files(f"{key}.path", path)
    if source.modality in BYTE_MODALITIES or len(found) == 1:
        return found
    shards = [file for file in found if file.place.lower().endswith(MEDIA_SUFFIXES)]
    if not shards:
        raise UserError(
            f"{key}.path: no shards of {source.modality} in {path}; put"
            f" {', '.join(MEDIA_SUFFIXES)} files there"
        )
    return shards


def _index_source(
    key: str, source: SourceConfig, eval_fraction: float, storage: Path
) -> SourceManifest:
    files = find_shards(key, source, storage)
    shards = tuple(file.place for file in files)
    segments, digests = [], []
    for number, found in enumerate(_scan_all(key, files, source, storage / "index")):
        digests.append(join_digests(segment.digest for segment in found))
        segments += [segment._replace(shard=number) for segment in found]
    rows = sum(segment.rows for segment in segments)
    held_out = _num_held_out(key, rows, eval_fraction)
    train, evaluation = _split(segments, rows - held_out, shards, source)
    if source.modality in BYTE_MODALITIES:
        _check_not_empty(key, source.path, train, evaluation, held_out)
    return SourceManifest(
        source.modality, source.columns, shards, tuple(digests), tuple(train), tuple(evaluation)
    )


def _scan_all(
    key: str, files: list[FoundFile], source: SourceConfig, cache: Path
) -> Iterator[list[Segment]]:
    """The segments of each file, in order; tells how far it is where that takes long."""
    total, seen, started = sum(file.size for file in files), 0, time.monotonic()
    said = started
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        scans = [
            pool.submit(cached_scan, file, source.modality, source.columns, cache) for file in files
        ]
        try:
            for number, (file, scan) in enumerate(zip(files, scans, strict=True), 1):
                yield scan.result()
                seen += file.size
                now = time.monotonic()
                if now - said > PROGRESS_SECONDS:
                    said, left = now, (total - seen) / seen * (now - started)
                    print(
                        f"indexing {key}: {number:,} of {len(files):,} shards,"
                        f" {seen / 1e9:.1f} of {total / 1e9:.1f} GB, {left:.0f} s left",
                        flush=True,
                    )
        finally:
            pool.shutdown(cancel_futures=True)


def _num_held_out(key: str, rows: int, eval_fraction: float) -> int:
    if rows == 0:
        raise UserError(f"{key}.path: no rows in its shards; give one with rows")
    if eval_fraction == 0:
        return 0
    held_out = -(-rows * Fraction(str(eval_fraction)) // 1)
    if rows == 1:
        raise UserError(
            f"{key}.path: 1 row is too few to hold one out; give more rows or set "
            f"data.eval_fraction=0"
        )
    return min(int(held_out), rows - 1)


def _split(
    segments: list[Segment], num_train: int, shards: tuple[str, ...], source: SourceConfig
) -> tuple[list[Segment], list[Segment]]:
    """The first `num_train` rows and the rest."""
    train, evaluation, seen = [], [], 0
    for segment in segments:
        border = num_train - seen
        seen += segment.rows
        if border >= segment.rows:
            train.append(segment)
        elif border <= 0:
            evaluation.append(segment)
        else:
            before, after = _cut(segment, border, shards[segment.shard], source)
            train.append(before)
            evaluation.append(after)
    return train, evaluation


def _cut(
    segment: Segment, border: int, shard: str, source: SourceConfig
) -> tuple[Segment, Segment]:
    """The segment's first `border` rows and its others; text is read again to be counted."""
    if source.modality not in BYTE_MODALITIES:
        return segment.part(0, border), segment.part(border, segment.rows)
    columns = Columns(*source.columns)
    group = Group(segment.location, segment.length)
    rows = open_shard(shard, source.modality, columns).read(group)
    middle = segment.row_start + border
    ranges = ((segment.row_start, middle), (middle, segment.row_stop))
    before, after = (text_segment(group, segment.first_row, rows, *part) for part in ranges)
    return before._replace(shard=segment.shard), after._replace(shard=segment.shard)


def _check_not_empty(
    key: str, path: str, train: list[Segment], evaluation: list[Segment], held_out: int
) -> None:
    if not sum(segment.symbols for segment in train):
        raise UserError(f"{key}.path: all training rows of {path} are empty; give it some text")
    if evaluation and not sum(segment.symbols for segment in evaluation):
        raise UserError(
            f"{key}.path: the last {held_out} rows of {path}, held out for evaluation, are empty; "
            f"set another data.eval_fraction, or 0"
        )
