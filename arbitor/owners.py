"""Who may write into a run's folder: `owners/<token>.json`, one file for each owner that it had.

The token is the file's number; it grows by one with each owner. A file appears whole or not at all
and only if it is the first of its number, so of several that want to be the next owner one wins.
An owner that slept through its successors' time cannot harm them: its checkpoints carry its token,
and from the step on at which a later owner began they are not chosen.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from arbitor.errors import UserError

FOLDER = "owners"  # in a run's folder


class SupersededError(RuntimeError):
    """Another process owns the run's folder by now; this one must write nothing more."""


@dataclass(frozen=True)
class Owner:
    """`holder` says in whose name it owns; it began after `after_step`, with `role` in the run."""

    token: int
    role: str
    after_step: int
    holder: dict[str, Any]


def read_owners(run: Path) -> list[Owner]:
    """By token; the last is the present one."""
    paths = sorted((run / FOLDER).glob("*.json"))
    return [_read(path) for path in paths]


def add_owner(
    run: Path, previous: Owner | None, role: str, after_step: int, holder: dict[str, Any]
) -> Owner:
    """Makes the owner that follows `previous`. Raises SupersededError if `previous` has one."""
    owner = Owner(previous.token + 1 if previous else 1, role, after_step, holder)
    final = _path(run, owner.token)
    final.parent.mkdir(exist_ok=True)
    partial = final.with_suffix(f".{uuid4().hex}")
    try:
        partial.write_text(json.dumps(asdict(owner)) + "\n")
        _fsync(partial)
        os.link(partial, final)  # fails where a rename would replace
        _fsync(final.parent)
    except FileExistsError:
        raise SupersededError(f"{run}: another process took it over") from None
    finally:
        partial.unlink(missing_ok=True)
    return owner


def is_superseded(run: Path, token: int) -> bool:
    return _path(run, token + 1).exists()


def is_accepted(owners: list[Owner], token: int, step: int) -> bool:
    """Whether a checkpoint of that owner counts: no later owner began before its step."""
    return all(owner.after_step >= step for owner in owners if owner.token > token)


def _read(path: Path) -> Owner:
    try:
        return Owner(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: names no owner ({error}), as after a loss of power; delete it once no process"
            " trains this run"
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _path(run: Path, token: int) -> Path:
    return run / FOLDER / f"{token:08d}.json"
