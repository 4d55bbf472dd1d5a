"""Every row of a shard looked at as a run would: what the processes of `lint.py` do.

A shard is listed once, then checked unit by unit, in any order and in different processes.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from arbitor.errors import UserError
from arbitor.media.picture import picture_size
from arbitor.modality import BYTE_MODALITIES
from data_pipeline.decode.audio import audio_seconds
from data_pipeline.decode.content import ContentError
from data_pipeline.decode.video import video_seconds
from data_pipeline.files import PatientFile, ShardError
from data_pipeline.format.open_shard import PARQUET_SUFFIXES, open_shard
from data_pipeline.format.shard import Columns, Group, MediaRow, MediaShard
from data_pipeline.layout import Layout, MediaConfig, layout_of
from data_pipeline.pack import REASON_LENGTH
from data_pipeline.row_id import row_ids

UNIT_BYTES = 4 << 20
MISSING_FILES = 5  # of a group, that are tried one by one
LENGTHS = {"audio": audio_seconds, "video": video_seconds}


class Shard(NamedTuple):
    """A file of rows, and how its source reads it."""

    source: str
    place: str
    num_bytes: int
    modality: str
    columns: Columns
    media: MediaConfig | None


class Unit(NamedTuple):
    """Some groups of a shard, and the rows of each; 0 where only reading tells."""

    groups: tuple[Group, ...]
    rows: tuple[int, ...]


class Listing(NamedTuple):
    """What stands where in a shard; `problem` says why it cannot be read at all."""

    units: tuple[Unit, ...] = ()
    schema: str = ""
    problem: str = ""
    group_bytes: int = 0  # of text in the largest row group of a Parquet shard


@dataclass
class Findings:
    """Counts over the rows of a unit, which are numbered from 0 here."""

    rows: int = 0
    num_bytes: int = 0  # of content and text, as stored
    positions: int = 0
    seconds: float = 0.0
    empty: int = 0  # rows of text without a byte
    truncated: int = 0  # rows whose caption does not fit
    sizes: Counter[int] = field(default_factory=Counter)  # rows by floor(log2(size))
    hashes: list[np.ndarray] = field(default_factory=list)  # int64 each, of rows' contents
    hashed_rows: list[int] = field(default_factory=list)  # the rows whose hashes these are
    faults: list[tuple[int, str]] = field(default_factory=list)  # (row, reason)

    def add_size(self, size: float) -> None:
        self.sizes[math.floor(math.log2(size))] += 1


def list_shard(shard: Shard) -> Listing:
    """Raises nothing: what is wrong with a shard is its `problem`."""
    try:
        opened = open_shard(shard.place, shard.modality, shard.columns)
        if shard.modality in BYTE_MODALITIES:
            groups = list(opened.groups())
            rows = [0] * len(groups)
        else:
            found = list(opened.media_groups())
            groups, rows = [entry.group for entry in found], [entry.rows for entry in found]
        schema, group_bytes = "", 0
        if shard.place.lower().endswith(PARQUET_SUFFIXES):
            file = pq.ParquetFile(PatientFile(shard.place))
            schema = ", ".join(f"{column.name} {column.type}" for column in file.schema_arrow)
            rows = [file.metadata.row_group(group.location).num_rows for group in groups]
            if shard.modality in BYTE_MODALITIES:
                sizes = (opened.text_bytes(group.location) for group in groups)
                group_bytes = max(sizes, default=0)
    except (UserError, ShardError) as error:
        return Listing(problem=_reason(error, shard))
    count = max(1, min(len(groups), -(-shard.num_bytes // UNIT_BYTES)))
    cuts = [len(groups) * i // count for i in range(count + 1)]
    spans = zip(cuts, cuts[1:], strict=False)
    units = tuple(Unit(tuple(groups[i:j]), tuple(rows[i:j])) for i, j in spans)
    return Listing(units, schema, group_bytes=group_bytes)


def check_unit(shard: Shard, unit: Unit) -> Findings:
    """Reads and decodes all of its rows. Raises nothing for what is wrong with the shard."""
    findings = Findings()
    for group, rows in zip(unit.groups, unit.rows, strict=True):
        begin, hashed = findings.rows, len(findings.hashed_rows)
        try:
            opened = open_shard(shard.place, shard.modality, shard.columns)
            if shard.modality in BYTE_MODALITIES:
                contents = _check_text(opened.rows(group), findings)
            else:
                media_rows = _read_media(opened, group, rows, shard)
                contents = _check_media(media_rows, shard, findings)
            findings.hashes.append(row_ids(contents))
        except (UserError, ShardError) as error:
            reason = _reason(error, shard)
            findings.rows = begin + max(rows, 1)
            del findings.hashed_rows[hashed:]
            findings.faults += [(row, reason) for row in range(begin, findings.rows)]
    return findings


def _read_media(opened: MediaShard, group: Group, rows: int, shard: Shard) -> list[MediaRow]:
    """The rows of a group; a file that a row names and that cannot be read is that row's problem.

    Each is tried for seconds, so after some of them the rest of the group is not read.
    """
    try:
        return opened.read_media(group, 0, rows)[0]
    except ShardError as error:
        if str(error).startswith(f"{shard.place}: "):
            raise
    found: list[MediaRow] = []
    missing = 0
    for row in range(rows):
        if missing == MISSING_FILES:
            problem = f"not looked at, after {missing} rows whose files cannot be read"
            return found + [MediaRow(problem=problem)] * (rows - row)
        try:
            found += opened.read_media(group, row, row + 1)[0]
        except ShardError as error:
            missing += 1
            found.append(MediaRow(problem=str(error)))
    return found


def _check_text(rows: Iterable[bytes | ContentError], findings: Findings) -> Iterator[bytes]:
    """The rows that hold anything, counted as they pass."""
    for row in rows:
        number = findings.rows
        findings.rows += 1
        if isinstance(row, ContentError):
            findings.faults.append((number, str(row)[:REASON_LENGTH]))
            continue
        if not row:
            findings.empty += 1
            continue
        findings.num_bytes += len(row)
        findings.positions += len(row) + 1
        findings.add_size(len(row))
        findings.hashed_rows.append(number)
        yield row


def _check_media(rows: Sequence[MediaRow], shard: Shard, findings: Findings) -> Iterator[bytes]:
    """The contents of the rows that can be decoded, counted as they pass."""
    layout = layout_of(shard.media)
    for row in rows:
        number = findings.rows
        findings.rows += 1
        try:
            if row.problem:
                raise ContentError(row.problem)
            _count_media(row, shard.modality, layout, findings)
        except ContentError as error:
            findings.faults.append((number, str(error)[:REASON_LENGTH]))
            continue
        findings.hashed_rows.append(number)
        yield row.content


def _count_media(row: MediaRow, modality: str, layout: Layout, findings: Findings) -> None:
    symbols, is_cut = layout.symbols(len(layout.decode(row.content)), row.text, 0, 0)
    findings.positions += len(symbols)
    findings.truncated += is_cut
    findings.num_bytes += len(row.content) + len(row.text)
    if modality == "image":
        findings.add_size(min(picture_size(row.content)))
        return
    seconds = LENGTHS[modality](row.content)
    findings.seconds += seconds
    findings.add_size(max(seconds, 2**-6))


def _reason(error: Exception, shard: Shard) -> str:
    return str(error).removeprefix(f"{shard.place}: ")[:REASON_LENGTH]
