"""The matmul kernels against the references: decode, gradient quantizer, products, slot sums."""

import pytest
import torch

from arbitor.kernel.latent_update import slot_triton
from arbitor.kernel.latent_update.fixed_point import POW2_Q16, float32_power_of_two
from arbitor.kernel.latent_update.slots import slot_format_of
from arbitor.kernel.latent_update.state import trits
from arbitor.kernel.matmul import decode_triton as decode
from arbitor.kernel.matmul import gemm_triton as gemm
from arbitor.kernel.matmul import reference
from arbitor.kernel.matmul import triton as triton_matmul
from arbitor.kernel.matmul.configs import GemmConfig
from arbitor.kernel.matmul.quantize import Quantized, quantize_fp8

pytestmark = pytest.mark.usefixtures("poisoned")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPES = [(1, 1, 1), (63, 65, 33), (65, 63, 130), (5, 130, 64), (2, 3, 1000), (1, 4097, 3)]
GPU_SHAPES = [(1000, 4097, 65), (4097, 1000, 1000), (256, 512, 384), (65, 1, 4097)]
ALL = SHAPES + [pytest.param(shape, marks=pytest.mark.gpu) for shape in GPU_SHAPES]

# bfloat16 results are rounded once, by 2^-9. An fp8 instruction aligns its 32 products with the
# largest of them and keeps 13 bits below it: up to 32 * 2^-13 of the sum of absolute products, and
# "exact" accumulation mends only what happens between instructions. The interpreter adds float32.
BFLOAT16 = 2**-8
ACCUMULATOR = 2**-8 if ON_GPU else 2**-20
FLOAT32 = 2**-18


def random_problem(shape, activation):
    M, N, K = shape
    generator = torch.Generator().manual_seed(M * N + K)
    normalized_MK = torch.randn(M, K, generator=generator)
    latent_NK = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    row_scale_N = torch.rand(N, generator=generator) + 0.01
    grad_MN = torch.randn(M, N, generator=generator) * torch.logspace(-3, 1, M)[:, None]
    x = reference.quantize_activation(normalized_MK, activation)
    x = Quantized(x.codes.to(DEVICE), x.scale.to(DEVICE))
    return x, latent_NK.to(DEVICE), row_scale_N.to(DEVICE), grad_MN.bfloat16().to(DEVICE)


def positions_contiguous(x):
    codes_KM = x.codes.view(torch.int8).T.contiguous().view(x.codes.dtype)
    return Quantized(codes_KM.T, x.scale)


def assert_close(got, expected, absolute_sum, relative, of_the_sum):
    """Within `relative` of the result and `of_the_sum` of the sum of absolute products."""
    bound = relative * expected.abs() + of_the_sum * absolute_sum
    assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (63, 65), (129, 1000), (4097, 2)])
def test_decoded_trits_equal_the_reference_in_both_layouts(shape, dtype):
    latent_NK = torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)
    both = decode.decode_weight(latent_NK, dtype, transposed=True)
    one = decode.decode_weight(latent_NK, dtype, row_major=False, transposed=True)
    expected = trits(latent_NK).float()
    assert one[0] is None
    for out, values in ((both[0], expected), (both[1], expected.T), (one[1], expected.T)):
        assert out.dtype == dtype and out.is_contiguous()
        assert torch.equal(out.float(), values)


def test_row_scales_equal_the_table_in_every_bit():
    log2_scale = torch.arange(-6000, 6000, 7, dtype=torch.int16, device=DEVICE)
    table = POW2_Q16.to(DEVICE)
    got = decode.decode_row_scale(log2_scale, table)
    octaves = log2_scale.int()
    assert torch.equal(
        got, table[octaves & 255].float() * float32_power_of_two((octaves >> 8) - 16)
    )


@pytest.mark.parametrize("shape", ALL)
def test_gradient_codes_equal_the_reference_in_every_bit(shape):
    x, _, row_scale_N, grad_MN = random_problem(shape, "fp8")
    per_position, per_output = triton_matmul.quantize_gradient(grad_MN, row_scale_N, x.scale)
    grad = grad_MN.float()
    for got, expected in (
        (per_position, quantize_fp8(grad * row_scale_N, 1)),
        (per_output, quantize_fp8(grad * x.scale, 0)),
    ):
        assert torch.equal(got.scale, expected.scale)
        assert torch.equal(got.codes.float(), expected.codes.float())
    assert per_output.codes.T.is_contiguous()


