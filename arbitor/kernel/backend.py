"""Which implementation of the ternary ops runs, and which one really did.

One function per op in the `op.py` of its folder asks here and counts the path that it took.
"""

import os
import warnings
from collections import Counter

import torch
from torch import Tensor

from arbitor.errors import UserError

BACKENDS = ("auto", "torch", "triton", "tilelang")
BACKEND_VARIABLE = "ARB_TERNARY_BACKEND"
TILELANG_TRAINING_VARIABLE = "ARB_TILELANG_TRAINING"

_active: str | None = None
_path_counts: Counter[tuple[str, str]] = Counter()


def resolve_backend(requested: str = "auto") -> str:
    """The backend that will really run for a requested one of `BACKENDS`.

    A request other than "auto" wins over ARB_TERNARY_BACKEND. Without a GPU the Triton kernels
    cannot run: asking for them warns and takes the torch path, so that a command written for a
    cluster works on a laptop. TRITON_INTERPRET=1 runs them in Triton's interpreter.
    """
    if requested == "auto":
        requested = os.environ.get(BACKEND_VARIABLE, "auto")
    if requested not in BACKENDS:
        raise UserError(f"backend: expected one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "auto":
        return "triton" if torch.cuda.is_available() else "torch"
    if requested == "triton" and not (torch.cuda.is_available() or _interpreting()):
        warnings.warn(
            "backend triton needs a CUDA device and there is none; running the torch path",
            stacklevel=2,
        )
        return "torch"
    return requested


def set_backend(requested: str = "auto") -> str:
    """Resolves the backend and makes every op of this process use it; returns it."""
    global _active
    _active = resolve_backend(requested)
    return _active


def active_backend() -> str:
    """The backend in use; the environment decides where nobody has called `set_backend`."""
    return _active or set_backend()


def runs_triton(tensor: Tensor) -> bool:
    """Whether an op on `tensor` takes the Triton path, as what TileLang does not cover does too.

    Where torch.compile traces an op, it gets the plain torch that it can fuse.
    """
    if torch.compiler.is_compiling() or active_backend() == "torch":
        return False
    return tensor.is_cuda or (active_backend() == "triton" and _interpreting())


def refuse_tilelang_training(rule: str) -> None:
    """Raises under the backend tilelang, which is for inference, unless the variable is set.

    Even then it trains with the rule `bigint` alone: its correlation runs as a Triton kernel, on
    gradients of plain matmuls.
    """
    if active_backend() != "tilelang":
        return
    if os.environ.get(TILELANG_TRAINING_VARIABLE) != "1":
        raise UserError(
            "backend tilelang is for inference; train with --backend triton, or set"
            f" {TILELANG_TRAINING_VARIABLE}=1 to train with update.rule=bigint all the same"
        )
    if rule != "bigint":
        raise UserError(
            f"backend tilelang: {TILELANG_TRAINING_VARIABLE}=1 trains with update.rule=bigint"
            f" alone, got {rule}; set that rule or --backend triton"
        )


def count_path(op: str, path: str) -> None:
    """Notes that `op` ran on `path`: torch, triton, plane, cublas or tilelang; none if compiled."""
    if torch.compiler.is_compiling():
        return
    _path_counts[op, path] += 1


def path_counts() -> dict[tuple[str, str], int]:
    """How often each (op, path) has run since the last `clear_path_counts`."""
    return dict(_path_counts)


def clear_path_counts() -> None:
    _path_counts.clear()


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
