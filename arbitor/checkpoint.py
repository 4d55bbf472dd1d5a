"""A checkpoint is a folder: `model.safetensors` and, written last, `manifest.json`.

A folder without a valid manifest is not a checkpoint, nor is one whose writer had lost the run
(`owners.py`). No pickle is ever read. `CheckpointWriter` writes them beside the training; a
checkpoint counts once its folder has its final name.
"""

import hashlib
import json
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from arbitor.errors import UserError
from arbitor.owners import SupersededError, is_accepted, is_superseded, read_owners

TENSORS = "model.safetensors"
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"  # in a run's folder
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and under which conditions it was made."""

    step: int  # steps done
    config: dict[str, Any]
    token: int  # of the owner that wrote it
    plan_fingerprint: str
    conditions: dict[str, Any]  # what the bits of a slot's gradient depend on
    files: dict[str, str]  # name -> sha256


def save_checkpoint(
    folder: Path,
    state: dict[str, Tensor],
    *,
    step: int,
    config: dict[str, Any],
    plan_fingerprint: str,
    conditions: dict[str, Any],
    token: int = 0,
) -> Path:
    """Writes `folder/step-<step>` durably: temporary folder, fsync of every file, rename.

    A whole checkpoint of this step that is there already stays: a replayed step has its bits.
    Raises SupersededError if the run has a later owner than `token`.
    """
    final = folder / f"step-{step:08d}"
    if is_whole(final):
        return final
    partial = folder / f"{_PARTIAL}{token}-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, partial / TENSORS)
    manifest = Manifest(
        step, config, token, plan_fingerprint, conditions, {TENSORS: sha256(partial / TENSORS)}
    )
    (partial / MANIFEST).write_text(_sealed(manifest))
    for path in (partial / TENSORS, partial / MANIFEST, partial):
        _fsync(path)
    if token and is_superseded(folder.parent, token):
        shutil.rmtree(partial)
        raise SupersededError(f"{final}: not written, the run has another owner by now")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _fsync(folder)
    return final


@dataclass(frozen=True)
class SaveOutcome:
    """How the writing of a checkpoint ended; `error` is empty for one that is durable."""

    step: int
    seconds: float
    error: str


class CheckpointWriter:
    """Writes checkpoints on a thread and keeps the newest `keep` of them.

    Training waits for a copy of the tensors on their device, and for the checkpoint before where
    that is not written yet. A checkpoint that cannot be written leaves the older ones as they are.
    """

    def __init__(self, folder: Path, keep: int):
        assert keep >= 2, "a checkpoint that turns out damaged needs one before it"
        self.folder, self.keep = folder, keep
        for leftover in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover)
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[SaveOutcome] | None = None

    def save(self, state: dict[str, Tensor], **header: Any) -> SaveOutcome | None:
        """Begins to write; the outcome of the checkpoint before, where that had to be awaited.

        `header` are the keyword arguments of `save_checkpoint`.
        """
        before = self.wait()
        snapshot = {name: tensor.detach().clone() for name, tensor in state.items()}
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the thread copies on a stream of its own
        self._pending = self._pool.submit(self._write, snapshot, header)
        return before

    def poll(self) -> SaveOutcome | None:
        """The outcome of a checkpoint that has ended since the last call."""
        return self.wait() if self._pending is not None and self._pending.done() else None

    def wait(self) -> SaveOutcome | None:
        """The same, once the checkpoint being written has ended."""
        pending, self._pending = self._pending, None
        return pending.result() if pending is not None else None

    def _write(self, state: dict[str, Tensor], header: dict[str, Any]) -> SaveOutcome:
        started, error = time.perf_counter(), ""
        try:
            save_checkpoint(self.folder, state, **header)
            self._drop_old()
        except Exception as failure:  # told by whoever asks for the outcome
            error = f"{type(failure).__name__}: {failure}"
        return SaveOutcome(header["step"], time.perf_counter() - started, error)

    def _drop_old(self) -> None:
        folders = sorted(self.folder.glob("step-*"), reverse=True)
        whole = [folder for folder in folders if is_whole(folder, verify=False)]
        for folder in whole[self.keep :]:
            (folder / MANIFEST).unlink()  # from here on it is no checkpoint
            shutil.rmtree(folder)


def load_checkpoint(folder: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """The manifest and the tensors, verified against their sha256."""
    manifest = read_manifest(folder)
    _verify(folder, manifest)
    return manifest, load_file(folder / TENSORS)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from the header alone."""
    with safe_open(folder / TENSORS, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps whose manifest and files are whole; None without one."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            manifest = read_manifest(candidate)
            _check_owner(candidate, manifest)
            _verify(candidate, manifest)
        except UserError as error:
            print(f"checkpoint passed over: {error}")
            continue
        return candidate
    return None


def is_whole(folder: Path, verify: bool = True) -> bool:
    """Whether `folder` is a checkpoint; with `verify` also by the sha256 of its files."""
    try:
        manifest = read_manifest(folder)
        _check_owner(folder, manifest)
        if verify:
            _verify(folder, manifest)
    except UserError:
        return False
    return True


def _check_owner(folder: Path, manifest: Manifest) -> None:
    if not is_accepted(read_owners(folder.parent.parent), manifest.token, manifest.step):
        raise UserError(f"{folder}: written by owner {manifest.token}, which had lost the run")


def _verify(folder: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise UserError(f"{folder / name}: damaged or missing (sha256 differs from {MANIFEST})")


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text())
        seal = values.pop("sha256")
        manifest = Manifest(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint's manifest ({error})") from error
    if seal != _seal_of(manifest):
        raise UserError(f"{path}: damaged (its sha256 differs)")
    return manifest


def _sealed(manifest: Manifest) -> str:
    """The text of `manifest.json`: its own sha256 is the last entry."""
    return json.dumps(asdict(manifest) | {"sha256": _seal_of(manifest)}, indent=1)


def _seal_of(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(asdict(manifest), sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
