"""The integer update: order, blocks, threads, awkward gradients, start, polarity."""

import copy
import math

import pytest
import torch

from arbitor.kernel.latent_update import fixed_point as fp
from arbitor.kernel.latent_update import moments, state
from arbitor.kernel.latent_update import reference as rule
from arbitor.kernel.latent_update import slots as slot_integers
from arbitor.kernel.latent_update import state as start
from arbitor.kernel.latent_update.slots import slot_format_of
from tests.arbitor.plain_update import plain_update
from tests.arbitor.update_cases import (
    RATES,
    SHAPES,
    assert_equal_states,
    fresh_state,
    random_gradient,
    step_on,
)

# ---- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [4, 17])
def test_order_and_split_of_slots_do_not_matter(slots):
    slot_format = slot_format_of(slots)
    grads = [random_gradient(33, 320, seed) for seed in range(4)]
    state = fresh_state(33, 320, grads)
    exponent = slot_integers.row_exponents(state.row_moment, slot_format)
    integers = [
        slot_integers.quantize_slot(grad, exponent, slot_format, 8 + s)[0]
        for s, grad in enumerate(grads)
    ]
    sums = [
        integers[0] + integers[1] + integers[2] + integers[3],
        integers[3] + integers[1] + integers[0] + integers[2],
        (integers[2] + integers[0]).int() + (integers[1] + integers[3]).int(),
    ]
    states = [copy.deepcopy(state) for _ in sums]
    for copied, total in zip(states, sums, strict=True):
        rule.update(copied, total, slot_format, RATES, 9)
    assert_equal_states(states[0], states[1])
    assert_equal_states(states[0], states[2])


def test_blocks_and_threads_do_not_change_the_state(monkeypatch):
    slot_format = slot_format_of(17)
    grads = [random_gradient(70, 193, seed) for seed in range(2)]
    states = []
    threads = torch.get_num_threads()
    for block_elements, num_threads in ((1 << 17, 1), (1 << 17, 2), (1, 2), (1000, 1)):
        monkeypatch.setattr(fp, "BLOCK_ELEMENTS", block_elements)
        torch.set_num_threads(num_threads)
        states.append(fresh_state(70, 193, grads))
        for step in range(3):
            step_on(states[-1], grads, slot_format, step)
    torch.set_num_threads(threads)
    for other in states[1:]:
        assert_equal_states(states[0], other)


# ---- awkward gradients --------------------------------------------------------------------------


def test_rows_and_columns_without_gradient_keep_their_moments():
    slot_format = slot_format_of(4)
    grad = random_gradient(70, 192)
    grad[3], grad[:, 7] = 0, 0
    state = fresh_state(70, 192, [grad])
    assert state.row_moment[3] == state.row_moment.max() - 1024
    assert state.col_moment[7] == state.col_moment.max() - 1024
    before = copy.deepcopy(state)
    step_on(state, [grad], slot_format)
    assert state.row_moment[3] == before.row_moment[3]
    assert state.col_moment[7] == before.col_moment[7]
    assert torch.equal(state.latent[3], before.latent[3])
    assert torch.equal(state.latent[:, 7], before.latent[:, 7])
    assert state.log2_scale[3] == before.log2_scale[3]


def test_an_all_zero_step_keeps_every_moment_and_shrinks_momentum():
    slot_format = slot_format_of(4)
    grad = random_gradient(70, 192)
    state = fresh_state(70, 192, [grad])
    step_on(state, [grad], slot_format)
    before = copy.deepcopy(state)
    step_on(state, [torch.zeros_like(grad)], slot_format, step=1)
    for name in ("row_moment", "col_moment", "tensor_moment"):
        assert torch.equal(getattr(state, name), getattr(before, name))

    def size(state):
        unit = torch.exp2(state.momentum_exponent.double()).repeat_interleave(64, dim=1)
        return float((state.momentum * unit).abs().mean())

    assert size(state) == pytest.approx(0.8984375 * size(before), rel=1e-3)


def test_calibration_of_a_zero_gradient_changes_nothing():
    state = start.init_state(4, 5, 1.0, seed=0, name="w")
    before = copy.deepcopy(state)
    assert not start.calibrate(state, torch.zeros(4, 5, dtype=torch.int64))
    assert_equal_states(state, before)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 30)])
def test_calibration_is_the_rms_of_the_sum(shape):
    grad = random_gradient(*shape).double()
    if shape == (40, 30):
        grad[0] *= 1e7
    state = fresh_state(*shape, [grad.float()])
    for moment, mean in (
        (state.row_moment, grad.square().mean(1)),
        (state.col_moment, grad.square().mean(0)),
        (state.tensor_moment, grad.square().mean()),
    ):
        assert ((moment - 128 * torch.log2(mean)).abs() < 0.6).all()


