"""A copy of the run's folder in an object store, from which a run goes on whose disk is lost.

The driver sends what has changed when there is another checkpoint, and at the end; a checkpoint's
manifest after its tensors: as on a disk, a checkpoint without a manifest is none. A store that is
away costs the run nothing; what it misses is sent later.
"""

import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from arbitor.checkpoint import CHECKPOINTS, MANIFEST
from arbitor.errors import UserError
from data_pipeline.files import resolve_place
from ray_jobs.attempts import RAY
from ray_jobs.config import CONFIG, RunConfig
from ray_jobs.heartbeat import HEARTBEATS
from ray_jobs.stop import LAST_STEP, REQUEST
from ray_jobs.tracking import MLFLOW_FILE

_LOOK_EVERY_S = 5.0
_STORE_ERRORS = (OSError, pa.ArrowException)


def fetch(config: RunConfig) -> None:
    """Copies a run from its mirror where this machine has none. Raises UserError."""
    if not config.mirror or (config.folder / CONFIG).exists():
        return
    partial = config.folder.with_name(f".fetched-{config.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        store, root = _open(config)
        found = _listed(store, root)
        if CONFIG not in found:
            return
        print(f"mirror: fetching {config.name} from {config.mirror}")
        for name in found:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(f"{root}/{name}", str(partial / name), source_filesystem=store)
    except _STORE_ERRORS as error:
        raise UserError(f"mirror: {config.mirror} cannot be read ({_line(error)})") from error
    if config.folder.exists():
        config.folder.rmdir()  # there is no run in it
    partial.rename(config.folder)


@contextmanager
def mirrored(config: RunConfig) -> Iterator[None]:
    """Keeps the mirror up with the run's folder, if there is to be one."""
    if not config.mirror:
        yield
        return
    mirror = Mirror(config)
    try:
        yield
    finally:
        mirror.close()


class Mirror:
    """A thread that sends the files of a run's folder that are new or have changed."""

    def __init__(self, config: RunConfig):
        self._config, self._folder = config, config.folder
        self._stays_here = {RAY, HEARTBEATS, REQUEST, LAST_STEP}
        if not config.tracking.uri:
            self._stays_here.add(MLFLOW_FILE)  # of a store on the disk that may be lost
        self._checkpoints: set[Path] = set()  # manifests of those that are sent
        self._sent: dict[str, tuple[int, int]] = {}  # by name in the folder: size and time
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Sends what is left, or says that the store does not take it."""
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            print(
                f"mirror: {self._config.mirror} did not take all of {self._folder}"
                f" ({_line(self._failure)}); the same command sends the rest",
                file=sys.stderr,
            )

    def _work(self) -> None:
        ending = False
        while not ending:
            ending = self._stop.wait(_LOOK_EVERY_S)
            checkpoints = set((self._folder / CHECKPOINTS).glob(f"*/{MANIFEST}"))
            if not ending and not self._failure and checkpoints == self._checkpoints:
                continue
            try:
                self._send()
                self._checkpoints, self._failure = checkpoints, None
            except _STORE_ERRORS as error:
                if self._failure is None and not ending:
                    print(
                        f"mirror: {self._config.mirror} takes nothing ({_line(error)}); training"
                        " goes on, it is tried again",
                        file=sys.stderr,
                    )
                self._failure = error

    def _send(self) -> None:
        store, root = _open(self._config)
        files = self._files()
        if not self._sent:
            self._recall(store, root, files)
        for name, version in files.items():
            if self._sent.get(name) != version:
                target = f"{root}/{name}"
                store.create_dir(target.rpartition("/")[0])
                try:
                    fs.copy_files(str(self._folder / name), target, destination_filesystem=store)
                except FileNotFoundError:  # a checkpoint that was dropped meanwhile
                    continue
                self._sent[name] = version
        self._drop_old(store, root, files)

    def _recall(
        self, store: fs.FileSystem, root: str, files: Mapping[str, tuple[int, int]]
    ) -> None:
        """An earlier start has sent the checkpoints whose manifest, sent last, is there."""
        for name in set(_listed(store, root)) & files.keys():
            folder, _, file = name.rpartition("/")
            if file == MANIFEST:
                with store.open_input_stream(f"{root}/{name}") as stream:
                    is_same = stream.read() == (self._folder / name).read_bytes()
                if is_same:
                    own = {k: v for k, v in files.items() if k.startswith(f"{folder}/")}
                    self._sent |= own

    def _drop_old(self, store: fs.FileSystem, root: str, files: Mapping[str, Any]) -> None:
        """Drops checkpoints that this disk has replaced by later ones: not those that it lost."""
        newest = max((name for name in files if name.startswith(f"{CHECKPOINTS}/")), default="")
        old = [
            name
            for name in _listed(store, root)
            if name not in files and name.startswith(f"{CHECKPOINTS}/") and name < newest
        ]
        for name in sorted(old, key=_manifest_last, reverse=True):  # here it goes first
            store.delete_file(f"{root}/{name}")
            self._sent.pop(name, None)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time by name, in the order in which they are to be sent."""
        found = {}
        for path in self._folder.rglob("*"):
            name = path.relative_to(self._folder)
            is_hidden = any(part.startswith(".") for part in name.parts)
            if is_hidden or name.parts[0] in self._stays_here:
                continue
            try:
                if path.is_file():
                    stat = path.stat()
                    found[name.as_posix()] = (stat.st_size, stat.st_mtime_ns)
            except FileNotFoundError:
                continue
        return {name: found[name] for name in sorted(found, key=_manifest_last)}


def _manifest_last(name: str) -> tuple[bool, str]:
    return name.endswith(f"/{MANIFEST}"), name


def _open(config: RunConfig) -> tuple[fs.FileSystem, str]:
    """The store, and the run's place in it."""
    parts = urlsplit(config.mirror)
    query = [parts.query] if parts.query else []
    if parts.scheme == "s3":
        query.append("allow_delayed_open=true")  # a small file in one request instead of three
    path = f"{parts.path.rstrip('/')}/{quote(config.name)}"
    return resolve_place(urlunsplit(parts._replace(path=path, query="&".join(query))))


def _listed(store: fs.FileSystem, root: str) -> list[str]:
    selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
    infos = store.get_file_info(selector)
    return [i.path[len(root) + 1 :] for i in infos if i.type == fs.FileType.File]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
