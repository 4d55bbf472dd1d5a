"""JSON lines: an object a line; blank lines are no rows.

Text stands under the text column's key. Media content is a path beside the shard, {"path": ...},
or {"bytes": base64}; its caption stands under the text column's key where there is one.
"""

import base64
import binascii
import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

from arbitor.errors import UserError
from data_pipeline.decode.content import ContentError
from data_pipeline.files import BUFFER_BYTES, PatientFile, first_line, read_range
from data_pipeline.format.shard import (
    Columns,
    Group,
    MediaGroup,
    MediaRow,
    content_beside,
    cut_long,
)

GROUP_BYTES = 256 << 10


class JsonlShard:
    def __init__(self, place: str, columns: Columns):
        self._place, self._columns = place, columns

    def groups(self) -> Iterator[Group]:
        with io.BufferedReader(PatientFile(self._place), BUFFER_BYTES) as file:
            start = 0
            while file.read(GROUP_BYTES):
                file.readline()
                yield Group(start, file.tell() - start)
                start = file.tell()

    def read(self, group: Group) -> list[bytes]:
        rows = []
        for number, line in self._lines(group):
            try:
                rows.append(self._text(line))
            except ContentError as error:
                before = read_range(self._place, 0, group.location).count(b"\n")
                raise UserError(f"{self._place}:{before + number + 1}: {error}") from error
        return cut_long(rows)

    def rows(self, group: Group) -> Iterator[bytes | ContentError]:
        for _, line in self._lines(group):
            try:
                yield self._text(line)
            except ContentError as error:
                yield error

    def media_groups(self) -> Iterator[MediaGroup]:
        for group in self.groups():
            data = read_range(self._place, *group)
            rows = sum(1 for line in data.split(b"\n") if line.strip())
            yield MediaGroup(group, rows, len(data), _digest(data))

    def read_media(self, group: Group, start: int, stop: int) -> tuple[list[MediaRow], str]:
        data = read_range(self._place, *group)
        lines = [line for line in data.split(b"\n") if line.strip()]
        return [self._media_row(line) for line in lines[start:stop]], _digest(data)

    def _lines(self, group: Group) -> Iterator[tuple[int, bytes]]:
        """(number in the group, line) of those that are rows."""
        lines = read_range(self._place, *group).split(b"\n")
        return ((i, line) for i, line in enumerate(lines) if line.strip())

    def _text(self, line: bytes) -> bytes:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ContentError(f"not valid JSON ({first_line(error)})") from error
        name = self._columns.text
        if not isinstance(row, dict) or name not in row:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ContentError(f"no key {name!r}, found {found}; set text_column")
        text = row[name]
        if not isinstance(text, str | None):
            raise ContentError(f"{name!r} is {type(text).__name__}, expected a string")
        return _encoded(text)

    def _media_row(self, line: bytes) -> MediaRow:
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or self._columns.content not in row:
                raise ContentError(f"no key {self._columns.content!r}")
            text = row.get(self._columns.text)
            if not isinstance(text, str | None):
                raise ContentError(f"{self._columns.text!r} is {type(text).__name__}")
            return MediaRow(self._content(row[self._columns.content]), _encoded(text))
        except ContentError as error:
            return MediaRow(problem=str(error))
        except (ValueError, RecursionError) as error:
            return MediaRow(problem=f"not valid JSON ({first_line(error)})")

    def _content(self, value: Any) -> bytes:
        if isinstance(value, dict) and value.get("bytes") is not None:
            try:
                return base64.b64decode(value["bytes"], validate=True)
            except (binascii.Error, TypeError, ValueError) as error:
                raise ContentError("its bytes are not base64") from error
        path = value.get("path") if isinstance(value, dict) else value
        if path is None:
            raise ContentError(f"{self._columns.content} is null")
        if not isinstance(path, str):
            raise ContentError(f"{self._columns.content} is {type(path).__name__}")
        return content_beside(self._place, path)


def _encoded(text: str | None) -> bytes:
    return (text or "").encode("utf-8", "surrogatepass")  # JSON may escape half a surrogate


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
