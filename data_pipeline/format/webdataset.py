"""WebDataset shards: tar files whose consecutive members with the same key are one row.

The key of a member is its path up to the first dot of its name. A row's content is its first
member of the modality, its text the .txt member or the text column's key in the .json member.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from itertools import groupby

from arbitor.errors import UserError
from data_pipeline.decode.content import ContentError
from data_pipeline.files import BUFFER_BYTES, PatientFile, ShardError, first_line, read_range
from data_pipeline.format.shard import (
    Columns,
    Group,
    MediaGroup,
    MediaRow,
    cut_long,
)

GROUP_BYTES = 4 << 20
ENDINGS = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "audio": ("flac", "wav", "mp3", "ogg"),
    "video": ("mp4", "webm"),
}


class WebDatasetShard:
    def __init__(self, place: str, columns: Columns, modality: str):
        self._place, self._columns, self._modality = place, columns, modality

    def groups(self) -> Iterator[Group]:
        return (media_group.group for media_group in self.media_groups())

    def read(self, group: Group) -> list[bytes]:
        rows = []
        for row in self.rows(group):
            if isinstance(row, ContentError):
                raise UserError(f"{self._place}: {row}; mend it") from row
            rows.append(row)
        return cut_long(rows)

    def rows(self, group: Group) -> Iterator[bytes | ContentError]:
        for members in self._samples(group):
            try:
                yield self._text({ending: data for _, ending, data in members})
            except ContentError as error:
                yield ContentError(f"{members[0][0]}: {error}")

    def media_groups(self) -> Iterator[MediaGroup]:
        """Reads the headers alone, seeking from one to the next."""
        start, stop, rows, digests = 0, 0, 0, []
        for _, sample in groupby(self._headers(), key=lambda header: _key(header.name)):
            members = list(sample)
            if rows and members[0].offset - start >= GROUP_BYTES:
                yield MediaGroup(Group(start, stop - start), rows, stop - start, _join(digests))
                rows, digests = 0, []
            if not rows:
                start = members[0].offset
            rows += 1
            digests += map(_describe, members)
            stop = members[-1].offset_data + -(-members[-1].size // 512) * 512
        if rows:
            yield MediaGroup(Group(start, stop - start), rows, stop - start, _join(digests))

    def read_media(self, group: Group, start: int, stop: int) -> tuple[list[MediaRow], str]:
        digests: list[str] = []
        samples = self._samples(group, digests)
        return [self._media_row(sample) for sample in samples[start:stop]], _join(digests)

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        """Of the members that are files, in order."""
        with io.BufferedReader(PatientFile(self._place), BUFFER_BYTES) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    yield from (header for header in tar if header.isfile())
                    file.seek(tar.offset)
            except (tarfile.TarError, EOFError, ValueError) as error:
                raise self._broken(first_line(error)) from error
            if file.read(512).strip(b"\0"):
                raise self._broken(f"no member's header at byte {tar.offset}")

    def _broken(self, reason: str) -> UserError:
        return UserError(f"{self._place}: not a whole tar file ({reason}); write it again")

    def _samples(self, group: Group, digests: list[str] | None = None) -> list[list]:
        """The rows of a group as lists of (name, ending, data)."""
        members = []
        try:
            with tarfile.open(
                fileobj=io.BytesIO(read_range(self._place, *group)), mode="r:"
            ) as tar:
                for header in tar:
                    if header.isfile():
                        data = tar.extractfile(header).read()
                        ending = header.name.rpartition(".")[2].lower()
                        members.append((header.name, ending, data))
                        if digests is not None:
                            digests.append(_describe(header))
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ShardError(
                f"{self._place}: changed since it was indexed ({first_line(error)}); restore it or"
                " start a new run"
            ) from error
        return [list(sample) for _, sample in groupby(members, key=lambda m: _key(m[0]))]

    def _media_row(self, members: list[tuple[str, str, bytes]]) -> MediaRow:
        by_ending = {ending: data for _, ending, data in members}
        try:
            text = self._text(by_ending)
        except ContentError as error:
            return MediaRow(problem=str(error))
        for ending in by_ending:
            if ending in ENDINGS[self._modality]:
                return MediaRow(by_ending[ending], text)
        found = ", ".join(name for name, _, _ in members)
        return MediaRow(problem=f"no {self._modality} member, found {found}")

    def _text(self, by_ending: dict[str, bytes]) -> bytes:
        if "txt" in by_ending:
            return by_ending["txt"]
        if "json" not in by_ending:
            return b""
        try:
            text = json.loads(by_ending["json"]).get(self._columns.text)
            return (text or "").encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError, AttributeError) as error:
            reason = f"its .json is no object with a text ({first_line(error)})"
            raise ContentError(reason) from error


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".")[0]


def _describe(header: tarfile.TarInfo) -> str:
    return f"{header.name} {header.size} {header.mtime}"


def _join(digests: list[str]) -> str:
    text = "\n".join(digests).encode("utf-8", "replace")
    return hashlib.blake2b(text, digest_size=16).hexdigest()
