"""Processes that share the slots of a step unevenly and sum with gloo end with the bits of one."""

import pytest
import torch

from arbitor.main import ARBModel
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.trainer import SlotRunner, train_step
from benchmarks import scaling

TINY = "--width 64 --layers 1 --head-width 32 --length 32 --positions 64 --slots 3 --steps 2"


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_alone(options):
    model = ARBModel(scaling.model_config(options), seed=0)
    optimizer = TernaryOptimizer(
        model, UpdateConfig(), total_steps=1000, slots_per_step=options.slots, seed=0
    )
    run_slot = SlotRunner(model, optimizer)
    steps = scaling.make_steps(0, 1, options, torch.device("cpu"))
    for step in range(scaling.WARMUP_STEPS + options.steps):
        train_step(run_slot, step, steps[step])
    return model


def test_two_processes_end_with_the_bits_of_one(one_thread):
    options = scaling.parse(TINY.split())
    row = scaling.measure(2, options)
    assert row["exchanges_a_step"] == 3  # losses, counts, one bucket
    assert row["state_sha256"] == scaling.state_digest(train_alone(options))
