"""A file system that fails now and then: the real one, behind reads that raise or come short."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from data_pipeline import files


class FlakyFile:
    """Of a pyarrow file, `read_at` and `size`; `failures` counts what went wrong."""

    failures = 0
    calls = 0

    def __init__(self, file):
        self._file = file

    def size(self) -> int:
        self._maybe_fail()
        return self._file.size()

    def read_at(self, size: int, position: int) -> bytes:
        self._maybe_fail()
        FlakyFile.calls += 1
        if FlakyFile.calls % 4 == 0:
            FlakyFile.failures += 1
            return self._file.read_at(size // 2, position)
        return self._file.read_at(size, position)

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def _maybe_fail() -> None:
        FlakyFile.calls += 1
        if FlakyFile.calls % 3 == 0:
            FlakyFile.failures += 1
            raise OSError("the network is down")


@contextmanager
def flaky_files() -> Iterator[type[FlakyFile]]:
    """Every file is opened flaky, and nobody waits between the attempts."""
    open_really = files._open
    with (
        patch.object(files, "_open", lambda place: FlakyFile(open_really(place))),
        patch.object(files, "RETRY_AFTER_S", (0,) * 8),
    ):
        yield FlakyFile
