"""The embedding kernels equal their references in every bit."""

import pytest
import torch

from arbitor.kernel.embedding import reference
from arbitor.kernel.embedding import triton as triton_embedding
from arbitor.kernel.latent_update.state import trits
from arbitor.kernel.matmul.plane import pack_plane

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 1), (63, 5, 65), (65, 90, 63), (130, 2, 257), (40, 3, 1000)]
GPU_SHAPES = [(4097, 300, 1000), (1000, 4097, 65), (16384, 259, 2048)]
ALL = SHAPES + [pytest.param(shape, marks=pytest.mark.gpu) for shape in GPU_SHAPES]


def random_problem(shape):
    M, V, D = shape
    generator = torch.Generator().manual_seed(M + V * D)
    # Skewed as text is: squares of a uniform variable.
    indices_M = (torch.rand(M, generator=generator).square() * V).long()
    latent_VD = torch.randint(-127, 128, (V, D), generator=generator, dtype=torch.int8)
    row_scale_V = torch.rand(V, generator=generator) + 0.01
    grad_MD = torch.randn(M, D, generator=generator)
    return indices_M, latent_VD, row_scale_V, grad_MD


@pytest.mark.parametrize("shape", ALL)
def test_rows_equal_the_reference(shape):
    indices_M, latent_VD, row_scale_V, _ = random_problem(shape)
    expected = reference.embedding_forward(indices_M, trits(latent_VD).bfloat16(), row_scale_V)
    for table in (latent_VD, pack_plane(trits(latent_VD))):
        inputs = (x.to(DEVICE) for x in (indices_M, table, row_scale_V))
        got = triton_embedding.embedding_forward(*inputs, shape[2])
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", ALL)
def test_table_gradient_equals_the_references_sequential_sum(shape, dtype):
    indices_M, _, _, grad_MD = random_problem(shape)
    grad_MD = grad_MD.to(dtype)
    expected = reference.embedding_backward(indices_M, grad_MD, shape[1])
    got = triton_embedding.embedding_backward(indices_M.to(DEVICE), grad_MD.to(DEVICE), shape[1])
    assert torch.equal(got.cpu(), expected)
