"""WebDataset shards: tar files whose consecutive members with the same key are one row.

The key of a member is its path up to the first dot of its name, its ending what comes after that
dot; a name without one of the two is no member of a row. A row's content is the member that ends as
the content column is called, else its first one of the modality; its text the member that ends as
the text column is called, else the .txt member, else the text column's key in the .json member.
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
    "audio": ("flac", "wav", "mp3", "ogg", "oga", "opus"),
    "video": ("mp4", "m4v", "mov", "webm", "mkv"),
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
                raise UserError(f"{self._place}: {row}") from row
            rows.append(row)
        return cut_long(rows)

    def rows(self, group: Group) -> Iterator[bytes | ContentError]:
        for name, fields in self._samples(group):
            try:
                text = self._text(fields)
                if text is None:
                    raise self._no_text(fields)
                yield text
            except ContentError as error:
                yield ContentError(f"{name}: {error}")

    def media_groups(self) -> Iterator[MediaGroup]:
        """Reads the headers alone, seeking from one to the next."""
        start, stop, rows, digests = 0, 0, 0, []
        for _, sample in groupby(self._headers(), key=lambda header: _split(header.name)[0]):
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
        return [self._media_row(fields) for _, fields in samples[start:stop]], _join(digests)

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        """Of the members of rows, in order."""
        with io.BufferedReader(PatientFile(self._place), BUFFER_BYTES) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for header in filter(_is_member, tar):
                        if not header.isfile():
                            raise UserError(
                                f"{self._place}: {header.name} is a link to {header.linkname} and"
                                " holds nothing itself; write it again with tar --dereference"
                                " --hard-dereference"
                            )
                        yield header
                    file.seek(tar.offset)
            except UserError:
                raise
            except (tarfile.TarError, EOFError, ValueError) as error:
                raise self._broken(first_line(error)) from error
            if file.read(512).strip(b"\0"):
                raise self._broken(f"no member's header at byte {tar.offset}")

    def _broken(self, reason: str) -> UserError:
        return UserError(f"{self._place}: not a whole tar file ({reason}); write it again")

    def _samples(
        self, group: Group, digests: list[str] | None = None
    ) -> list[tuple[str, dict[str, bytes]]]:
        """The rows of a group: the name of the first member, and the members by their ending."""
        members = []
        try:
            data = io.BytesIO(read_range(self._place, *group))
            with tarfile.open(fileobj=data, mode="r:") as tar:
                for header in filter(_is_member, tar):
                    members.append((header.name, tar.extractfile(header).read()))
                    if digests is not None:
                        digests.append(_describe(header))
        except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
            raise ShardError(
                f"{self._place}: changed since it was indexed ({first_line(error)}); restore it or"
                " start a new run"
            ) from error
        samples = []
        for _, sample in groupby(members, key=lambda member: _split(member[0])[0]):
            (name, content), *others = sample
            fields = {_split(name)[1]: content}
            for other, content in others:
                fields.setdefault(_split(other)[1], content)
            samples.append((name, fields))
        return samples

    def _media_row(self, fields: dict[str, bytes]) -> MediaRow:
        try:
            text = self._text(fields) or b""
        except ContentError as error:
            return MediaRow(problem=str(error))
        named = self._columns.content.lower()
        endings = [ending for ending in fields if ending in ENDINGS[self._modality]]
        if named in fields or endings:
            return MediaRow(fields[named if named in fields else endings[0]], text)
        found = ", ".join(fields)
        return MediaRow(problem=f"no {self._modality} member, found {found}; set content_column")

    def _text(self, fields: dict[str, bytes]) -> bytes | None:
        """None where there is none."""
        for ending in (self._columns.text.lower(), "txt"):
            if ending in fields:
                return fields[ending]
        if "json" not in fields:
            return None
        try:
            values = json.loads(fields["json"])
            text = values.get(self._columns.text)
            known = self._columns.text in values
            return (text or "").encode("utf-8", "surrogatepass") if known else None
        except (ValueError, RecursionError, AttributeError) as error:
            reason = f"its .json is no object with a text ({first_line(error)}); mend it"
            raise ContentError(reason) from error

    def _no_text(self, fields: dict[str, bytes]) -> ContentError:
        name = self._columns.text
        keys = f" ({', '.join(json.loads(fields['json']))})" if "json" in fields else ""
        found = ", ".join(ending + keys * (ending == "json") for ending in fields)
        return ContentError(
            f"no .txt or .{name} member and no key {name!r} in a .json, found {found};"
            " set text_column"
        )


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending.lower()


def _is_member(header: tarfile.TarInfo) -> bool:
    """Of a row; a link is taken for one, to be refused."""
    key, ending = _split(header.name)
    is_named = ending and key and not key.endswith("/")
    return bool(is_named) and (header.isfile() or header.islnk() or header.issym())


def _describe(header: tarfile.TarInfo) -> str:
    return f"{header.name} {header.size} {header.mtime}"


def _join(digests: list[str]) -> str:
    text = "\n".join(digests).encode("utf-8", "replace")
    return hashlib.blake2b(text, digest_size=16).hexdigest()
