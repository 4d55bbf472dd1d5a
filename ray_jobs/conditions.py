"""The conditions under which a run's bits repeat: set in every worker, kept in every checkpoint."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from arbitor.checkpoint import load_checkpoint
from arbitor.errors import UserError
from arbitor.main import ARBModel
from data_pipeline.run_data import RunData
from ray_jobs.config import RunConfig


def set_conditions(config: RunConfig) -> None:
    """What the bits of a slot's gradient depend on is fixed here, never left to the host."""
    torch.set_num_threads(config.scaling.threads_per_worker)
    # The same as use_deterministic_algorithms(True), without a second of imports for compilers.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # every kernel writes all of it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses the above
    torch.backends.cuda.matmul.allow_tf32 = False


def conditions(config: RunConfig) -> dict[str, Any]:
    """The conditions under which a run's bits repeat, for the checkpoint's manifest."""
    if config.scaling.use_gpu:
        device = torch.cuda.get_device_name()
    else:
        device = torch.backends.cpu.get_cpu_capability()
    return {
        "device": device,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads_per_worker": config.scaling.threads_per_worker,
    }


def restore(model: ARBModel, checkpoint: Path, config: RunConfig, data: RunData) -> None:
    """Loads a checkpoint if data, plan and conditions are those that it was made with."""
    manifest, tensors = load_checkpoint(checkpoint)
    if manifest.plan_fingerprint != data.fingerprint and not config.resume.allow_changed_data:
        raise UserError(
            f"{checkpoint}: was made with other data or another plan; restore the data, or set"
            " resume.allow_changed_data=true"
        )
    now = conditions(config)
    changed = [f"{k} {old} -> {now[k]}" for k, old in manifest.conditions.items() if now[k] != old]
    if changed:
        raise UserError(
            f"{checkpoint}: bits would differ here ({'; '.join(changed)}); go on where it was made,"
            f" or begin a new run from it: --run NAME init_from={checkpoint.parent.parent}"
        )
    model.load_state_dict(tensors)
