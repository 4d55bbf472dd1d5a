"""Plain text, cut into rows at line ends."""

from collections.abc import Iterator

from arbitor.errors import UserError
from data_pipeline.decode.content import ContentError
from data_pipeline.files import PatientFile, read_range
from data_pipeline.format.shard import Group

GROUP_BYTES = 256 << 10


class PlainTextShard:
    """Rows of whole lines, at most 64 KiB and about 1/64 of the file; a longer line is cut."""

    def __init__(self, place: str):
        self._place = place
        with PatientFile(place) as file:
            size = file.seek(0, 2)
        self._row_bytes = min(64 << 10, max(1 << 10, size // 64))

    def groups(self) -> Iterator[Group]:
        with PatientFile(self._place) as file:
            start = 0
            while data := file.read(GROUP_BYTES + self._row_bytes):
                ends = self._row_ends(data)
                if len(data) == GROUP_BYTES + self._row_bytes:
                    ends.pop()  # the last row may go on
                yield Group(start, ends[-1])
                start += ends[-1]
                file.seek(start)

    def read(self, group: Group) -> list[bytes]:
        data = read_range(self._place, *group)
        if b"\0" in data:
            raise UserError(
                f"{self._place}: a zero byte at byte {group.location + data.index(0)}: not text in"
                " UTF-8; convert it, or leave it out with a glob such as **/*.txt"
            )
        return self._cut(data)

    def rows(self, group: Group) -> list[bytes | ContentError]:
        binary = ContentError("holds zero bytes: not text")
        rows = self._cut(read_range(self._place, *group))
        return [binary if b"\0" in row else row for row in rows]

    def _cut(self, data: bytes) -> list[bytes]:
        ends = self._row_ends(data)
        return [data[i:j] for i, j in zip([0, *ends], ends, strict=False)]

    def _row_ends(self, data: bytes) -> list[int]:
        ends = [0]
        while len(data) - ends[-1] > self._row_bytes:
            limit = ends[-1] + self._row_bytes
            line_end = data.rfind(b"\n", ends[-1], limit) + 1
            ends.append(line_end or limit)
        return ends[1:] + [len(data)]
