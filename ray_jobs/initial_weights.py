"""`init_from`: a new run that begins with the weights of another one.

It takes every tensor of a checkpoint, the update rule's state among them; step and schedule begin
at 0, data and seed are the new run's own. Which checkpoint it was stays in the run's configuration,
so that a restart before its first own checkpoint begins with the same one.
"""

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

_NAMED = 5  # tensors in a message


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
    faults = [f"{name} is missing" for name in sorted(needed.keys() - found.keys())]
    faults += [f"{name} has no place" for name in sorted(found.keys() - needed.keys())]
    faults += [
        f"{name} is {list(found[name])} instead of {list(needed[name])}"
        for name in sorted(needed.keys() & found.keys())
        if needed[name] != found[name]
    ]
    if faults:
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise UserError(
            f"init_from: {checkpoint} does not fit the model of this run"
            f" ({'; '.join(faults[:_NAMED])}{more}); make model and update those of its config"
        )
