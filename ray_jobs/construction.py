"""What of the model a run builds: what its sources need at some step, and nothing else."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from arbitor.encoder.image import PatchGrid
from arbitor.errors import UserError
from arbitor.modality import BYTE_MODALITIES, MODALITIES
from data_pipeline.schema import DataConfig
from ray_jobs.config import RunConfig

_CONTENT_MODALITIES = [name for name in MODALITIES if name not in BYTE_MODALITIES]
_HEADS = {"talker_head": {"audio"}, "video_head": {"image", "video"}}


def with_needed_parts(config: RunConfig) -> RunConfig:
    """The same run with every part of the model decided: encoders and heads by the sources' weights
    where the config leaves them open, shapes by its data section.

    Raises UserError for a source whose encoder is switched off, and for parts that do not fit.
    """
    needed = {source.modality for source in config.data.active_sources.values()}
    parts: dict[str, Any] = {}
    for name in _CONTENT_MODALITIES:
        given = getattr(config.model, f"enable_{name}")
        if given is False and name in needed:
            raise UserError(
                f"model.enable_{name}: is false, but a source of {name} has a weight above 0; leave"
                f" it out, or set that weight to 0"
            )
        parts[f"enable_{name}"] = name in needed if given is None else given
    built = {name for name in _CONTENT_MODALITIES if parts[f"enable_{name}"]}
    for name, modalities in _HEADS.items():
        wanted = getattr(config.model, f"enable_{name}") is not False
        parts[f"enable_{name}"] = wanted and bool(modalities & built)
    parts["enable_output_router"] = config.model.enable_output_router and bool(built)
    grids = {name: _grid(config.data, name) for name in ("image", "video") if name in built}
    model = replace(config.model, **parts, **grids)
    model.validate()
    return replace(config, model=model)


def _grid(data: DataConfig, modality: str) -> PatchGrid:
    media = getattr(data, modality)
    grid = PatchGrid(media.patch, media.size // media.patch)
    if modality == "image":
        return grid
    return replace(grid, frames=media.num_frames, frames_per_second=media.frames_per_second)


def refuse_unbuilt(before: Mapping[str, Any], now: Mapping[str, Any], folder: str) -> None:
    """Raises UserError if a run would go on with a modality that its model was built without.

    Both are flattened configurations with every part decided.
    """
    for name in _CONTENT_MODALITIES:
        key = f"model.enable_{name}"
        if now[key] and not before[key]:
            raise UserError(
                f"{folder}: was built without {name}, whose weight was 0 at every step; set it to 0"
                f" again, or give --run another name to train with {name} from the first step"
            )
