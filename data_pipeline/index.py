"""The index pass: reads every row of every active source once and writes down the manifest.

Runs in the driver, before anything starts, so that each mistake in a path or a file is told at
once; threads, because reading and hashing leave the interpreter free.
"""

import glob
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from arbitor.errors import UserError
from data_pipeline.decode.text import Group, open_shard
from data_pipeline.manifest import Segment, SourceManifest
from data_pipeline.row_id import digest_of, row_ids
from data_pipeline.sample import SAMPLE_PREFIX, ensure_sample
from data_pipeline.schema import DataConfig, SourceConfig

NUM_THREADS = 4  # each may hold one group in memory
SEGMENT_SYMBOLS = 16 << 20  # a larger group is cut, so that a window fits in memory


def index_sources(config: DataConfig, sample_folder: Path) -> dict[str, SourceManifest]:
    """The manifest of each active source; `sample_folder` caches the sample:// shards.

    Raises UserError naming the source's key or the file.
    """
    return {
        name: _index_source(f"data.sources.{name}", source, config.eval_fraction, sample_folder)
        for name, source in config.active_sources.items()
    }


def _index_source(
    key: str, source: SourceConfig, eval_fraction: float, sample_folder: Path
) -> SourceManifest:
    path = source.path
    if path.startswith(SAMPLE_PREFIX):
        path = str(ensure_sample(path.removeprefix(SAMPLE_PREFIX), sample_folder))
    shards = find_shards(f"{key}.path", path)
    column = source.text_column
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        indexed = pool.map(lambda job: _index_shard(*job, column), enumerate(shards))
        segments = [segment for part in indexed for segment in part]
    rows = sum(segment.rows for segment in segments)
    held_out = _num_held_out(key, rows, eval_fraction)
    train, evaluation = _split(segments, rows - held_out, shards, column)
    if not sum(segment.symbols for segment in train):
        raise UserError(f"{key}.path: all training rows of {path} are empty; give it some text")
    if evaluation and not sum(segment.symbols for segment in evaluation):
        raise UserError(
            f"{key}.path: the last {held_out} rows of {path}, held out for evaluation, are empty; "
            f"set another data.eval_fraction, or 0"
        )
    return SourceManifest(source.modality, column, tuple(shards), tuple(train), tuple(evaluation))


def find_shards(key: str, path: str) -> list[str]:
    """Absolute paths of the files that `path` means, sorted; hidden and 0-byte files are skipped.

    Raises UserError naming `key` where nothing is left.
    """
    place = Path(path).expanduser()
    if place.is_file():
        if place.stat().st_size == 0:
            raise UserError(f"{key}: the file {path} is empty; give one with rows")
        return [str(place.absolute())]
    if place.is_dir():
        found = [file for file in place.rglob("*") if not _is_hidden(file.relative_to(place))]
        problem = f"no shards in folder {path}; put Parquet, JSONL or text files there"
    elif glob.has_magic(path):
        found = [Path(file) for file in glob.glob(str(place), recursive=True)]
        problem = f"no file matches {path}; mend the pattern"
    else:
        raise UserError(f"{key}: {path} does not exist; give a file, a folder or a glob")
    shards = sorted(
        str(file.absolute()) for file in found if file.is_file() and file.stat().st_size
    )
    if not shards:
        raise UserError(f"{key}: {problem}")
    return shards


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _index_shard(number: int, path: str, text_column: str) -> list[Segment]:
    segments = []
    try:
        shard = open_shard(path, text_column)
        for group in shard.groups():
            rows = shard.read(group)
            for start, stop in _row_ranges(rows):
                segments.append(_segment(number, group, rows, start, stop))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend it") from error
    return segments


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


def _segment(shard: int, group: Group, rows: list[bytes], start: int, stop: int) -> Segment:
    part = rows[start:stop]
    symbols = sum(len(row) + 1 for row in part if row)
    return Segment(shard, *group, start, stop, symbols, digest_of(row_ids(part)))


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
    segments: list[Segment], num_train: int, shards: list[str], text_column: str
) -> tuple[list[Segment], list[Segment]]:
    """The first `num_train` rows and the rest; a segment across the border is read again."""
    train, evaluation, seen = [], [], 0
    for segment in segments:
        border = num_train - seen
        seen += segment.rows
        if border >= segment.rows:
            train.append(segment)
        elif border <= 0:
            evaluation.append(segment)
        else:
            group = Group(segment.location, segment.length)
            rows = open_shard(shards[segment.shard], text_column).read(group)
            middle = segment.row_start + border
            train.append(_segment(segment.shard, group, rows, segment.row_start, middle))
            evaluation.append(_segment(segment.shard, group, rows, middle, segment.row_stop))
    return train, evaluation
