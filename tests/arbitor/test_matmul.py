"""The ternary matmul oracle against float64 arithmetic on the same codes, forward and gradients."""

import pytest
import torch

from arbitor.kernel.matmul.quantize import Quantized, quantize_fp8, quantize_int8
from arbitor.kernel.matmul.reference import (
    matmul_backward_weight,
    matmul_backward_x,
    matmul_forward,
    quantize_activation,
)
from arbitor.kernel.rms_norm.reference import rms_norm_backward, rms_norm_forward

SHAPES = [(1, 1, 1), (63, 65, 33), (5, 130, 64), (257, 31, 100)]

# A bfloat16 result is rounded twice (accumulator, then after scaling): 2 * 2^-8 relative.
BFLOAT16 = 2**-7


def random_problem(shape):
    M, N, K = shape
    generator = torch.Generator().manual_seed(M * N + K)
    x_MK = torch.randn(M, K, generator=generator) * torch.rand(M, 1, generator=generator) * 9
    trits_NK = torch.randint(-1, 2, (N, K), generator=generator).bfloat16()
    row_scale_N = torch.rand(N, generator=generator) + 0.01
    grad_MN = torch.randn(M, N, generator=generator).bfloat16()
    return x_MK, trits_NK, row_scale_N, grad_MN


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_finite_code_decodes_exactly(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    expected = codes.float()
    finite = expected.isfinite()
    decoded = Quantized(codes, torch.ones(())).operand().float()
    assert torch.equal(decoded[finite], expected[finite])


@pytest.mark.parametrize("axis", [0, 1])
def test_fp8_scales_are_powers_of_two_and_nothing_saturates(axis):
    x = torch.randn(37, 41) * torch.logspace(-20, 20, 41)
    quantized = quantize_fp8(x, axis)
    assert torch.equal(torch.frexp(quantized.scale).mantissa, torch.full_like(quantized.scale, 0.5))
    largest = quantized.operand().float().abs().amax(dim=axis)
    assert largest.min() >= 128 and largest.max() <= 256
    # Three mantissa bits: 2^-4 relative for normal codes, half the smallest step below them.
    bound = torch.maximum(x.abs() * 2**-4, quantized.scale * 2**-10)
    assert ((quantized.values() - x).abs() <= bound).all()


def test_zeros_and_extremes_quantize_to_finite_codes():
    x = torch.tensor([[0.0, 0.0], [1e-45, -1e-40], [3e38, -1e38]])
    for quantized in (quantize_fp8(x, 1), quantize_int8(x, 1)):
        assert quantized.values().isfinite().all()
        assert (quantized.values()[0] == 0).all()


def test_int8_error_is_half_a_step():
    x = torch.randn(11, 200)
    quantized = quantize_int8(x, 1)
    assert ((quantized.values() - x).abs() <= 0.5001 * quantized.scale).all()


@pytest.mark.parametrize("activation", ["fp8", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_float64_on_the_same_codes(shape, activation):
    x_MK, trits_NK, row_scale_N, _ = random_problem(shape)
    x = quantize_activation(x_MK, activation)
    y = matmul_forward(x, trits_NK, row_scale_N)
    values = x.operand().double() * x.scale.double()
    expected = values @ trits_NK.double().T * row_scale_N
    assert y.dtype == torch.bfloat16
    assert ((y.double() - expected).abs() <= BFLOAT16 * expected.abs()).all()


@pytest.mark.parametrize("activation", ["fp8", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_within_their_quantizers_error(shape, activation):
    x_MK, trits_NK, row_scale_N, grad_MN = random_problem(shape)
    x = quantize_activation(x_MK, activation)
    grad = grad_MN.double()
    # fp8: 2^-4 of each entry or a 2^-17 part of the largest; both far above bfloat16's rounding.
    step = 2**-4 if activation == "fp8" else 2**-8

    grad_x = matmul_backward_x(grad_MN, trits_NK, row_scale_N, activation)
    scaled = grad * row_scale_N
    bound = (
        step * scaled.abs() + 2**-17 * scaled.abs().amax(1, keepdim=True)
    ) @ trits_NK.double().abs()
    error = (grad_x - scaled @ trits_NK.double()).abs()
    assert (error <= bound + BFLOAT16 * grad_x.abs()).all()

    grad_w = matmul_backward_weight(grad_MN, x, activation)
    codes, scaled = x.operand().double(), grad * x.scale.double()
    bound = (step * scaled.abs() + 2**-17 * scaled.abs().amax(0, keepdim=True)).T @ codes.abs()
    error = (grad_w - scaled.T @ codes).abs()
    assert (error <= bound + BFLOAT16 * grad_w.abs()).all()


def test_rms_norm_equals_autograd():
    x = torch.randn(7, 33, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 33)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected.backward(grad.double())
    normalized, inverse_rms = rms_norm_forward(x.detach())
    # float32 arithmetic over 33 terms.
    torch.testing.assert_close(normalized.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    backward = rms_norm_backward(grad, normalized, inverse_rms)
    torch.testing.assert_close(backward.double(), x.grad, rtol=1e-5, atol=1e-5)
