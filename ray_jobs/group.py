"""One start of a run's workers: which checkpoint they begin with, and under which token they write.

Worker 0 decides and tells the others; all of this happens anew whenever Ray starts the workers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed

from arbitor.checkpoint import CHECKPOINTS, newest_checkpoint, read_manifest
from arbitor.owners import SupersededError, add_owner, is_superseded, read_owners

WORKERS = "workers"  # the role of their owner


@dataclass(frozen=True)
class Group:
    """The same in every worker."""

    folder: Path
    token: int
    checkpoint: Path | None
    start: int  # the first step to do

    def check(self) -> None:
        """Raises SupersededError once other workers have taken the run over."""
        if is_superseded(self.folder, self.token):
            raise SupersededError(f"{self.folder}: other workers have taken the run over")


def join_group(folder: Path, holder: dict[str, Any]) -> Group:
    """`holder` is the driver that started these workers; it must still hold the run."""
    context = ray.train.get_context()
    if context.get_world_size() == 1:
        return _form_group(folder, holder)
    # By torch's process group: Ray's own broadcast waits for an actor of its own to start.
    told = [_form_group(folder, holder) if context.get_world_rank() == 0 else None]
    torch.distributed.broadcast_object_list(told)
    return told[0]


def _form_group(folder: Path, holder: dict[str, Any]) -> Group:
    owners = read_owners(folder)
    if owners[-1].holder != holder:
        raise SupersededError(f"{folder}: another process has taken the run over")
    checkpoint = newest_checkpoint(folder / CHECKPOINTS)
    start = read_manifest(checkpoint).step if checkpoint else 0
    owner = add_owner(folder, owners[-1], WORKERS, start, holder)
    return Group(folder, owner.token, checkpoint, start)
