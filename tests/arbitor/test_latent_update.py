"""The integer update against its formulas in plain Python, and against the float rule."""

import copy

import pytest
import torch

from arbitor.kernel.latent_update import fixed_point as fp
from arbitor.kernel.latent_update import moments, slots
from arbitor.kernel.latent_update import reference as rule
from arbitor.kernel.latent_update import state as start
from arbitor.kernel.latent_update.slots import slot_format_of
from arbitor.kernel.state_format import INT8
from tests.arbitor.plain_update import plain_update
from tests.arbitor.update_cases import (
    FORMATS,
    RATES,
    SHAPES,
    fresh_state,
    random_gradient,
    slot_sum,
    step_on,
)


@pytest.mark.parametrize("slots", [4, 16, 17, 300])
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (9, 63), (5, 65), (12, 192)])
def test_update_is_the_specification(monkeypatch, shape, slots):
    steps_are_the_specification(monkeypatch, shape, slots, INT8)


@pytest.mark.parametrize("slots", [4, 300])
@pytest.mark.parametrize("shape", [(1, 70), (9, 63), (12, 192)])
@pytest.mark.parametrize("format", FORMATS[1:], ids=str)
def test_update_in_fewer_bits_is_the_specification(monkeypatch, shape, slots, format):
    steps_are_the_specification(monkeypatch, shape, slots, format)


def steps_are_the_specification(monkeypatch, shape, slots, format):
    monkeypatch.setattr(fp, "BLOCK_ELEMENTS", 4 * shape[1])
    slot_format = slot_format_of(slots)
    grads = [random_gradient(*shape, seed) for seed in range(2)]
    grads[0][shape[0] // 2] *= 2.0**-24  # a row far below the rest: its columns' share is cut
    grads[1][shape[0] // 2] = 0
    state = fresh_state(*shape, grads, format)
    bits = (format.momentum_bits, format.latent_bits)
    scales = [1.0, 1.0, 50.0, 0.0, 2.0**-12, 0.3]
    for step, scale in enumerate(scales):
        total = slot_sum(state, [grad * scale for grad in grads], slot_format, step)
        key = fp.stream_key(1, step, 7, fp.STREAM_UPDATE)
        expected = plain_update(state, total, slot_format, RATES, key, *bits)
        rule.update(state, total, slot_format, RATES, key, format)
        for name, values in expected.items():
            assert getattr(state, name).tolist() == values, (name, step)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("slots", [4, 16, 17, 300])
def test_largest_sums_stay_in_range(slots, format):
    """Every integer at its bound: sums +-S qmax, momentum at its rail and the largest shift."""
    slot_format = slot_format_of(slots)
    state = fresh_state(3, 130, [random_gradient(3, 130)], format)
    signs = torch.where(random_gradient(3, 130) < 0, -1, 1)
    state.momentum.copy_(format.largest_momentum * signs)
    state.momentum_exponent.fill_(127)
    state.latent.copy_(format.largest_latent * signs)
    total = (slots * slot_format.qmax * signs).to(slot_format.sum_dtype)
    bits = (format.momentum_bits, format.latent_bits)
    expected = plain_update(state, total, slot_format, RATES, 5, *bits)
    stats = rule.update(state, total, slot_format, RATES, 5, format)
    for name, values in expected.items():
        assert getattr(state, name).tolist() == values, name
    assert stats.zeros == 0


# ---- against the float rule ---------------------------------------------------------------------


@pytest.mark.parametrize("slots", [4, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_step_is_the_float_rule_up_to_rounding(shape, slots):
    slot_format = slot_format_of(slots)
    grads = [random_gradient(*shape, seed) for seed in range(2)]
    state = fresh_state(*shape, grads)
    for step in range(4):
        before = copy.deepcopy(state)
        step_on(state, grads, slot_format, step)
        compare_with_float_rule(
            before, state, slot_sum(before, grads, slot_format, step), slot_format
        )


def compare_with_float_rule(before, after, total, slot_format):
    """The rule of `reference.py` in float64, from the integer state before."""
    t = int(after.num_updates)
    exponent = slots.row_exponents(before.row_moment, slot_format).double().unsqueeze(1)
    grad = total.double() * torch.exp2(-exponent)
    weight = min(243, 256 * (t - 1) // t) / 256

    def rms(moment):
        return torch.exp2(moment.double() / 256)

    # Moments: one unit of stochastic rounding, half a unit from the ratio cut to 1/256 octave.
    for name, mean in (
        ("row_moment", grad.square().mean(1)),
        ("col_moment", grad.square().mean(0)),
        ("tensor_moment", grad.square().mean().reshape(1)),
    ):
        old = getattr(before, name)
        new = 128 * torch.log2(weight * rms(old).square() + (1 - weight) * mean)
        assert ((getattr(after, name) - new).abs()[mean > 0] < 1.6).all(), name

    def momentum(state):
        unit = torch.exp2(state.momentum_exponent.double()).repeat_interleave(64, dim=1)
        return state.momentum * unit[:, : total.shape[1]], unit[:, : total.shape[1]]

    blended = 0.8984375 * momentum(before)[0] + 0.1015625 * grad
    stored, unit = momentum(after)
    # One unit of stochastic rounding and what the shift of the old momentum cut.
    cut = torch.exp2(-exponent - slots.fraction_bits(slot_format) - 8)
    assert ((stored - blended).abs() <= unit + cut).all()

    bias = 1 - 0.8984375**t
    rows = rms(before.row_moment / 1).unsqueeze(1) / rms(before.tensor_moment)
    step = 3 * (stored / bias / (rows * rms(before.col_moment))).clamp(-3, 3)
    target = (before.latent - step).clamp(-127, 127)
    # One latent of stochastic rounding; 0.4 % for exponents in 1/256 octave and 11-bit powers.
    assert ((after.latent - target).abs() < 1 + 0.004 * step.abs()).all()

    scale_grad = (blended * start.trits(before.latent)).sum(1)
    normalized = (scale_grad.abs() / bias / rms(after.scale_moment)).clamp(max=3)
    target = before.log2_scale - 2.56 * normalized * scale_grad.sign()
    # Likewise; a sum that cancels keeps the error of the cut above.
    noise = cut.squeeze(1) * total.shape[1] / bias / rms(after.scale_moment)
    assert ((after.log2_scale - target).abs() < 1.04 + 2.56 * noise).all()


def test_latents_move_without_bias():
    """Over many weights the mean movement is the mean step, not only up to one latent."""
    slot_format = slot_format_of(4)
    state = fresh_state(256, 256, [torch.full((256, 256), 1e-4)])
    before = state.latent.double().clamp(-120, 120)
    state.latent.copy_(before)
    step_on(state, [torch.full((256, 256), 1e-4)], slot_format, rates=moments.step_rates(20000, 0))
    moved = (before - state.latent).mean()
    assert abs(moved - 20000 / 65536) < 0.004 * 0.3 + 4 * 0.46 / 256