@pytest.mark.parametrize("activation", ["fp8", "int8"])
@pytest.mark.parametrize("shape", ALL)
def test_forward_equals_float64_on_the_same_codes(shape, activation):
    x, latent_NK, row_scale_N, _ = random_problem(shape, activation)
    y_MN, path = triton_matmul.matmul_forward(x, latent_NK, row_scale_N)
    values, weight = x.codes.double() * x.scale, trits(latent_NK).double() * row_scale_N[:, None]
    assert path == "triton" or ON_GPU
    accumulator = ACCUMULATOR if activation == "fp8" else 2**-20  # integers are added exactly
    assert_close(y_MN, values @ weight.T, values.abs() @ weight.abs().T, BFLOAT16, accumulator)


@pytest.mark.parametrize("shape", ALL)
def test_gradients_equal_float64_on_the_same_codes(shape):
    x, latent_NK, row_scale_N, grad_MN = random_problem(shape, "fp8")
    for_x, for_weight = triton_matmul.quantize_gradient(grad_MN, row_scale_N, x.scale)
    grad_MK, _ = triton_matmul.matmul_backward_x(for_x, latent_NK)
    left, right = for_x.codes.double() * for_x.scale, trits(latent_NK).double()
    assert_close(grad_MK, left @ right, left.abs() @ right.abs(), BFLOAT16, ACCUMULATOR)

    grad_NK, path = triton_matmul.matmul_backward_weight(for_weight, positions_contiguous(x))
    left, right = (for_weight.codes.double() * for_weight.scale).T, x.codes.double()
    rounding = BFLOAT16 if path == "cublas" else FLOAT32
    assert_close(grad_NK, left @ right, left.abs() @ right.abs(), rounding, ACCUMULATOR)


@pytest.mark.parametrize("shape", [(33, 65, 63), (1000, 2, 3), (1, 1, 1)])
def test_int8_gradients_equal_the_reference(shape):
    x, latent_NK, row_scale_N, grad_MN = random_problem(shape, "int8")
    got = triton_matmul.int8_backward(grad_MN, positions_contiguous(x), latent_NK, row_scale_N)
    trits_NK = trits(latent_NK).bfloat16()
    expected = (
        reference.matmul_backward_x(grad_MN, trits_NK, row_scale_N, "int8"),
        reference.matmul_backward_weight(grad_MN, x, "int8"),
    )
    for ours, theirs in zip(got, expected, strict=True):  # the same bfloat16 products, rounded once
        assert (ours.float() - theirs).norm() <= BFLOAT16 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("shape", [(65, 130, 48), (1, 3, 16), (128, 64, 272)])
def test_descriptors_read_the_same_tiles(shape, dtype):
    M, N, K = shape
    generator = torch.Generator().manual_seed(M)
    a_MK, b_NK = (
        torch.randint(-7, 8, (rows, K), generator=generator).float().to(DEVICE).to(dtype)
        for rows in (M, N)
    )
    ones = torch.ones(M, device=DEVICE)
    for tma in (False, True):
        tile = GemmConfig(64, 64, 64, num_warps=4, num_stages=3, tma=tma)
        got = gemm.matmul_scaled(a_MK, b_NK, ones, None, torch.float32, tile)
        # Integers below 2^14: exact in every accumulator.
        assert torch.equal(got.double(), a_MK.double() @ b_NK.double().T)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, in the interpreter
def test_a_gradient_that_is_not_finite_is_counted():
    shape = (16, 16, 16)
    x, _, row_scale_N, grad_MN = random_problem(shape, "fp8")
    grad_MN[3, 2] = float("nan")
    grad_MN[4, 5] = float("inf")
    _, grad = triton_matmul.quantize_gradient(grad_MN, row_scale_N, x.scale)
    slot_format = slot_format_of(4)
    total = torch.zeros(16, 16, dtype=slot_format.sum_dtype, device=DEVICE)
    counters = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    grad_NK, _ = triton_matmul.matmul_backward_weight(grad, positions_contiguous(x))
    row_moment_N = torch.zeros(16, dtype=torch.int16, device=DEVICE)
    key = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    slot_triton.quantize_slot_(grad_NK, row_moment_N, slot_format, key, total, counters)
    assert counters[0] > 0
