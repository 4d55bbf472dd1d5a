"""Proves that nothing persistent is float: `python -m arbitor.audit CONFIG`.

Trains one step on made-up slots of every modality that the model has an encoder for, then lists
every tensor that is still alive in the process. A run's own config.yaml also says what its job
left out. Bits per weight are 16.125 + 48/K + 16/N, and 48 bits a matrix for tensor moment and
update count; 4 less with momentum of 4 bits, 2 less with latents of 6, 8/group_size more with group
exponents. Under `bigint` they are 2 + 64/group_size + 16/K, and 64 bits a matrix for the step
counter.
"""

import gc
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arbitor.audio_codec import NUM_CODES, NUM_LEVELS
from arbitor.batch import SlotBatch
from arbitor.errors import UserError, end_with
from arbitor.kernel.ternary_scale import TernaryWeight
from arbitor.main import ARBModel
from arbitor.model_config import ModelConfig, read_model_config
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.settings import build, read_yaml, section
from arbitor.trainer import SlotRunner, train_step
from arbitor.vocab import CONTENT_SYMBOLS, NUM_BYTES


@dataclass(frozen=True)
class LiveTensor:
    """One tensor that outlives a step; `name` is empty if no module owns it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex


def audit_command(arguments: list[str]) -> int:
    """Prints the audit of a configuration's model; 1 if a float persists, else 0."""
    if len(arguments) != 1:
        raise UserError("expected one CONFIG file: python -m arbitor.audit CONFIG")
    values = read_yaml(arguments[0])
    update = build(UpdateConfig, section(values, "update"), "update")
    model = ARBModel(read_model_config(values), 0, update)
    optimizer = one_step(model, update)
    tensors = live_tensors(model)
    print(report(model, tensors))
    floats = [tensor for tensor in tensors if tensor.is_float]
    for tensor in floats:
        print(f"FLOAT: {tensor.name or 'a tensor no module owns'} {tensor.shape} {tensor.dtype}")
    del optimizer
    return 1 if floats else 0


def one_step(model: ARBModel, config: UpdateConfig) -> TernaryOptimizer:
    """Trains one step, of a slot a modality: then everything that persists has come into being."""
    slots = made_up_slots(model.config)
    optimizer = TernaryOptimizer(model, config, total_steps=1, slots_per_step=len(slots), seed=0)
    train_step(SlotRunner(model, optimizer), 0, slots)
    return optimizer


def made_up_slots(config: ModelConfig) -> list[SlotBatch]:
    """A slot of text and one of each modality with an encoder: two sequences of random bytes, with
    random content after them. All are as long: parts that count want as much from every slot."""
    modalities = [name for name in CONTENT_SYMBOLS if getattr(config, f"enable_{name}")]
    contents = {"text": None} | {name: _random_content(config, name) for name in modalities}
    longest = max(0 if content is None else content.shape[1] + 2 for content in contents.values())
    slots = []
    for slot, (modality, content) in enumerate(contents.items()):
        symbols = np.random.default_rng(0).integers(0, NUM_BYTES, (2, 17 + longest), np.uint16)
        if content is not None:
            begin, place, end = CONTENT_SYMBOLS[modality]
            shown = [begin, *[place] * content.shape[1], end]
            symbols[:, -len(shown) :] = shown
        slots.append(
            SlotBatch.from_symbols(
                symbols, step=0, slot=slot, source="audit", modality=modality, content=content
            )
        )
    return slots


def _random_content(config: ModelConfig, modality: str) -> np.ndarray:
    random = np.random.default_rng(0)
    if modality == "audio":
        return random.integers(0, NUM_LEVELS, (2, 4, NUM_CODES), np.uint8)
    grid = getattr(config, modality)
    shape = (2, grid.frames * grid.patches_per_frame, grid.patch_values)
    return random.integers(0, 256, shape, np.uint8)


def live_tensors(model: ARBModel) -> list[LiveTensor]:
    """Every tensor object alive in this process, the model's own first and by name."""
    gc.collect()
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules warn when their attributes are read
        alive = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    tensors = [
        LiveTensor(names.get(id(t), ""), tuple(t.shape), t.dtype, t.numel() * t.element_size())
        for t in alive
    ]
    return sorted(tensors, key=lambda tensor: (not tensor.name, tensor.name))


def report(model: ARBModel, tensors: list[LiveTensor]) -> str:
    """The table of live tensors and the bits per weight of every ternary matrix."""
    lines = [f"{'tensor':<58} {'shape':>14} {'dtype':>8} {'bytes':>12}"]
    for tensor in tensors:
        shape = "x".join(map(str, tensor.shape))
        dtype = str(tensor.dtype).removeprefix("torch.")
        lines.append(f"{tensor.name or '-':<58} {shape:>14} {dtype:>8} {tensor.num_bytes:>12,}")
    lines += ["", f"{'ternary matrix':<58} {'N x K':>14} {'bits per weight':>21}"]
    for name, weight in model.ternary_weights():
        shape = f"{weight.num_rows}x{weight.num_cols}"
        lines.append(f"{name:<58} {shape:>14} {bits_per_weight(weight):>21.3f}")
    weights = sum(weight.num_weights for _, weight in model.ternary_weights())
    total_bytes = sum(tensor.num_bytes for tensor in tensors)
    lines.append(f"\n{weights:,} weights, {total_bytes:,} bytes persist")
    return "\n".join(lines)


def bits_per_weight(weight: TernaryWeight) -> float:
    """All state of one matrix over its number of weights."""
    return 8 * sum(t.numel() * t.element_size() for t in weight.buffers()) / weight.num_weights


if __name__ == "__main__":
    end_with(audit_command)
