"""What of the model a run builds: what its sources need at some step, and nothing else."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from arbitor.encoder.image import PatchGrid
from arbitor.errors import UserError
from arbitor.model_config import with_decided_parts
from arbitor.vocab import CONTENT_SYMBOLS
from data_pipeline.schema import DataConfig
from ray_jobs.config import RunConfig


def with_needed_parts(config: RunConfig) -> RunConfig:
    """The same run with every part of the model decided: encoders and heads by the sources' weights
    where the config leaves them open, shapes by its data section.

    Raises UserError for a source whose encoder is switched off, and for parts that do not fit.
    """
    needed = {source.modality for source in config.data.active_sources.values()}
    grids = {name: _grid(config.data, name) for name in ("image", "video")}
    return replace(config, model=with_decided_parts(config.model, needed, grids))


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
    for name in CONTENT_SYMBOLS:
        key = f"model.enable_{name}"
        if now[key] and not before[key]:
            raise UserError(
                f"{folder}: was built without {name}, whose weight was 0 at every step; set it to 0"
                f" again, or give --run another name to train with {name} from the first step"
            )
