"""`init_from`: a new run that begins with the weights of another one.

It takes every tensor of a checkpoint, the update rule's state among them; step and schedule begin
at 0, data and seed are the new run's own. Which checkpoint it was stays in the run's configuration,
so that a restart before its first own checkpoint begins with the same one.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from arbitor.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    tensor_shapes,
)
from arbitor.errors import UserError
from arbitor.main import ARBModel
from ray_jobs.config import CONFIG, RunConfig, read_run_config

_NAMED = 8  # tensors in a message

Shapes = Mapping[str, tuple[int, ...]]


def with_pinned_weights(config: RunConfig) -> RunConfig:
    """The same run with `init_from` naming one checkpoint, whose tensors fit the run's model.

    Raises UserError if there is none or if they do not fit.
    """
    if not config.init_from:
        return config
    given = Path(config.init_from)
    if (config.folder / CONFIG).exists():
        before = read_run_config(config.folder).init_from
        if before and given in (Path(before), Path(before).parent.parent):
            return replace(config, init_from=before)  # chosen when the run began
    checkpoint = given if (given / MANIFEST).is_file() else newest_checkpoint(given / CHECKPOINTS)
    if checkpoint is None:
        raise UserError(f"init_from: {given} has no whole checkpoint; give a run or a checkpoint")
    read_manifest(checkpoint)
    _check_fit(config, checkpoint)
    print(f"begins with the weights of {checkpoint}")
    return replace(config, init_from=str(checkpoint))


def load_initial_weights(model: ARBModel, config: RunConfig) -> None:
    """Loads the tensors of the checkpoint, verified against its manifest."""
    model.load_state_dict(load_checkpoint(Path(config.init_from))[1])


def _check_fit(config: RunConfig, checkpoint: Path) -> None:
    with torch.device("meta"):  # shapes alone
        model = ARBModel(config.model, config.seed, config.update)
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = tensor_shapes(checkpoint)
    differ = [name for name in needed | found if needed.get(name) != found.get(name)]
    if differ:
        # Of each part its largest tensor: the others follow from it.
        sizes = {name: math.prod(needed.get(name) or found[name]) for name in differ}
        largest: dict[str, str] = {}
        for name in sorted(differ, key=lambda name: (sizes[name], name.endswith(".latent"))):
            largest[name.rpartition(".")[0]] = name
        named = [_difference(name, needed, found) for name in sorted(largest.values())]
        more = f" and {len(named) - _NAMED} more parts" if len(named) > _NAMED else ""
        raise UserError(
            f"init_from: {checkpoint} does not fit the model of this run"
            f" ({'; '.join(named[:_NAMED])}{more}); make model and update those of its config"
        )


def _difference(name: str, needed: Shapes, found: Shapes) -> str:
    if name not in found:
        return f"{name} is missing"
    if name not in needed:
        return f"{name} has no place"
    return f"{name} is {list(found[name])} instead of {list(needed[name])}"
