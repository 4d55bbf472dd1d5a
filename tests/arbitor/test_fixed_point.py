"""Fixed-point arithmetic: hashes, logarithms, moments, slot integers."""

import math
from fractions import Fraction

import pytest
import torch

from arbitor.kernel.latent_update import fixed_point as fp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unsigned(words: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.tolist()]


def test_hash_known_vectors():
    # From the C form of lowbias32, compiled.
    assert [fp.mix(word) for word in (0, 1, 2, 0xFFFFFFFF)] == [
        0,
        0x688990C0,
        0xD1132181,
        0x6768824A,
    ]
    index = torch.tensor([0, 1, 5, 2**31 - 1, -1, -(2**31)], dtype=torch.int32)
    for key in (0, 1, 0x80000000, 0xDEADBEEF):
        expected = [fp.mix((word & 0xFFFFFFFF) ^ key) for word in index.tolist()]
        assert unsigned(fp.counter_hash(index, key)) == expected


def test_keys_differ_in_every_word():
    words = (7, 11, fp.tensor_id("blocks.0.q"), fp.STREAM_SLOT)
    keys = {fp.stream_key(*words)}
    for place in range(4):
        changed = list(words)
        changed[place] += 1
        keys.add(fp.stream_key(*changed))
    assert len(keys) == 5
    assert fp.tensor_id("blocks.0.q") == 0xD4ED567E


def test_element_index_is_row_major_and_wraps():
    index = fp.element_index(range(2, 4), num_cols=10, width=12, device=torch.device("cpu"))
    assert index[0, 0] == 20 and index[1, 11] == 41
    far = fp.element_index(range(3, 4), num_cols=1 << 30, width=1, device=torch.device("cpu"))
    assert unsigned(far[0]) == [3 << 30]


def test_hash_bits_are_uniform_and_independent():
    word = fp.counter_hash(torch.arange(1 << 18, dtype=torch.int32), 12345)
    low, high = fp.low_bits(word).double(), fp.low_bits(word >> 16).double()
    for half in (low, high):
        assert abs(half.mean() / 65536 - 0.5) < 4 * 0.2887 / 512
    following = fp.low_bits(fp.counter_hash(torch.arange(1 << 18, dtype=torch.int32), 12346))
    for other in (high, following.double()):
        assert abs(torch.corrcoef(torch.stack([low, other]))[0, 1]) < 4 / 512
    assert abs(torch.corrcoef(torch.stack([low[1:], low[:-1]]))[0, 1]) < 4 / 512


def test_tables_are_correctly_rounded():
    for f in range(256):
        assert abs(int(fp.POW2_Q11[f]) - 2 ** (f / 256) * 2**11) <= 0.5
        assert abs(int(fp.POW2_Q16[f]) - 2 ** (f / 256) * 2**16) <= 0.5
    for i in range(257):
        assert abs(int(fp.LOG2_Q16[i]) - 65536 * math.log2(1 + i / 256)) <= 0.5


def test_bit_length():
    values = [0, 1, 2, 3, 4, 2**53 - 1, 2**53, 2**54 - 1, 2**62 - 1, 2**62, 2**63 - 1]
    assert fp.bit_length(torch.tensor(values)).tolist() == [value.bit_length() for value in values]
    narrow = torch.tensor([0, 1, 2**24 - 1, 2**31 - 1], dtype=torch.int32)
    assert fp.bit_length(narrow).tolist() == [0, 1, 24, 31]


def test_ilog2():
    spread = torch.randint(1, 2**62, (20000,), generator=generator())
    spread >>= torch.randint(0, 62, (20000,), generator=generator(1))
    x = torch.cat([spread.clamp(min=1), torch.arange(1, 2000), torch.tensor([2**63 - 1, 2**62])])
    error = fp.ilog2(x) / 65536 - torch.tensor([math.log2(value) for value in x.tolist()])
    assert error.abs().max() < 2.4e-5
    powers = 1 << torch.arange(63)
    assert fp.ilog2(powers).tolist() == [p << 16 for p in range(63)]
    assert fp.ilog2(torch.tensor([0])).tolist() == [-64 << 16]


@pytest.mark.parametrize(
    "x", [1, 3, 1000003, Fraction(1, 3), Fraction(26, 256), Fraction(1, 3**50)]
)
def test_log2_fraction(x):
    assert abs(fp.log2_fraction(x) / 65536 - math.log2(x)) < 2.4e-5


def test_shift_left_goes_both_ways():
    x = torch.tensor([5, 5, -5, 127])
    assert fp.shift_left(x, torch.tensor([2, -1, -1, 0])).tolist() == [20, 2, -3, 127]


def test_moment_memory_is_a_running_mean_first():
    assert [fp.moment_memory(t) for t in (1, 2, 4, 20, 1000)] == [0, 128, 192, 243, 243]


@pytest.mark.parametrize("memory", [0, 128, 243])
def test_advance_moment_follows_the_float_form_on_average(memory):
    count = 4096
    moment = torch.full((count,), -3000, dtype=torch.int16)
    noise = fp.counter_hash(torch.arange(count, dtype=torch.int32), 99)
    for octaves in (-20.0, -1.3, 0.0, 0.02, 3.7, 23.0):
        log2_mean_square = 2 * -3000 / 256 + octaves
        target = torch.full((count,), round(log2_mean_square * 65536))
        advanced = fp.advance_moment(moment, target, memory, noise).double()
        weight = memory / 256
        expected = -3000 + 128 * math.log2(weight + (1 - weight) * 2**octaves)
        # Half a unit where the ratio is cut to 1/256 octave; the rounding is a coin of one unit.
        assert (advanced - expected).abs().max() < 1.6
        assert abs(advanced.mean() - expected) < 0.5 * (1 - weight) + 0.06


def test_advance_moment_stays_in_range():
    extremes = torch.tensor([-32768, 32767], dtype=torch.int16)
    noise = torch.zeros(2, dtype=torch.int32)
    for target in (-(2**40), 2**40):
        advanced = fp.advance_moment(extremes, torch.tensor([target] * 2), 243, noise)
        assert advanced.dtype == torch.int16
    assert advanced.tolist()[1] == 32767
