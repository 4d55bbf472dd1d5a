"""The 2-bit plane and the matmul of generation on it."""

import pytest
import torch

from arbitor.kernel.matmul import decode_gemv as gemv
from arbitor.kernel.matmul.plane import pack_plane, plane_matmul, unpack_plane
from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.matmul.reference import quantize_activation

pytestmark = pytest.mark.usefixtures("poisoned")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPES = [
    (1, 1, 1),
    (1, 63, 65),
    (4, 65, 1000),
    (16, 5, 130),
    (64, 3, 63),
    (1, 2, 4097),
    (65, 5, 130),
    (200, 70, 66),
]
GPU_SHAPES = [(1, 4097, 1000), (33, 1000, 4097), (64, 8192, 8192), (16, 28672, 8192)]
ALL = SHAPES + [pytest.param(shape, marks=pytest.mark.gpu) for shape in GPU_SHAPES]


def random_problem(shape, activation):
    M, N, K = shape
    generator = torch.Generator().manual_seed(M + N * K)
    x = quantize_activation(torch.randn(M, K, generator=generator), activation)
    trits_NK = torch.randint(-1, 2, (N, K), generator=generator, dtype=torch.int8)
    return x, trits_NK, torch.rand(N, generator=generator) + 0.01


@pytest.mark.parametrize("num_inputs", [1, 3, 63, 64, 65, 1000, 4097])
def test_the_plane_holds_every_trit(num_inputs):
    trits_NK = torch.randint(-1, 2, (7, num_inputs), dtype=torch.int8)
    plane_NQ = pack_plane(trits_NK)
    assert plane_NQ.shape[1] % 16 == 0 and 4 * plane_NQ.shape[1] < num_inputs + 64
    assert torch.equal(unpack_plane(plane_NQ, num_inputs), trits_NK)


@pytest.mark.parametrize("activation", ["fp8", "int8"])
@pytest.mark.parametrize("shape", ALL)
def test_products_equal_the_reference(shape, activation):
    x, trits_NK, row_scale_N = random_problem(shape, activation)
    plane_NQ = pack_plane(trits_NK)
    expected = plane_matmul(x, plane_NQ, row_scale_N).double()
    on_device = Quantized(x.codes.to(DEVICE), x.scale.to(DEVICE))
    y_MN = gemv.plane_matmul(on_device, plane_NQ.to(DEVICE), row_scale_N.to(DEVICE)).cpu().double()
    # Both results are rounded to bfloat16, the reference's accumulator as well; a GPU's fp8
    # accumulators keep 14 bits of the largest partial sum.
    absolute_sum = (x.values().double().abs() @ trits_NK.double().abs().T) * row_scale_N
    accumulator = 2**-11 if ON_GPU and activation == "fp8" else 2**-20
    assert ((y_MN - expected).abs() <= 2**-6 * expected.abs() + accumulator * absolute_sum).all()
