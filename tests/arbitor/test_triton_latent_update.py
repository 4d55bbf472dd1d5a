"""The Triton update and slot conversion against the reference: every integer, every counter.

Compiled on a GPU, in Triton's interpreter without one; the reference always runs on the CPU.
"""

import copy
import math
from dataclasses import fields

import pytest
import torch

from arbitor.kernel.latent_update import fixed_point as fp
from arbitor.kernel.latent_update import moments, slots
from arbitor.kernel.latent_update import reference as rule
from arbitor.kernel.latent_update import triton as triton_update
from arbitor.kernel.state_format import INT8
from tests.arbitor.update_cases import FORMATS, RATES, fresh_state, random_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (1, 200), (63, 5), (65, 63), (2, 1000), (9, 320)]
GPU_SHAPES = [(1000, 4097), (4097, 1000), (1, 1 << 20), (2048, 2048), (4096, 4224)]
GPU = [pytest.param(shape, marks=pytest.mark.gpu) for shape in GPU_SHAPES]
# Too large numbers are meant to become infinite on their way to the clamp.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned"),
]


def on_device(state):
    copied = copy.deepcopy(state)
    return type(state)(**{f.name: getattr(copied, f.name).to(DEVICE) for f in fields(state)})


def words_of(rates, key, updates):
    words = moments.update_words(rates, key, updates)
    return torch.tensor(words, dtype=torch.int32, device=DEVICE)


def word_of(key):
    return torch.tensor([fp.signed_word(key)], dtype=torch.int32, device=DEVICE)


def assert_equal_states(ours, expected):
    for field in fields(expected):
        left, right = getattr(ours, field.name).cpu(), getattr(expected, field.name)
        assert left.dtype == right.dtype
        assert torch.equal(left, right), f"{field.name}: {int((left != right).sum())} differ"


