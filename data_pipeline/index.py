"""The index pass: finds the shards of every active source and writes down the manifest.

Runs in the driver, before anything starts, so that each mistake in a path or a file is told at
once. Text and code are read whole, by threads (reading and hashing leave the interpreter free); of
the other modalities only where the rows lie. What is known of a shard is cached beside the runs,
shard by shard: an index pass that was cut off goes on, and a shard that did not change is not read.
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from arbitor.errors import UserError
from arbitor.modality import BYTE_MODALITIES
from data_pipeline.files import FoundFile, ShardError, find_files
from data_pipeline.format.open_shard import ROW_SUFFIXES, check_name, open_shard
from data_pipeline.format.shard import Group
from data_pipeline.manifest import Segment, SourceManifest
from data_pipeline.progress import Progress
from data_pipeline.row_id import join_digests
from data_pipeline.sample import SAMPLE_PREFIX, ensure_sample
from data_pipeline.scan import cached_scan, storage_errors, text_segment
from data_pipeline.schema import DataConfig, SourceConfig

NUM_THREADS = max(4, os.cpu_count() or 1)  # each may hold one group in memory
NAMES_TOLD = 3  # of the files that are left out


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
    """The shards of a source, as `choose_shards` takes them from what is there."""
    path = source.path
    if path.startswith(SAMPLE_PREFIX):
        with storage_errors(storage):
            path = str(ensure_sample(path.removeprefix(SAMPLE_PREFIX), storage / "samples"))
    return choose_shards(f"{key}.path", path, source.modality, find_files(f"{key}.path", path))


def choose_shards(key: str, path: str, modality: str, found: list[FoundFile]) -> list[FoundFile]:
    """Of a folder or glob with files of rows (Parquet, JSONL, tar), only those: what is beside them
    describes them. But code in plain text is read where it has more bytes than the rows have.
    """
    for file in found:
        check_name(file.place)
    if len(found) == 1:
        return found
    is_rows = [file.place.lower().endswith(ROW_SUFFIXES) for file in found]
    plain = [file for file, rows in zip(found, is_rows, strict=True) if not rows]
    shared = os.path.commonprefix([file.place for file in found]).rpartition("/")[0]
    chosen = [
        file
        for file, rows in zip(found, is_rows, strict=True)
        if rows
        and "/_" not in file.place[len(shared) :]  # what Spark and Delta keep for themselves
    ]
    if modality == "code" and sum(f.size for f in plain) > sum(f.size for f in chosen):
        chosen = plain
    elif modality in BYTE_MODALITIES:
        chosen = chosen or plain
    if not chosen:
        raise UserError(
            f"{key}: no shards of {modality} in {path}; put {', '.join(ROW_SUFFIXES)} files there"
        )
    if modality in BYTE_MODALITIES and len(chosen) < len(found):
        _tell_left_out(key, len(shared) + 1, found, chosen)
    return chosen


def _tell_left_out(key: str, begin: int, found: list[FoundFile], chosen: list[FoundFile]) -> None:
    taken = {file.place for file in chosen}
    names = [file.place[begin:] for file in found if file.place not in taken]
    others = ", ..." if len(names) > NAMES_TOLD else ""
    print(
        f"{key}: {len(names):,} of {len(found):,} files are left out"
        f" ({', '.join(names[:NAMES_TOLD])}{others}); a folder is read either as rows (Parquet,"
        " JSONL, tar) or as plain text, and a glob can name others",
        file=sys.stderr,
        flush=True,
    )


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
    """The segments of each file, in order."""
    with (
        Progress(f"indexing {key}", sum(file.size for file in files)) as progress,
        ThreadPoolExecutor(NUM_THREADS) as pool,
    ):
        scans = [
            pool.submit(cached_scan, file, source.modality, source.columns, cache) for file in files
        ]
        try:
            for file, scan in zip(files, scans, strict=True):
                segments = scan.result()
                yield segments
                progress.advance(file.size, sum(segment.rows for segment in segments))
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
    group = Group(segment.location, segment.length)
    try:
        rows = open_shard(shard, source.modality, source.columns).read(group)
    except ShardError as error:
        raise UserError(str(error)) from error
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
