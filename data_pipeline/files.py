"""Files on this machine and wherever pyarrow reaches (file://, s3://, gs://), read with patience.

A fault of the disk or the network is retried and then ends in a ShardError: it may never change
the data. So whatever else goes wrong in reading a shard is a matter of the shard's content.
"""

import io
import os
import re
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from arbitor.errors import UserError

RETRY_AFTER_S = (0.2, 1.0, 3.0)
BUFFER_BYTES = 1 << 20
MAGIC = re.compile(r"[*?\[]")  # of a glob, once its braces are written out

T = TypeVar("T")


class ShardError(RuntimeError):
    """A shard that was indexed cannot be read, or reads differently now."""


class FoundFile(NamedTuple):
    """A file; `place` is an absolute path or a URI, `version` changes when it is written again."""

    place: str
    size: int
    version: int


def find_files(key: str, place: str) -> list[FoundFile]:
    """The files that a file, a folder (recursively) or a glob means, sorted by path.

    Hidden files, and empty ones among others, are left out; of the names that links give to one
    file one is taken. A glob that matches folders alone means their files. Raises UserError
    naming the configuration key `key` where nothing is left.
    """
    try:
        filesystem, path = resolve_place(place)
        info = retried(place, lambda: filesystem.get_file_info(path))
        if info.type == fs.FileType.File:
            if not info.size:
                raise UserError(f"{key}: the file {place} is empty; give one with rows")
            return [_found(place, info)]
        pattern = None if info.type == fs.FileType.Directory else _glob_pattern(path)
        if info.type == fs.FileType.NotFound and pattern is None:
            raise UserError(f"{key}: {place} does not exist; give a file, a folder or a glob")
        folder = _fixed_folder(path) if pattern else path
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        infos = retried(place, lambda: filesystem.get_file_info(selector))
        if isinstance(filesystem, fs.LocalFileSystem):
            infos += filesystem.get_file_info(_broken_links(folder))
        infos = [info for info in infos if not _is_hidden(info.path[len(folder) :])]
    except ShardError as error:
        raise UserError(f"{key}: {error}") from error
    except UnicodeError as error:
        raise UserError(f"{key}: {error.object!r} is not named in UTF-8; rename it") from error
    except re.error as error:
        raise UserError(f"{key}: {place} is no pattern ({error}); mend it") from error
    except pa.ArrowException as error:
        raise UserError(
            f"{key}: {place} cannot be listed ({first_line(error)}); give a path or a URI such as"
            " s3://"
        ) from error
    if pattern is not None:
        infos = _matching(key, path, pattern, infos)
    if isinstance(filesystem, fs.LocalFileSystem):
        infos = _without_other_names(key, infos)
    infos = [info for info in infos if info.type == fs.FileType.File and info.size]
    if not infos:
        problem = f"no shards in folder {place}; put Parquet, JSONL, tar or text files there"
        if pattern is not None:
            problem = f"no file matches {place}; mend the pattern"
        raise UserError(f"{key}: {problem}")
    return [_found(place, info) for info in sorted(infos, key=lambda info: info.path)]


def _matching(
    key: str, path: str, pattern: re.Pattern, infos: list[fs.FileInfo]
) -> list[fs.FileInfo]:
    """What a glob means of what is there. Raises UserError for a name of its braces that is not."""
    named = {name for name in _without_braces(path) if not MAGIC.search(name)}
    missing = named.difference(info.path for info in infos)
    if missing:
        raise UserError(f"{key}: {min(missing)} does not exist; restore it or mend the pattern")
    matching = [info for info in infos if info.path in named or pattern.fullmatch(info.path)]
    if any(info.type != fs.FileType.Directory for info in matching):
        return matching
    folders = tuple(f"{info.path}/" for info in matching)
    return [info for info in infos if info.path.startswith(folders)]


def _broken_links(folder: str) -> list[str]:
    """Those below a folder of this machine; a listing leaves them out."""
    paths = [f"{root}/{name}" for root, _, names in os.walk(folder) for name in names]
    return [path for path in paths if os.path.islink(path) and not os.path.exists(path)]


def _without_other_names(key: str, infos: list[fs.FileInfo]) -> list[fs.FileInfo]:
    """One of each file on this machine: a name with an ending, as few folders deep as there is."""

    def order(info: fs.FileInfo) -> tuple:
        return not info.extension, info.path.count("/"), info.path

    nearest: dict[str, fs.FileInfo] = {}
    for info in sorted(infos, key=order):
        if info.type == fs.FileType.NotFound:
            raise UserError(f"{key}: {info.path} is a broken link; restore it or take it away")
        if info.type == fs.FileType.File:
            nearest.setdefault(os.path.realpath(info.path), info)
    return list(nearest.values())


