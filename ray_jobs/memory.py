"""A model that its device cannot hold is refused before it is built, with the arithmetic."""

import math
import os
from pathlib import Path

import torch

from arbitor.errors import UserError
from arbitor.main import ARBModel
from arbitor.update_rule import rule_of
from ray_jobs.config import RunConfig

_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of a container: cgroup v2, v1


def refuse_too_large(config: RunConfig, device: torch.device, workers_here: int) -> None:
    """Raises UserError if state and gradient sums alone exceed what one of `workers_here` has.

    That is the sure part: activations, gradients and the copy of a checkpoint come on top.
    """
    weights, state, sums = sure_bytes(config)
    is_gpu = device.type == "cuda"
    there = memory_bytes(device) // (1 if is_gpu else workers_here)
    if state + sums > there:
        which = str(device) if is_gpu else f"the machine's memory, shared by {workers_here} workers"
        raise UserError(
            f"model: its {weights / 1e9:.2f} billion weights need {_gib(state)} of state and"
            f" {_gib(sums)} of gradient sums in every worker, and activations on top; there are"
            f" {_gib(there)} ({which}): lower model.width or model.num_layers"
        )


def sure_bytes(config: RunConfig) -> tuple[int, int, int]:
    """Weights of the model, bytes of its state, bytes of its gradient sums."""
    with torch.device("meta"):  # shapes alone
        model = ARBModel(config.model, config.seed, config.update)
    rule = rule_of(config.update, config.steps, config.data.slots_per_step, config.seed)
    weights = [weight for _, weight in model.ternary_weights()]
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    entries = sum(math.prod(rule.sum_shape(weight)) for weight in weights)
    return sum(weight.num_weights for weight in weights), state, entries * rule.sum_dtype.itemsize


def memory_bytes(device: torch.device) -> int:
    """Of the GPU, or of this machine as far as its container may use it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path("/sys/fs/cgroup") / name for name in _LIMITS]
    texts = [path.read_text().strip() for path in limits if path.exists()]
    return min([total, *(int(text) for text in texts if text.isdigit())])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
