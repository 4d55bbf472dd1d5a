"""Rows of text and code as bytes, read group by group from Parquet, JSONL and plain text.

A group is the smallest part of a shard that is read: a row group of a Parquet file, or a byte
range of the others, found once by `groups` and read later by seeking. Plain text is cut into rows
at line ends. Null and empty rows are rows of no bytes.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from arbitor.errors import UserError

GROUP_BYTES = 256 << 10
PARQUET_SUFFIXES = (".parquet", ".pq")
JSONL_SUFFIXES = (".jsonl", ".ndjson")


class Group(NamedTuple):
    """`location`: byte offset, or number of the Parquet row group (then `length` is 0)."""

    location: int
    length: int


class TextShard(Protocol):
    """A shard opened for reading; UserError names the file and what is wrong with it."""

    def groups(self) -> Iterator[Group]: ...

    def read(self, group: Group) -> list[bytes]: ...


def open_shard(path: str, text_column: str) -> TextShard:
    """The reader that fits the file's suffix."""
    suffix = Path(path).suffix.lower()
    if suffix in PARQUET_SUFFIXES:
        return ParquetShard(path, text_column)
    if suffix in JSONL_SUFFIXES:
        return JsonlShard(path, text_column)
    return PlainTextShard(path)


class ParquetShard:
    """Column `text_column`, of strings."""

    def __init__(self, path: str, text_column: str):
        self._path, self._text_column = path, text_column
        with _parquet_errors(f"{path}: not a readable Parquet file"):
            self._file = pq.ParquetFile(path)
        schema = self._file.schema_arrow
        if text_column not in schema.names:
            raise UserError(
                f"{path}: no column {text_column!r}; it has {', '.join(schema.names)}; "
                f"set text_column to one of them"
            )
        kind = schema.field(text_column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(
                f"{path}: column {text_column!r} has type {kind}, expected string; "
                f"convert it or set text_column to another"
            )

    def groups(self) -> Iterator[Group]:
        return (Group(number, 0) for number in range(self._file.num_row_groups))

    def read(self, group: Group) -> list[bytes]:
        columns = [self._text_column]
        with _parquet_errors(f"{self._path}: row group {group.location} is corrupt"):
            table = self._file.read_row_group(group.location, columns, use_threads=False)
        column = table.column(0).cast(pa.large_binary())
        return pc.fill_null(column, b"").to_pylist()


@contextmanager
def _parquet_errors(problem: str) -> Iterator[None]:
    """Content that Parquet cannot read becomes a UserError; an error of the system stays."""
    try:
        yield
    except (pa.ArrowInvalid, OSError, IndexError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{problem} ({_line(error)}); write the file again") from error


class JsonlShard:
    """One JSON object a line, its key `text_column` a string or null; blank lines are no rows."""

    def __init__(self, path: str, text_column: str):
        self._path, self._text_column = path, text_column

    def groups(self) -> Iterator[Group]:
        with open(self._path, "rb") as file:
            start = 0
            while file.read(GROUP_BYTES):
                file.readline()
                yield Group(start, file.tell() - start)
                start = file.tell()

    def read(self, group: Group) -> list[bytes]:
        lines = _read_bytes(self._path, group).split(b"\n")
        return [self._row(group, i, line) for i, line in enumerate(lines) if line.strip()]

    def _row(self, group: Group, line_in_group: int, line: bytes) -> bytes:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise self._error(group, line_in_group, f"not valid JSON ({_line(error)})") from error
        if not isinstance(row, dict) or self._text_column not in row:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            problem = f"no key {self._text_column!r}, found {found}; set text_column"
            raise self._error(group, line_in_group, problem)
        text = row[self._text_column]
        if not isinstance(text, str | None):
            problem = f"{self._text_column!r} is {type(text).__name__}, expected a string"
            raise self._error(group, line_in_group, problem)
        return (text or "").encode("utf-8", "surrogatepass")  # JSON may escape half a surrogate

    def _error(self, group: Group, line_in_group: int, problem: str) -> UserError:
        before = _read_bytes(self._path, Group(0, group.location)).count(b"\n")
        return UserError(f"{self._path}:{before + line_in_group + 1}: {problem}")


class PlainTextShard:
    """Rows of whole lines, at most 64 KiB and about 1/64 of the file; a longer line is cut."""

    def __init__(self, path: str):
        self._path = path
        size = Path(path).stat().st_size
        self._row_bytes = min(64 << 10, max(1 << 10, size // 64))

    def groups(self) -> Iterator[Group]:
        with open(self._path, "rb") as file:
            start = 0
            while data := file.read(GROUP_BYTES + self._row_bytes):
                ends = self._row_ends(data)
                if len(data) == GROUP_BYTES + self._row_bytes:
                    ends.pop()  # the last row may go on
                yield Group(start, ends[-1])
                start += ends[-1]
                file.seek(start)

    def read(self, group: Group) -> list[bytes]:
        data = _read_bytes(self._path, group)
        ends = self._row_ends(data)
        return [data[i:j] for i, j in zip([0, *ends], ends, strict=False)]

    def _row_ends(self, data: bytes) -> list[int]:
        ends = [0]
        while len(data) - ends[-1] > self._row_bytes:
            limit = ends[-1] + self._row_bytes
            line_end = data.rfind(b"\n", ends[-1], limit) + 1
            ends.append(line_end or limit)
        return ends[1:] + [len(data)]


def _read_bytes(path: str, group: Group) -> bytes:
    with open(path, "rb") as file:
        file.seek(group.location)
        return file.read(group.length)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
