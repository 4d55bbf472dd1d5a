"""What every format of shards offers: groups found once by the index, rows read from them later.

A group is the smallest part of a shard that is read: a row group of a Parquet file, or a byte
range of the others. Rows of text and code are bytes; rows of images, sound and video are
`MediaRow`, their content still encoded.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from data_pipeline.decode.content import ContentError
from data_pipeline.files import beside, first_line, read_file

ROW_BYTES = 4 << 20  # a longer row of text is cut, so that a window of it fits in memory
PATH_LENGTH, NAME_LENGTH = 4096, 255  # of a file and of each part of it, as Linux allows them
QUOTED = 80  # characters of a name in a message


class Group(NamedTuple):
    """`location`: byte offset, or number of the Parquet row group (then `length` is 0)."""

    location: int
    length: int


class MediaGroup(NamedTuple):
    """What the index learns of a group without decoding it; `digest` changes with its layout."""

    group: Group
    rows: int
    num_bytes: int
    digest: str


class MediaRow(NamedTuple):
    """An encoded row. `problem` says why there is none, where there is none."""

    content: bytes = b""
    text: bytes = b""  # caption or transcript
    problem: str = ""


class Columns(NamedTuple):
    """Names of the columns (or keys) of a source's rows."""

    text: str
    content: str


class TextShard(Protocol):
    """Raises UserError naming the file and what is wrong with it."""

    def groups(self) -> Iterator[Group]: ...

    def read(self, group: Group) -> list[bytes]: ...

    def rows(self, group: Group) -> Iterable[bytes | ContentError]:
        """As `read`, but a row that cannot be read is its reason, and none is cut."""
        ...


class MediaShard(Protocol):
    """`media_groups` raises UserError; what is wrong inside a group is a problem of its rows."""

    def media_groups(self) -> Iterator[MediaGroup]: ...

    def read_media(self, group: Group, start: int, stop: int) -> tuple[list[MediaRow], str]:
        """Rows start .. stop - 1 of the group, and the group's digest as it is now."""
        ...


def cut_long(rows: Sequence[bytes]) -> list[bytes]:
    """The rows, those above ROW_BYTES as several."""
    if all(len(row) <= ROW_BYTES for row in rows):
        return list(rows)
    return [row[i : i + ROW_BYTES] for row in rows for i in range(0, max(len(row), 1), ROW_BYTES)]


def content_beside(place: str, name: str) -> bytes:
    """The file that a row of the shard `place` names. Raises ShardError if it cannot be read.

    ContentError for what no file can be called.
    """
    parts = name.encode("utf-8", "replace").split(b"/")
    if not name or len(name) > PATH_LENGTH or max(map(len, parts)) > NAME_LENGTH:
        said = repr(name[:QUOTED]) + ("..." if len(name) > QUOTED else "")
        raise ContentError(f'{said} is not a path; give encoded content as {{"bytes": base64}}')
    try:
        return read_file(beside(place, name))
    except ValueError as error:
        raise ContentError(f"{name[:QUOTED]!r} is not a path ({first_line(error)})") from error
