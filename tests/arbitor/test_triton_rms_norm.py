"""The fused norm and quantizer against the references: codes, scales, layouts, gradients."""

import pytest
import torch

from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.matmul.reference import quantize_activation
from arbitor.kernel.rms_norm import triton as triton_norm
from arbitor.kernel.rms_norm.reference import rms_norm_backward, rms_norm_forward
from arbitor.kernel.swiglu.reference import swiglu_backward, swiglu_forward

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 1), (63, 65), (65, 63), (2, 1000), (3, 4097)]
GPU_SHAPES = [(1000, 4097), (4097, 1000), (16384, 65), (257, 28672)]
GPU = [pytest.param(shape, marks=pytest.mark.gpu) for shape in GPU_SHAPES]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_input(shape):
    generator = torch.Generator().manual_seed(shape[0] * 7 + shape[1])
    x_MK = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[0])[:, None]
    return x_MK.bfloat16().to(DEVICE)


@pytest.mark.parametrize("activation", ["fp8", "int8"])
@pytest.mark.parametrize("shape", SHAPES + GPU)
def test_codes_differ_by_one_and_only_at_a_rounding_border(shape, activation):
    x_MK = random_input(shape)
    x, saved, inverse_rms_M = triton_norm.rms_norm_quantize(x_MK, activation, for_backward=True)
    normalized_MK, expected_rms = rms_norm_forward(x_MK)
    expected = quantize_activation(normalized_MK, activation)
    # float32 sums of up to 28,672 squares in another order, and two roots within 2^-22.
    torch.testing.assert_close(inverse_rms_M, expected_rms, rtol=2e-6, atol=0)
    torch.testing.assert_close(x.scale, expected.scale, rtol=2e-6, atol=0)
    difference = code_numbers(x.codes) - code_numbers(expected.codes)
    assert difference.abs().max() <= 1
    assert (difference[~near_border(normalized_MK, expected)] != 0).sum() == 0
    # A bfloat16 over 1/127 of another one often lies exactly between two int8 codes.
    share = 1e-4 if activation == "fp8" else 2e-4
    assert (difference != 0).sum() <= max(16, share * x_MK.numel())
    assert saved.codes.T.is_contiguous()
    assert torch.equal(saved.codes.view(torch.int8), x.codes.view(torch.int8))


def near_border(normalized_MK, expected):
    """Where 4e-6 of the input, what the two roots may differ by, changes the code."""
    scaled = normalized_MK.double() / expected.scale
    low, high = (scaled * factor for factor in (1 - 4e-6, 1 + 4e-6))
    if expected.codes.dtype == torch.int8:
        return low.round() != high.round()
    return low.to(expected.codes.dtype).float() != high.to(expected.codes.dtype).float()


def code_numbers(codes):
    """Neighbouring codes are neighbouring integers; both zeros are 0."""
    if codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (3, 5000), (513, 3)])
def test_inference_writes_no_second_copy(shape, gated):
    """Few positions go through other tiles, which add the squares of a row in another order."""
    x_MX = random_gates(shape) if gated else random_input(shape)
    x, saved, inverse_rms_M = triton_norm.rms_norm_quantize(x_MX, "fp8", False, gated)
    trained, _, trained_rms_M = triton_norm.rms_norm_quantize(x_MX, "fp8", True, gated)
    assert saved is None
    torch.testing.assert_close(inverse_rms_M, trained_rms_M, rtol=2e-6, atol=0)
    assert torch.equal(x.scale, trained.scale)
    difference = code_numbers(x.codes) - code_numbers(trained.codes)
    assert difference.abs().max() <= 1 and (difference != 0).sum() <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["fp8", "int8"])
@pytest.mark.parametrize("shape", SHAPES + GPU)
def test_gradient_equals_the_reference(shape, activation, dtype):
    x_MK = random_input(shape)
    generator = torch.Generator().manual_seed(1)
    grad_MK = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    _, x, inverse_rms_M = triton_norm.rms_norm_quantize(x_MK, activation, for_backward=True)
    got = triton_norm.rms_norm_backward_x(grad_MK, x, inverse_rms_M, torch.float32)
    row_major = Quantized(x.codes.contiguous(), x.scale)
    same = triton_norm.rms_norm_backward_x(grad_MK, row_major, inverse_rms_M, torch.float32)
    expected = rms_norm_backward(grad_MK.float(), x.values(), inverse_rms_M)
    # Both terms are rounded at 2^-24 of themselves; sums of K run in another order.
    bound = 1e-5 * (grad_MK.float().abs() + x.values().abs()) * inverse_rms_M[:, None]
    for gradient in (got, same):
        assert ((gradient - expected).abs() <= bound).all()


