"""A checkpoint is a folder: `model.safetensors` and, written last, `manifest.json`.

A folder without a valid manifest is not a checkpoint. No pickle is ever read.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from arbitor.errors import UserError

TENSORS = "model.safetensors"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and under which conditions it was made."""

    step: int  # steps done
    config: dict[str, Any]
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
) -> Path:
    """Writes `folder/step-<step>` durably: temporary folder, fsync of every file, rename."""
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, partial / TENSORS)
    manifest = Manifest(
        step, config, plan_fingerprint, conditions, {TENSORS: sha256(partial / TENSORS)}
    )
    (partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))
    for path in (partial / TENSORS, partial / MANIFEST, partial):
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _fsync(folder)
    return final


def load_checkpoint(folder: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """The manifest and the tensors, verified against their sha256."""
    manifest = read_manifest(folder)
    _verify(folder, manifest)
    return manifest, load_file(folder / TENSORS)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps whose manifest and files are whole; None without one."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            manifest = read_manifest(candidate)
            _verify(candidate, manifest)
        except UserError as error:
            print(f"checkpoint passed over: {error}")
            continue
        return candidate
    return None


def _verify(folder: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise UserError(f"{folder / name}: damaged or missing (sha256 differs from {MANIFEST})")


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        return Manifest(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint's manifest ({error})") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
