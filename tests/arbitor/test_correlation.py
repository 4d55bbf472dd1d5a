"""The `bigint` rule: sums against plain Python, its polarity, the Triton kernel against it."""

import math
from fractions import Fraction

import pytest
import torch

from arbitor.kernel.correlation import reference as rule
from arbitor.kernel.correlation import triton as triton_correlation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (2, 63), (5, 65), (3, 1000), (33, 130)]
GPU_SHAPES = [(1000, 4097), (4097, 1000), (4096, 4096)]
GPU = [pytest.param(shape, marks=pytest.mark.gpu) for shape in GPU_SHAPES]


def random_pair(shape, seed=0):
    """A gradient with zeros and entries that are not finite, and trits."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(shape, generator=generator) * 1e-4
    grad[torch.rand(shape, generator=generator) < 0.1] = 0
    for place, value in enumerate((math.nan, math.inf, -math.inf, 1e-40, -1e-40, -0.0)):
        grad.view(-1)[place * 7 % grad.numel()] = value
    return grad, torch.randint(-1, 2, shape, dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("group_size", [1, 12, 64])
@pytest.mark.parametrize("shape", [(1, 1), (2, 63), (5, 65)])
def test_sums_are_the_definition(shape, group_size):
    grad, trits = random_pair(shape)
    groups = rule.num_groups(shape[1], group_size)
    sums = torch.full((shape[0], groups), 7, dtype=torch.int32)
    rule.accumulate_correlation(grad, trits, sums, group_size)
    for row in range(shape[0]):
        for group in range(groups):
            expected = 7
            for col in range(group * group_size, min((group + 1) * group_size, shape[1])):
                g = float(grad[row, col])
                expected += ((g > 0) - (g < 0)) * int(trits[row, col])
            assert sums[row, group] == expected


def test_dealing_and_order_of_slots_do_not_matter():
    pairs = [random_pair((9, 130), seed) for seed in range(5)]
    trits = pairs[0][1]
    workers = torch.zeros(3, 9, 3, dtype=torch.int32)
    together = torch.zeros(9, 3, dtype=torch.int32)
    for slot, (grad, _) in enumerate(pairs):
        rule.accumulate_correlation(grad, trits, workers[slot % 3], 64)
    for grad, _ in reversed(pairs):
        rule.accumulate_correlation(grad, trits, together, 64)
    assert torch.equal(workers.sum(0, dtype=torch.int32), together)


def test_log2_scale_is_the_rounded_quotient():
    corr = torch.tensor([[0, 1, -1, 3, -3, 64 * 7, -64 * 7, 100, 5]])
    steps = torch.tensor([[7, 7, 7, 7, 7, 7, 7, 7, 0]])
    scale = torch.tensor([[-2000]], dtype=torch.int16)
    log2 = rule.group_log2_scale(scale, corr, steps, 64)
    assert log2.dtype == torch.int16
    for value, result in zip(corr[0].tolist(), log2[0].tolist(), strict=True):
        exact = Fraction(1024 * value, 7 * 64)
        assert result == -2000 - math.floor(exact + Fraction(1, 2)) or value == 5
    # Halves go up: 1024 / 2048 is 1, -1024 / 2048 is 0. Before the first step E itself.
    halves = rule.group_log2_scale(
        torch.zeros(1, 1, dtype=torch.int16),
        torch.tensor([[1, -1, 0]]),
        torch.tensor([[32, 32, 0]]),
        64,
    )
    assert halves.tolist() == [[-1, 0, 0]]
    long_run = rule.group_log2_scale(
        torch.zeros(1, 1, dtype=torch.int16),
        torch.tensor([[1 << 46]]),
        torch.tensor([[1 << 40]]),
        64,
    )
    assert long_run.tolist() == [[-1024]]


@pytest.mark.parametrize("target", [-1.0, 1.0])
def test_the_loss_falls(target):
    """Scales start an octave away from a teacher's, on either side; trits are the teacher's."""
    generator = torch.Generator().manual_seed(2)
    trits = torch.randint(-1, 2, (16, 128), dtype=torch.int8, generator=generator)
    start = torch.zeros(16, 1, dtype=torch.int16)
    corr, steps = torch.zeros(2, 16, 2, dtype=torch.int64)
    losses = []
    for _ in range(30):
        x = torch.randn(64, 128, generator=generator)
        log2 = rule.group_log2_scale(start, corr, steps, 64)
        weight = trits * torch.exp2(log2.float() / 256).repeat_interleave(64, 1)
        error = x @ (weight - trits * 2.0**target).T
        losses.append(float(error.square().mean()))
        step = torch.zeros(16, 2, dtype=torch.int32)
        rule.accumulate_correlation(error.T @ x, trits, step, 64)
        rule.finish_step(corr, steps, step, 1)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [12, 32, 64, 1000])
@pytest.mark.parametrize("shape", SHAPES + GPU)
def test_triton_sums_are_the_reference(shape, group_size, dtype):
    groups = rule.num_groups(shape[1], group_size)
    expected = torch.full((shape[0], groups), -5, dtype=torch.int32)
    ours = expected.clone().to(DEVICE)
    for seed in range(2):
        grad, trits = random_pair(shape, seed)
        rule.accumulate_correlation(grad.to(dtype), trits, expected, group_size)
        triton_correlation.accumulate_correlation(
            grad.to(dtype).to(DEVICE), trits.to(DEVICE), ours, group_size
        )
    assert torch.equal(ours.cpu(), expected)
