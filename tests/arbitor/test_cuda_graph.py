"""Steps whose launches are recorded and replayed leave the bits of steps launched one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from arbitor import gradient_sums
from arbitor import optimizer as optimizer_module
from arbitor import trainer as trainer_module
from arbitor.batch import SlotBatch
from arbitor.kernel.backend import set_backend
from arbitor.main import ARBModel, ModelConfig
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.trainer import SlotRunner, train_step
from tests.arbitor.content_slots import ALL_PARTS, made_up_slot

CONFIG = ModelConfig(
    width=192, num_layers=2, enable_attention=True, attention_window=32, hca_stride=8
)
FULL = replace(
    CONFIG, enable_vq=True, enable_graph=True, enable_moe=True, enable_act=True, codebook_size=64
)
STEPS = 5


def make_batch(step, slot):
    # Two shapes of slots, so that two recordings take turns.
    shape = (4, 65) if slot % 3 else (2, 129)
    symbols = np.random.default_rng([step, slot]).integers(0, 256, shape, dtype=np.uint16)
    return SlotBatch.from_symbols(
        symbols, step=step, slot=slot, source="made-up", modality="text", device="cuda"
    )


def content_batch(step, slot):
    """A slot of pictures, sound or film; its noise is that of step and slot."""
    batch = made_up_slot(("image", "audio", "video")[slot % 3], seed=100 * step + slot)
    noise = torch.tensor([step, slot], dtype=torch.int32, device="cuda")
    tensors = {name: x.cuda() for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
    return replace(batch, step=step, slot=slot, **tensors | {"step_and_slot_2": noise})


class Done:
    """A sum over one worker."""

    def wait(self):
        pass


def trained(slots, options, model_config=CONFIG, make=make_batch, all_reduce=None):
    torch.use_deterministic_algorithms(True)
    set_backend("triton")
    config = UpdateConfig(warmup_steps=2, **options)
    with torch.device("cuda"):
        model = ARBModel(model_config, 0, config)
    optimizer = TernaryOptimizer(
        model, config, total_steps=STEPS, slots_per_step=slots, seed=0, all_reduce=all_reduce
    )
    run_slot = SlotRunner(model, optimizer)
    reports = [
        train_step(run_slot, step, [make(step, slot) for slot in range(slots)])
        for step in range(STEPS)
    ]
    torch.use_deterministic_algorithms(False)
    return model, reports, len(run_slot._recorded) + len(optimizer._recorded_updates)


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [3, 20], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": "bigint"},
        {"momentum_bits": 4, "latent_bits": 6},
        {"momentum_bits": 4, "group_size": 32},
    ],
    ids=str,
)
def test_recorded_steps_leave_the_bits_of_launched_ones(options, slots, monkeypatch):
    assert_recorded_as_launched(slots, options, CONFIG, 3, monkeypatch)


@pytest.mark.gpu
def test_recorded_steps_of_the_full_stack_count_as_launched_ones(monkeypatch):
    assert_recorded_as_launched(3, {}, FULL, 3, monkeypatch)


@pytest.mark.gpu
def test_recorded_steps_of_content_leave_the_bits_of_launched_ones(monkeypatch):
    # A slot of each modality and the update.
    assert_recorded_as_launched(3, {}, ALL_PARTS, 4, monkeypatch, content_batch)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"rule": "bigint"}], ids=str)
def test_recorded_buckets_of_an_exchange_leave_the_bits_of_one_worker(options, monkeypatch):
    monkeypatch.setattr(gradient_sums, "BUCKET_BYTES", 1 << 18)
    exchanged, reports, recordings = trained(3, options, all_reduce=lambda lanes: Done())
    assert recordings > 3
    alone, expected_reports, _ = trained(3, options)
    assert [*map(str, reports)] == [*map(str, expected_reports)]  # as text: NaN is NaN
    for (name, left), right in zip(exchanged.state_dict().items(), alone.buffers(), strict=True):
        assert torch.equal(left, right), name


def assert_recorded_as_launched(
    slots, options, model_config, expected_recordings, monkeypatch, make=make_batch
):
    recorded, reports, recordings = trained(slots, options, model_config, make)
    assert recordings == expected_recordings
    for module in (optimizer_module, trainer_module):
        monkeypatch.setattr(module, "can_record", lambda device: False)
    launched, expected_reports, recordings = trained(slots, options, model_config, make)
    assert recordings == 0
    assert [*map(str, reports)] == [*map(str, expected_reports)]  # as text: NaN is NaN
    for (name, left), right in zip(recorded.state_dict().items(), launched.buffers(), strict=True):
        assert torch.equal(left, right), name