def spiked_gradients(shape, factor):
    """Two slots: a zero row, a row far below the rest, one huge and one tiny entry."""
    grads = [random_gradient(*shape, seed) * factor for seed in range(2)]
    for grad in grads:
        grad[shape[0] // 2] *= 2.0**-24
        grad[shape[0] - 1, 0] = 1e-40
        grad[shape[0] // 3] = 0 if shape[0] > 2 else grad[shape[0] // 3]
    grads[1][0, shape[1] // 2] = 1e9
    return grads


def run_steps(shape, num_slots, factors, format=INT8):
    """Steps of both; every state tensor and counter equal after each."""
    slot_format = slots.slot_format_of(num_slots)
    expected = fresh_state(*shape, [random_gradient(*shape, seed) for seed in range(2)], format)
    ours = on_device(expected)
    for step, factor in enumerate(factors):
        grads = spiked_gradients(shape, factor)
        exponent_N = slots.row_exponents(expected.row_moment, slot_format)
        total = torch.zeros(shape, dtype=slot_format.sum_dtype)
        our_total, conversion = (
            total.clone().to(DEVICE),
            torch.zeros(2, dtype=torch.int64, device=DEVICE),
        )
        counts = [0, 0]
        for slot, grad in enumerate(grads):
            key = fp.stream_key(1, step, 7, fp.STREAM_SLOT + slot)
            integers, *added = slots.quantize_slot(grad, exponent_N, slot_format, key)
            total += integers
            counts = [count + more for count, more in zip(counts, added, strict=True)]
            triton_update.quantize_slot_(
                grad.to(DEVICE), ours.row_moment, slot_format, word_of(key), our_total, conversion
            )
        assert torch.equal(our_total.cpu(), total) and conversion.tolist() == counts
        key = fp.stream_key(1, step, 7, fp.STREAM_UPDATE)
        stats = rule.update(expected, total, slot_format, RATES, key, format)
        counters = torch.full((3,), 5, dtype=torch.int64, device=DEVICE)
        words = words_of(RATES, key, step + 1)
        triton_update.update_(ours, our_total, slot_format, words, counters, format)
        assert_equal_states(ours, expected)
        assert (counters - 5).tolist() == [stats.flips, stats.zeros, stats.saturated]
        assert torch.equal(our_total.cpu(), total)
    return expected


@pytest.mark.parametrize("num_slots", [4, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_updates_are_the_reference(shape, num_slots):
    state = run_steps(shape, num_slots, [1.0, 50.0])
    assert state.num_updates.item() == 2


@pytest.mark.parametrize("num_slots", [4, 17])
@pytest.mark.parametrize("shape", [(9, 130), (17, 64)])
@pytest.mark.parametrize("format", FORMATS[1:], ids=str)
def test_updates_in_fewer_bits_are_the_reference(shape, num_slots, format):
    state = run_steps(shape, num_slots, [1.0, 50.0], format)
    assert format.largest_momentum // 2 < state.momentum.abs().max() <= format.largest_momentum
    assert not (state.latent % (1 << format.latent_shift)).any()


@pytest.mark.parametrize("num_slots", [1, 16, 300])
@pytest.mark.parametrize("shape", [(3, 130), (17, 64)])
def test_every_width_of_the_sums_is_the_reference(shape, num_slots):
    run_steps(shape, num_slots, [1.0, 0.0, 50.0])


def test_small_blocks_are_the_reference(monkeypatch):
    """Several programs of every kernel."""
    monkeypatch.setattr(triton_update, "BLOCK_PREPARE", 16)
    monkeypatch.setattr(triton_update, "BLOCK_FINISH", 16)
    run_steps((35, 65), 4, [1.0, 50.0])
    run_steps((16, 64), 4, [1.0])  # the last sum lies beyond the last full block


@pytest.mark.gpu
@pytest.mark.parametrize("num_slots", [4, 16, 17, 300])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_large_updates_are_the_reference(shape, num_slots):
    run_steps(shape, num_slots, [1.0, 50.0, 0.0])  # the CPU reference takes most of the time


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("num_slots", [4, 17, 300])
def test_largest_sums_are_the_reference(num_slots, format):
    """Every integer at its bound: sums +-S qmax, momentum at its rail and the largest shift."""
    slot_format = slots.slot_format_of(num_slots)
    expected = fresh_state(9, 130, [random_gradient(9, 130)], format)
    signs = torch.where(random_gradient(9, 130) < 0, -1, 1)
    expected.momentum.copy_(format.largest_momentum * signs)
    expected.momentum_exponent.fill_(127)
    expected.latent.copy_(format.largest_latent * signs)
    total = (num_slots * slot_format.qmax * signs).to(slot_format.sum_dtype)
    ours = on_device(expected)
    counters = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    words = words_of(RATES, 0xFFFFFFFF, 1)
    triton_update.update_(ours, total.to(DEVICE), slot_format, words, counters, format)
    stats = rule.update(expected, total, slot_format, RATES, 0xFFFFFFFF, format)
    assert_equal_states(ours, expected)
    assert counters.tolist() == [stats.flips, stats.zeros, stats.saturated]


def test_momentum_at_its_rail_is_the_reference():
    """26 * 157 is 127.56 / 128 of a power of two: rounding must stop at +-127."""
    slot_format = slots.slot_format_of(4)
    expected = fresh_state(16, 128, [random_gradient(16, 128)])
    total = torch.full((16, 128), 157, dtype=slot_format.sum_dtype)
    total[:, ::2] = -157
    ours = on_device(expected)
    triton_update.update_(ours, total.to(DEVICE), slot_format, words_of(RATES, 3, 1))
    rule.update(expected, total, slot_format, RATES, 3)
    assert expected.momentum.abs().max() == 127 and expected.momentum.min() == -127
    assert_equal_states(ours, expected)


@pytest.mark.parametrize("rates", [(0, 0), (3 << 16, 167772), (20 << 16, (1 << 24) - 1)])
@pytest.mark.parametrize("num_slots", [4, 17])
def test_extreme_moments_and_rates_are_the_reference(num_slots, rates):
    """Moments, exponents and scales at random anywhere in their range; late updates."""
    rates = moments.step_rates(*rates)
    slot_format = slots.slot_format_of(num_slots)
    generator = torch.Generator().manual_seed(num_slots)
    expected = fresh_state(20, 128, [random_gradient(20, 128)])
    for name in ("row_moment", "col_moment", "tensor_moment", "scale_moment", "log2_scale"):
        moment = getattr(expected, name)
        moment.random_(-32768, 32768, generator=generator)
    expected.momentum_exponent.random_(-128, 128, generator=generator)
    expected.momentum.random_(-127, 128, generator=generator)
    expected.num_updates.fill_(70)
    total = torch.zeros(20, 128, dtype=slot_format.sum_dtype)
    total[::2].random_(-slot_format.qmax, slot_format.qmax, generator=generator)
    ours = on_device(expected)
    triton_update.update_(ours, total.to(DEVICE), slot_format, words_of(rates, 12345, 71))
    rule.update(expected, total, slot_format, rates, 12345)
    assert_equal_states(ours, expected)


@pytest.mark.parametrize("shape", [(33, 320), (5, 63), *GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_slots", [4, 17, 300])
def test_slot_integers_are_the_reference(num_slots, dtype, shape):
    slot_format = slots.slot_format_of(num_slots)
    grad = random_gradient(*shape).to(dtype)
    grad[0, 0], grad[1 % shape[0], 1], grad[-1, -1] = math.nan, math.inf, -math.inf
    grad[2 % shape[0], 2], grad[0, 3], grad[-1, 4] = 1e9, 1e-40, -3e38
    moment_N = (256 * (torch.arange(shape[0]) % 200 - 100)).to(torch.int16)
    exponent_N = slots.row_exponents(moment_N, slot_format)
    total = torch.randint(-99, 99, shape, dtype=slot_format.sum_dtype, generator=torch.Generator())
    integers, *counts = slots.quantize_slot(grad.float(), exponent_N, slot_format, 0x9E3779B9)
    ours, counters = total.clone().to(DEVICE), torch.full((2,), 3, dtype=torch.int64, device=DEVICE)
    triton_update.quantize_slot_(
        grad.to(DEVICE), moment_N.to(DEVICE), slot_format, word_of(0x9E3779B9), ours, counters
    )
    assert torch.equal(ours.cpu(), total + integers)
    assert (counters - 3).tolist() == counts


@pytest.mark.gpu
def test_repeated_updates_on_a_gpu_are_equal():
    slot_format = slots.slot_format_of(16)
    first = on_device(fresh_state(3000, 1000, [random_gradient(3000, 1000)]))
    second = copy.deepcopy(first)
    total = torch.randint(-2000, 2000, (3000, 1000), dtype=torch.int16, device=DEVICE)
    for update in range(1, 6):
        for state in (first, second):
            triton_update.update_(state, total, slot_format, words_of(RATES, update, update))
    for field in fields(first):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name))