def read_file(place: str) -> bytes:
    """All of a file. Raises ShardError."""
    with PatientFile(place) as file:
        return file.read()


def read_range(place: str, start: int, length: int) -> bytes:
    """`length` bytes of a file from byte `start` on. Raises ShardError."""
    with PatientFile(place) as file:
        file.seek(start)
        return file.read(length)


def beside(place: str, name: str) -> str:
    """The place of the file `name` as the shard `place` means it: relative to its folder."""
    if name.startswith("/") or "://" in name:
        return name
    return f"{place.rpartition('/')[0]}/{quote(name) if '://' in place else name}"


class PatientFile(io.RawIOBase):
    """A file opened for reading at any position; faults are retried, by opening it again.

    Raises ShardError where that is in vain.
    """

    def __init__(self, place: str):
        self._place, self._position, self._file = place, 0, None
        self._size = retried(place, lambda: self._opened().size())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        data = retried(self._place, lambda: self._read_at(size)) if size else b""
        self._position += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _opened(self) -> pa.NativeFile:
        """Opened again after a fault."""
        if self._file is None:
            self._file = _open(self._place)
        return self._file

    def _read_at(self, size: int) -> bytes:
        file, self._file = self._opened(), None
        data = file.read_at(size, self._position)
        self._file = file
        if len(data) != size:
            raise OSError(f"ends at byte {self._position + len(data)}, expected {self._size}")
        return data


def retried(place: str, action: Callable[[], T]) -> T:
    """What `action` returns, tried again after each OSError. Raises ShardError in the end."""
    for pause in (*RETRY_AFTER_S, None):
        try:
            return action()
        except OSError as error:
            if pause is None:
                tried = f"tried {len(RETRY_AFTER_S) + 1} times"
                raise ShardError(
                    f"{place}: cannot be read ({first_line(error)}), {tried};"
                    " restore it and start again"
                ) from error
        time.sleep(pause)
    raise AssertionError("unreachable")


def _open(place: str) -> pa.NativeFile:
    filesystem, path = resolve_place(place)
    return filesystem.open_input_file(path)


def resolve_place(place: str) -> tuple[fs.FileSystem, str]:
    """The file system that holds `place`, and the path in it."""
    if "://" not in place:
        return fs.LocalFileSystem(), str(Path(place).expanduser().absolute())
    parts = urlsplit(place)
    root, path = _file_system(urlunsplit(parts._replace(path="/")))
    return root, path.rstrip("/") + unquote(parts.path)


@lru_cache(maxsize=64)
def _file_system(root: str) -> tuple[fs.FileSystem, str]:
    return fs.FileSystem.from_uri(root)


def _found(root: str, info: fs.FileInfo) -> FoundFile:
    place = info.path
    if "://" in root:
        parts = urlsplit(root)
        bucket = parts.netloc.rpartition("@")[2]
        path = quote(info.path.removeprefix(bucket) if bucket else info.path)
        place = urlunsplit(parts._replace(path=path))
    return FoundFile(place, info.size, info.mtime_ns or 0)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _fixed_folder(path: str) -> str:
    """The folder above the first part of a glob that has magic in it."""
    return re.split(r"[*?\[{]", path)[0].rpartition("/")[0] or "/"


def _glob_pattern(path: str) -> re.Pattern | None:
    """The paths that a glob means (`**` also crosses folders); None for a plain path."""
    names = _without_braces(path)
    if names == [path] and not MAGIC.search(path):
        return None
    names = filter(MAGIC.search, names)  # those that braces alone spell may be very many
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def translate(match: re.Match) -> str:
        token = match[0]
        if token in tokens:
            return tokens[token]
        if len(token) > 1:
            return "[" + token[1:-1].replace("\\", "\\\\").replace("!", "^", 1) + "]"
        return re.escape(token)

    parts = r"\*\*/|\*\*|\*|\?|\[[^/\]]+\]|."
    return re.compile("|".join(re.sub(parts, translate, name, flags=re.S) for name in names))


def _without_braces(path: str) -> list[str]:
    """`{a,b}` and `{08..11}` written out, as the shell does."""
    braces = re.search(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}", path)
    if braces is None:
        return [path]
    first, _, last = braces[1].partition("..")
    words = braces[1].split(",")
    if "," not in braces[1]:
        words = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    before, after = path[: braces.start()], path[braces.end() :]
    return [name for word in words for name in _without_braces(before + word + after)]


def drop_torn_line(path: Path) -> None:
    """A writer that was killed may leave half a line; whole lines before it stay."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "rb+") as file:
            file.truncate(whole)


def first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
