"""Gradients of one slot to integers: formats, bounds, rounding, what is not finite."""

import math

import pytest
import torch

from arbitor.kernel.latent_update import fixed_point as fp
from arbitor.kernel.latent_update.slots import (
    quantize_exact,
    quantize_slot,
    row_exponents,
    slot_format_of,
)

SLOT_COUNTS = (1, 4, 16, 17, 258, 259, 300)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_slot_formats():
    formats = {slots: slot_format_of(slots) for slots in SLOT_COUNTS}
    for slots in (1, 4, 16):
        slot_format = formats[slots]
        assert (slot_format.bits, slot_format.r0, slot_format.qmax, slot_format.stochastic) == (
            12,
            5,
            2047,
            False,
        )
    for slots in (17, 258, 259, 300):
        slot_format = formats[slots]
        assert (slot_format.bits, slot_format.r0, slot_format.qmax, slot_format.stochastic) == (
            8,
            3,
            127,
            True,
        )
    narrow = [slots for slots in SLOT_COUNTS if formats[slots].sum_dtype == torch.int16]
    assert narrow == [1, 4, 16, 17, 258]
    assert [formats[slots].sum_bits for slots in SLOT_COUNTS] == [11, 13, 15, 12, 15, 16, 16]


@pytest.mark.parametrize("slots", SLOT_COUNTS)
def test_worst_case_sums_do_not_overflow(slots):
    slot_format = slot_format_of(slots)
    grad = torch.tensor([[3e38, -3e38, 1e9, -1e9]])
    exponent = torch.tensor([20], dtype=torch.int32)
    total = torch.zeros(1, 4, dtype=slot_format.sum_dtype)
    for slot in range(slots):
        integers, nonfinite, clipped = quantize_slot(grad, exponent, slot_format, slot)
        assert (nonfinite, clipped) == (0, 4)
        total += integers
    assert total.tolist() == [[slots * slot_format.qmax * sign for sign in (1, -1, 1, -1)]]


def test_row_exponents_put_the_rms_at_r0():
    moment = torch.tensor([0, 127, 128, -2560, 32767, -32768], dtype=torch.int16)
    assert row_exponents(moment, slot_format_of(4)).tolist() == [5, 5, 4, 15, -100, 100]
    assert row_exponents(moment[:1], slot_format_of(17)).tolist() == [3]


def test_nearest_rounding():
    slot_format = slot_format_of(4)
    grad = torch.tensor([[0.49, 0.5, -0.49, -0.51, 2046.6, 2047.0, 1e-40, 0.0]]) / 1024
    integers, nonfinite, clipped = quantize_slot(grad, torch.tensor([10]).int(), slot_format, 0)
    assert integers.tolist() == [[0, 1, 0, -1, 2047, 2047, 0, 0]]
    assert integers.dtype == torch.int16 and (nonfinite, clipped) == (0, 0)


def test_stochastic_rounding_is_unbiased_and_keyed():
    slot_format = slot_format_of(17)
    grad = torch.full((256, 256), 3.3) * torch.tensor([1.0, -1.0]).repeat(128)
    exponent = torch.zeros(256, dtype=torch.int32)
    integers, _, _ = quantize_slot(grad, exponent, slot_format, 5)
    assert set((integers * grad.sign()).unique().tolist()) == {3, 4}
    # sd of a mean of 32768 coins with p = 0.3
    for sign in (0, 1):
        assert abs(abs(integers[:, sign::2].double().mean()) - 3.3) < 4 * 0.458 / 181
    assert torch.equal(quantize_slot(grad, exponent, slot_format, 5)[0], integers)
    assert not torch.equal(quantize_slot(grad, exponent, slot_format, 6)[0], integers)


@pytest.mark.parametrize("slots", [4, 17])
def test_nonfinite_entries_are_counted_and_zero(slots):
    slot_format = slot_format_of(slots)
    grad = torch.randn(70, 65, generator=generator())
    exponent = torch.full((70,), 4, dtype=torch.int32)
    clean = grad.clone()
    for (row, col), value in {(0, 0): math.nan, (3, 64): math.inf, (69, 1): -math.inf}.items():
        grad[row, col], clean[row, col] = value, 0.0
    grad[5, 5] = clean[5, 5] = 1e9
    integers, nonfinite, clipped = quantize_slot(grad, exponent, slot_format, 1)
    assert (nonfinite, clipped) == (3, 1)
    assert torch.equal(integers, quantize_slot(clean, exponent, slot_format, 1)[0])
    assert torch.equal(quantize_exact(grad), quantize_exact(clean))


def test_quantize_exact():
    grad = torch.tensor([2.0**-36, 1.5 * 2.0**-36, -3.0, 1e30, -1e30, 1e-40])
    assert quantize_exact(grad).tolist() == [1, 1, -3 << 36, 1 << 50, -(1 << 50), 0]


@pytest.mark.parametrize("slots", [4, 17])
def test_blocks_do_not_change_slot_integers(monkeypatch, slots):
    grad = torch.randn(33, 320, generator=generator())
    exponent = torch.arange(33, dtype=torch.int32) - 10
    whole = quantize_slot(grad, exponent, slot_format_of(slots), 3)
    monkeypatch.setattr(fp, "BLOCK_ELEMENTS", 700)
    split = quantize_slot(grad, exponent, slot_format_of(slots), 3)
    assert torch.equal(whole[0], split[0]) and whole[1:] == split[1:]