def test_a_spike_moves_latents_no_further_than_the_clip():
    slot_format = slot_format_of(4)
    grad = random_gradient(70, 192)
    state = fresh_state(70, 192, [grad])
    for step in range(3):
        step_on(state, [grad], slot_format, step)
    before = copy.deepcopy(state)
    step_on(state, [50 * grad], slot_format, 3)
    moved = (state.latent.int() - before.latent.int()).abs()
    assert moved.max() == 9  # three rates of 3
    assert (state.row_moment > before.row_moment).all()
    assert ((state.log2_scale - before.log2_scale).abs() <= 8).all()  # 3 * 2.56, rounded


def test_huge_and_tiny_entries():
    slot_format = slot_format_of(4)
    grad = random_gradient(33, 320)
    state = fresh_state(33, 320, [grad])
    grad[0, 0], grad[1, 1], grad[2, 2] = 1e9, 1e-40, math.nan
    exponent = slot_integers.row_exponents(state.row_moment, slot_format)
    integers, nonfinite, clipped = slot_integers.quantize_slot(grad, exponent, slot_format, 0)
    assert (nonfinite, clipped) == (1, 1)
    assert integers[0, 0] == 2047 and integers[1, 1] == 0 and integers[2, 2] == 0
    expected = plain_update(state, integers, slot_format, RATES, 3)
    rule.update(state, integers, slot_format, RATES, 3)
    assert state.latent.tolist() == expected["latent"]


# ---- start, statistics, polarity ----------------------------------------------------------------


def test_initial_latents_are_normal_and_keyed():
    state = start.init_state(500, 400, math.sqrt(2), seed=3, name="blocks.0.up")
    latent = state.latent.double()
    deviation = 52.5
    assert abs(latent.mean()) < 4 * 127 / math.sqrt(latent.numel())
    for rank in (10, 90):  # clamped at 127
        share = math.erf((rank + 0.5) / deviation / math.sqrt(2))
        assert abs((latent.abs() <= rank).double().mean() - share) < 4 * 0.5 / 447
    share = math.erf(21.5 / deviation / math.sqrt(2))
    assert abs((start.trits(state.latent) == 0).double().mean() - share) < 4 * 0.5 / 447
    assert latent.min() == -127 and latent.max() == 127
    assert state.log2_scale.unique().tolist() == [round(128 * math.log2(2 / 400 / 0.69))]
    same = start.init_state(500, 400, math.sqrt(2), seed=3, name="blocks.0.up")
    assert_equal_states(state, same)
    for seed, name in ((4, "blocks.0.up"), (3, "blocks.1.up")):
        assert not torch.equal(start.init_state(500, 400, 1.0, seed, name).latent, state.latent)


def test_initial_thresholds_are_the_normal_distribution():
    for rank, threshold in enumerate(state._normal_thresholds().tolist()):
        below = 0.5 * (1 + math.erf((rank - 126.5) / 52.5 / math.sqrt(2)))
        assert abs(threshold - 2**32 * below) < 2


def test_trits():
    latent = torch.tensor([-127, -22, -21, 0, 21, 22, 127], dtype=torch.int8)
    assert start.trits(latent).tolist() == [-1, -1, 0, 0, 0, 1, 1]


def test_stats_count_the_state():
    grad = random_gradient(70, 193)
    state = fresh_state(70, 193, [grad])
    before = start.trits(state.latent)
    for step in range(3):
        stats = step_on(state, [grad], slot_format_of(4), step)
        after = start.trits(state.latent)
        assert stats.flips == int((before != after).sum())
        assert stats.zeros == int((after == 0).sum())
        assert stats.saturated == int((state.latent.int().abs() == 127).sum())
        before = after


def weight_of(state) -> torch.Tensor:
    scale = torch.exp2(state.log2_scale.float() / 256)
    return scale.unsqueeze(1) * start.trits(state.latent)


@pytest.mark.parametrize("slots", [4, 17])
def test_a_regression_is_learned(slots):
    slot_format = slot_format_of(slots)
    teacher = weight_of(start.init_state(24, 100, 1.0, seed=8, name="teacher"))
    state = start.init_state(24, 100, 0.5, seed=9, name="student")
    losses = []
    for step in range(120):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(slots * 4, 100, generator=generator)
        error = x @ (weight_of(state) - teacher).T
        losses.append(float(error.square().mean()))
        grads = [error[s::slots].T @ x[s::slots] / len(x) for s in range(slots)]
        if step == 0:
            start.calibrate(state, sum(slot_integers.quantize_exact(grad) for grad in grads))
        step_on(state, grads, slot_format, step)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_latent_rate_of_zero_moves_scales_alone():
    grad = random_gradient(70, 192)
    state = fresh_state(70, 192, [grad])
    before = copy.deepcopy(state)
    # The gradient of a weight that should grow: every row scale must rise.
    grad = -start.trits(state.latent) * 1e-4
    for step in range(5):
        stats = step_on(state, [grad], slot_format_of(4), step, moments.step_rates(0, 167772))
        assert stats.flips == 0
    assert torch.equal(state.latent, before.latent)
    assert (state.log2_scale > before.log2_scale).all()
