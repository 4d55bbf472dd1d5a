"""Which implementation of the ternary ops runs."""

import warnings

import torch

BACKENDS = ("auto", "torch", "triton")


def resolve_backend(requested: str) -> str:
    """The backend that will really run for a requested one of `BACKENDS`.

    Without a GPU the Triton kernels cannot run: asking for them warns and takes the torch path, so
    that a command written for a cluster works on a laptop.
    """
    if requested == "triton" and not torch.cuda.is_available():
        warnings.warn(
            "backend triton needs a CUDA device and there is none; running the torch path",
            stacklevel=2,
        )
    return "torch"
