"""Parquet shards: text columns, and the Hugging Face layouts of images, sound and video.

A media column is struct<bytes, path> or binary; where `bytes` is null, `path` is a file beside the
shard. A `sampling_rate` is not needed: the encoded sound says it.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from arbitor.errors import UserError
from data_pipeline.decode.content import ContentError
from data_pipeline.files import PatientFile, first_line
from data_pipeline.format.shard import (
    QUOTED,
    Columns,
    Group,
    MediaGroup,
    MediaRow,
    content_beside,
    cut_long,
)

BATCH_ROWS = 64
GROUP_BYTES = 1 << 30  # of the column that is read, in a row group, at most


class ParquetShard:
    def __init__(self, place: str, columns: Columns):
        self._place, self._columns = place, columns
        with _content_errors(f"{place}: not a readable Parquet file"):
            self._file = pq.ParquetFile(PatientFile(place))
        self._schema = self._file.schema_arrow

    def groups(self) -> Iterator[Group]:
        self._check_text(required=True)
        for number in range(self._file.num_row_groups):
            self._check_size(number, self.text_bytes(number))
            yield Group(number, 0)

    def text_bytes(self, number: int) -> int:
        """Of the text column in a row group, before compression."""
        return self._describe(number, self._columns.text)[1]

    def read(self, group: Group) -> list[bytes]:
        return cut_long(self.rows(group))

    def rows(self, group: Group) -> list[bytes]:
        with _content_errors(f"{self._place}: row group {group.location} is corrupt"):
            table = self._file.read_row_group(
                group.location, [self._columns.text], use_threads=False
            )
        column = table.column(0).cast(pa.large_binary())
        return pc.fill_null(column, b"").to_pylist()

    def media_groups(self) -> Iterator[MediaGroup]:
        self._check_content()
        self._check_text(required=self._columns.text != "text")
        for number in range(self._file.num_row_groups):
            rows, num_bytes, digest = self._describe(number, self._columns.content)
            self._check_size(number, num_bytes)
            yield MediaGroup(Group(number, 0), rows, num_bytes, digest)

    def read_media(self, group: Group, start: int, stop: int) -> tuple[list[MediaRow], str]:
        if group.location >= self._file.num_row_groups:
            return [], "no such row group"
        names = [name for name in self._columns if name in self._schema.names]
        rows: list[MediaRow] = []
        seen = 0
        try:
            for batch in self._file.iter_batches(
                BATCH_ROWS, row_groups=[group.location], columns=names, use_threads=False
            ):
                first, last = max(start - seen, 0), min(stop - seen, len(batch))
                if first < last:
                    rows += self._media_rows(batch.slice(first, last - first))
                seen += len(batch)
                if seen >= stop:
                    break
        except (pa.ArrowException, OSError, IndexError) as error:
            problem = f"row group {group.location} is corrupt ({first_line(error)})"
            rows += [MediaRow(problem=problem)] * (stop - start - len(rows))
        return rows, self._describe(group.location, self._columns.content)[2]

    def _media_rows(self, batch: pa.RecordBatch) -> list[MediaRow]:
        contents, paths = self._contents(batch.column(self._columns.content))
        texts = [None] * len(batch)
        if self._columns.text in batch.schema.names:
            texts = batch.column(self._columns.text).cast(pa.large_binary()).to_pylist()
        rows = []
        for content, path, text in zip(contents, paths, texts, strict=True):
            try:
                if content is None and path is not None:
                    content = self._content_at(path)
                if content is None:
                    raise ContentError(f"{self._columns.content} is null")
            except ContentError as error:
                rows.append(MediaRow(problem=str(error)))
            else:
                rows.append(MediaRow(content, text or b""))
        return rows

    def _content_at(self, path: bytes) -> bytes:
        try:
            name = path.decode()
        except UnicodeDecodeError as error:
            raise ContentError(f"its path {path[:QUOTED]!r} is not UTF-8") from error
        return content_beside(self._place, name)

    def _contents(self, column: pa.Array) -> tuple[list, list]:
        """Contents, and paths as they are stored: beside content they may hold anything."""
        nothing = [None] * len(column)
        if not pa.types.is_struct(column.type):
            return column.to_pylist(), nothing
        fields = dict(zip((f.name for f in column.type), column.flatten(), strict=True))
        paths = nothing
        if "path" in fields:
            paths = fields["path"].cast(pa.large_binary()).to_pylist()
        return (fields["bytes"].to_pylist() if "bytes" in fields else nothing), paths

    def _describe(self, number: int, name: str) -> tuple[int, int, str]:
        """Rows, bytes of the column `name`, and a digest of the layout of a row group."""
        row_group = self._file.metadata.row_group(number)
        layout, num_bytes = [], 0
        for i in range(row_group.num_columns):
            chunk = row_group.column(i)
            sizes = (chunk.total_compressed_size, chunk.total_uncompressed_size)
            layout.append([chunk.path_in_schema, chunk.num_values, *sizes, chunk.data_page_offset])
            if chunk.path_in_schema.split(".")[0] == name:
                num_bytes += chunk.total_uncompressed_size
        content = json.dumps([row_group.num_rows, layout]).encode()
        return row_group.num_rows, num_bytes, hashlib.blake2b(content, digest_size=16).hexdigest()

    def _check_size(self, number: int, num_bytes: int) -> None:
        if num_bytes > GROUP_BYTES:
            raise UserError(
                f"{self._place}: row group {number} has {num_bytes / 1e9:.1f} GB and can only"
                f" be read whole; write them with about 100 MB each (row_group_size)"
            )

    def _check_text(self, required: bool) -> None:
        name = self._columns.text
        if name not in self._schema.names:
            if required:
                raise UserError(
                    f"{self._place}: no column {name!r}; it has {', '.join(self._schema.names)}; "
                    f"set text_column to one of them"
                )
            return
        kind = self._schema.field(name).type
        if not _is_string(kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise UserError(
                f"{self._place}: column {name!r} has type {kind}, expected string; "
                f"convert it or set text_column to another"
            )

    def _check_content(self) -> None:
        name = self._columns.content
        if name not in self._schema.names:
            raise UserError(
                f"{self._place}: no column {name!r}; it has {', '.join(self._schema.names)}; "
                f"set content_column to one of them"
            )
        kind = self._schema.field(name).type
        expected = "struct<bytes: binary, path: string> or binary"
        good = _is_binary(kind)
        if pa.types.is_struct(kind):
            fields = {field.name: field.type for field in kind}
            good = bool(fields.keys() & {"bytes", "path"})
            kinds = (fields.get("bytes", pa.binary()), fields.get("path", pa.string()))
            good &= _is_binary(kinds[0]) or pa.types.is_null(kinds[0])
            good &= _is_string(kinds[1]) or pa.types.is_null(kinds[1])
        if not good:
            raise UserError(
                f"{self._place}: column {name!r} has type {kind}, expected {expected}; "
                f"convert it or set content_column to another"
            )


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_string(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_kind(kind) for is_kind in kinds)


@contextmanager
def _content_errors(problem: str) -> Iterator[None]:
    """Content that Parquet cannot read becomes a UserError; I/O faults are ShardError already."""
    try:
        yield
    except (pa.ArrowException, OSError, IndexError) as error:
        raise UserError(f"{problem} ({first_line(error)}); write the file again") from error
