"""CUDA graphs: launches recorded once and replayed, so that the device does not wait for a host."""

from collections.abc import Callable
from typing import Any

import torch

from arbitor.kernel.backend import active_backend


def can_record(device: torch.device) -> bool:
    """Whether ops on `device` launch kernels only; those of the torch path ask the device."""
    return device.type == "cuda" and active_backend() == "triton"


class Recording:
    """The launches of `function`, which has run before and reads and writes tensors in place.

    Making it launches nothing; `result` is what the function returned, filled by each replay.
    """

    def __init__(self, function: Callable[[], Any]):
        self._graph = torch.cuda.CUDAGraph()
        # Threads beside this one may use the device: the backward pass has its own.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.result = function()

    def replay(self) -> None:
        self._graph.replay()