def random_gates(shape):
    """Gates of all sizes: the exponential of the largest would overflow."""
    M, K = shape
    generator = torch.Generator().manual_seed(M * 3 + K)
    gate_and_up = torch.randn(M, 2 * K, generator=generator)
    gate_and_up[:, :K] *= torch.logspace(-3, 2, M)[:, None]
    return gate_and_up.bfloat16().to(DEVICE)


@pytest.mark.parametrize("activation", ["fp8", "int8"])
@pytest.mark.parametrize("shape", SHAPES + GPU)
def test_codes_of_a_gated_norm(shape, activation):
    x_MX = random_gates(shape)
    x, saved, inverse_rms_M = triton_norm.rms_norm_quantize(x_MX, activation, True, gated=True)
    normalized_MK, expected_rms = rms_norm_forward(swiglu_forward(x_MX))
    expected = quantize_activation(normalized_MK, activation)
    # Exponential and division are good to 2^-20; a scale moves at a border of its octave alone.
    torch.testing.assert_close(inverse_rms_M, expected_rms, rtol=4e-6, atol=0)
    same = (x.scale / expected.scale - 1).abs().squeeze(1) < 1e-5
    assert same.sum() >= len(same) - 1
    difference = (code_numbers(x.codes) - code_numbers(expected.codes))[same]
    assert difference.abs().max() <= 1
    assert (difference != 0).sum() <= max(16, 2e-4 * x.codes.numel())
    assert saved.codes.T.is_contiguous()
    assert torch.equal(saved.codes.view(torch.int8), x.codes.view(torch.int8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES + GPU)
def test_gradient_of_a_gated_norm_equals_the_reference(shape, dtype):
    x_MX = random_gates(shape)
    generator = torch.Generator().manual_seed(1)
    grad_MK = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    _, x, inverse_rms_M = triton_norm.rms_norm_quantize(x_MX, "fp8", True, gated=True)
    got = triton_norm.rms_norm_backward_x(grad_MK, x, inverse_rms_M, torch.float32, x_MX)
    inner = rms_norm_backward(grad_MK.float(), x.values(), inverse_rms_M)
    expected = swiglu_backward(inner, x_MX)
    # As without gates, times what the gate's slope (at most 1.1) and value multiply by.
    bound = 1e-5 * (grad_MK.float().abs() + x.values().abs()) * inverse_rms_M[:, None]
    gate, up = x_MX.float().chunk(2, dim=-1)
    bound = torch.cat([bound * 1.1 * up.abs(), bound * gate.abs()], dim=-1)
    assert ((got - expected).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES + GPU)
def test_the_residuals_gradient_is_added_before_the_rounding(shape, gated):
    M, K = shape
    x_MX = random_gates(shape) if gated else random_input(shape)
    generator = torch.Generator().manual_seed(2)
    grad_MK = torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)
    # A slice, as the gradient of a part of a stream may be.
    residual_MX = torch.randn(M, x_MX.shape[1] + 3, generator=generator).to(DEVICE, torch.bfloat16)
    residual_MX = residual_MX[:, 3:]
    _, x, inverse_rms_M = triton_norm.rms_norm_quantize(x_MX, "fp8", True, gated=gated)
    gates = x_MX if gated else None
    alone = triton_norm.rms_norm_backward_x(grad_MK, x, inverse_rms_M, torch.float32, gates)
    got = triton_norm.rms_norm_backward_x(
        grad_MK, x, inverse_rms_M, torch.bfloat16, gates, residual_MX
    )
    # One rounding to bfloat16; before it products and sums that a GPU may fuse.
    exact = alone.double() + residual_MX.double()
    bound = 2**-8 * exact.abs() + 2**-21 * (alone.abs() + residual_MX.abs())
    assert ((got.double() - exact).abs() <= bound).all()
