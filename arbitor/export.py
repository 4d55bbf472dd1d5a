"""A finished model in one file: `python -m arbitor.export RUN --out FILE`; how to open any model.

The file is safetensors. Of a ternary weight NAME of N rows and K columns it holds
- `NAME.packed_trits` uint8 [ceil(N K / 5)]: trits row by row, five a byte, byte = c0 + 3 c1 + 9 c2
  + 27 c3 + 81 c4 with c = trit + 1; the last byte is filled up with codes 0;
- `NAME.log2_scale` int16 [N], 1/256 octave: weight = trit * 2^(log2_scale / 256);
- `NAME.group_scale` where groups of `group_size` columns have scales: [N, ceil(K / group_size)],
  int8 whole octaves or int16 1/256 octave, which multiply those of the row.
Every other tensor is what the model's state has under that name. The metadata are `format`
("arbitor-packed-trits"), `step` and `config`, JSON of the run's `seed` (of the noise that losses of
pictures and films are computed with) and of its sections `model` and `update` (the form of the
state). 1.6 bits a weight and 16 a row; 8 or 16 / group_size more for groups.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arbitor.checkpoint import CHECKPOINTS, MANIFEST, load_checkpoint, newest_checkpoint
from arbitor.errors import UserError, end_with
from arbitor.kernel.matmul.plane import pack_plane
from arbitor.kernel.packed_weight import GroupedPackedState, PackedState
from arbitor.kernel.packing.reference import pack_base3, unpack_base3
from arbitor.kernel.state_format import StateFormat
from arbitor.main import ARBModel, ModelConfig
from arbitor.settings import build, build_part, section

FORMAT = "arbitor-packed-trits"


@dataclass(frozen=True)
class OpenedModel:
    """A model with packed weights, on the CPU, and how far it was trained."""

    model: ARBModel
    format: StateFormat
    seed: int
    step: int
    path: Path  # the checkpoint's folder or the exported file


def open_model(path: Path) -> OpenedModel:
    """From a run's folder (its newest checkpoint), a checkpoint's folder or an exported file."""
    if path.is_file():
        return _open_exported(path)
    if (path / MANIFEST).is_file():
        return _open_checkpoint(path)
    newest = newest_checkpoint(path / CHECKPOINTS)
    if newest is None:
        raise UserError(
            f"{path}: holds no checkpoint; give a run's folder, a checkpoint's folder"
            " or a file of arbitor.export"
        )
    return _open_checkpoint(newest)


def export(opened: OpenedModel, path: Path) -> int:
    """Writes the file; the bytes of its tensors."""
    state = opened.model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, weight in opened.model.ternary_weights():
        tensors[f"{name}.packed_trits"] = pack_base3(weight.trits())
        del state[f"{name}.plane"]
    tensors |= {name: tensor.contiguous() for name, tensor in state.items()}
    sections = {"model": asdict(opened.model.config), "update": asdict(opened.format)}
    config = {"seed": opened.seed} | sections
    metadata = {"format": FORMAT, "step": str(opened.step), "config": json.dumps(config)}
    partial = path.with_name(f".partial-{path.name}")
    try:
        save_file(tensors, partial, metadata)
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _open_checkpoint(folder: Path) -> OpenedModel:
    manifest, tensors = load_checkpoint(folder)
    model, format, seed = _without_weights(manifest.config, tensors)
    _assign(model, tensors, folder)
    model.pack()
    return OpenedModel(model, format, seed, manifest.step, folder)


def _open_exported(path: Path) -> OpenedModel:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a file of arbitor.export ({error})") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a file of arbitor.export; expected the format {FORMAT}")
    model, format, seed = _without_weights(json.loads(metadata["config"]), tensors)
    for name, weight in model.ternary_weights():
        packed = tensors.pop(f"{name}.packed_trits", None)
        if packed is None:
            raise UserError(f"{path}: lacks {name}.packed_trits; export the model again")
        plane_NQ = pack_plane(unpack_base3(packed, (weight.num_rows, weight.num_cols)))
        tensors[f"{name}.plane"] = plane_NQ
        kind = GroupedPackedState if weight.group_size else PackedState
        weight.load(kind(*(tensors.get(f"{name}.{field.name}") for field in fields(kind))))
    _assign(model, tensors, path)
    return OpenedModel(model, format, seed, int(metadata["step"]), path)


def _without_weights(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[ARBModel, StateFormat, int]:
    """The model that a run's configuration describes, all tensors on the meta device; the form of
    its state and the run's seed."""
    format = build_part(StateFormat, section(config, "update"), "update")
    seed = config.get("seed", 0)
    with torch.device("meta"):
        model_config = build(ModelConfig, section(config, "model"), "model")
        return ARBModel(model_config, seed, format, tensors), format, seed


def _assign(model: ARBModel, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: tensors are not those of its configuration ({reason})") from error


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="arbitor.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder or a checkpoint's")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    opened = open_model(options.run)
    num_bytes = export(opened, options.out)
    num_weights = sum(weight.num_weights for _, weight in opened.model.ternary_weights())
    print(
        f"{options.out}: step {opened.step}, {num_weights:,} weights in {num_bytes:,} bytes,"
        f" {8 * num_bytes / num_weights:.3f} bits a weight"
    )


if __name__ == "__main__":
    end_with(main)
