"""What a model needs at least, against what a worker has."""

import re

import pytest
import torch

from arbitor.errors import UserError
from arbitor.main import ARBModel
from arbitor.optimizer import TernaryOptimizer
from arbitor.settings import build
from ray_jobs.config import RunConfig
from ray_jobs.memory import memory_bytes, refuse_too_large, sure_bytes

CPU = torch.device("cpu")
VALUES = {
    "name": "fits",
    "model": {"width": 64, "num_layers": 1},
    "data": {"slots_per_step": 4, "sources": {"text": {"path": "sample://text"}}},
}


def config_of_width(width, **update):
    values = VALUES | {"model": VALUES["model"] | {"width": width}, "update": update}
    return build(RunConfig, values)


@pytest.mark.parametrize("update", [{}, {"momentum_bits": 4}, {"rule": "bigint"}])
def test_the_sure_part_is_what_model_and_sums_take(update):
    config = config_of_width(64, **update)
    model = ARBModel(config.model, config.seed, config.update)
    optimizer = TernaryOptimizer(model, config.update, total_steps=1, slots_per_step=4, seed=0)
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    sums = sum(optimizer._sums[name].nbytes for name, _ in model.ternary_weights())
    assert sure_bytes(config) == (
        sum(w.num_weights for _, w in model.ternary_weights()),
        state,
        sums,
    )


def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic():
    refuse_too_large(config_of_width(64), CPU, workers_here=4)
    width = 1024
    while sum(sure_bytes(config_of_width(width))[1:]) <= memory_bytes(CPU):
        width *= 2
    with pytest.raises(UserError) as refused:
        refuse_too_large(config_of_width(width), CPU, workers_here=1)
    needed = sum(map(float, re.findall(r"([\d.]+) GiB of", str(refused.value))))
    (there,) = map(float, re.findall(r"([\d.]+) GiB \(", str(refused.value)))
    assert needed > there == pytest.approx(memory_bytes(CPU) / 2**30, abs=0.05)
    assert "lower model.width or model.num_layers" in str(refused.value)


def test_workers_of_a_machine_share_its_memory():
    config = config_of_width(4096)
    workers = memory_bytes(CPU) // sum(sure_bytes(config)[1:])
    refuse_too_large(config, CPU, workers)
    with pytest.raises(UserError, match=f"shared by {workers + 1} workers"):
        refuse_too_large(config, CPU, workers + 1)
