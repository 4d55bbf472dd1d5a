"""Proves that nothing persistent is float: `python -m arbitor.audit CONFIG`.

Trains one step on made-up slots of every modality that the model has an encoder for, then lists
every tensor that is still alive in the process. A run's own config.yaml says what it built. Bits
per weight are 16.125 + 48/K + 16/N, and 48 bits a matrix for tensor moment and update count; 4 less
with momentum of 4 bits, 2 less with latents of 6, 8/group_size more with group exponents. Under
`bigint` they are 2 + 64/group_size + 16/K, and 64 bits a matrix for the step counter.
"""

import gc
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arbitor.audio_codec import NUM_CODES, NUM_LEVELS
from arbitor.batch import SlotBatch
from arbitor.errors import UserError
from arbitor.kernel.ternary_scale import TernaryWeight
from arbitor.main import ARBModel, ModelConfig
from arbitor.modality import MODALITIES
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


def main() -> None:
    try:
        sys.exit(audit_command(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def audit_command(arguments: list[str]) -> int:
    """Prints the audit of a configuration's model; 1 if a float persists, else 0."""
    if len(arguments) != 1:
        raise UserError("expected one CONFIG file: python -m arbitor.audit CONFIG")
    values = read_yaml(arguments[0])
    update = build(UpdateConfig, section(values, "update"), "update")
    model = ARBModel(build(ModelConfig, section(values, "model"), "model"), 0, update)
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
    modalities = [name for name in MODALITIES if getattr(model.config, f"enable_{name}", False)]
    slots = [made_up_slot(model.config, name, i) for i, name in enumerate(["text", *modalities])]
    optimizer = TernaryOptimizer(model, config, total_steps=1, slots_per_step=len(slots), seed=0)
    train_step(SlotRunner(model, optimizer), 0, slots)
    return optimizer


def made_up_slot(config: ModelConfig, modality: str, slot: int) -> SlotBatch:
    """Two sequences of random bytes; of the other modalities random content after them."""
    random = np.random.default_rng(0)
    symbols = random.integers(0, NUM_BYTES, (2, 17), dtype=np.uint16)
    content = None
    if modality == "audio":
        content = random.integers(0, NUM_LEVELS, (2, 4, NUM_CODES), dtype=np.uint8)
    elif modality != "text":
        grid = getattr(config, modality)
        shape = (2, grid.frames * grid.patches_per_frame, grid.patch_values)
        content = random.integers(0, 256, shape, dtype=np.uint8)
    if content is not None:
        begin, place, end = CONTENT_SYMBOLS[modality]
        shown = np.array([begin, *[place] * content.shape[1], end], np.uint16)
        symbols = np.concatenate([symbols, np.tile(shown, (2, 1))], axis=1)
    return SlotBatch.from_symbols(
        symbols, step=0, slot=slot, source="audit", modality=modality, content=content
    )


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
    main()
