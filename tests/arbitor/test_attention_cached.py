"""Attention to the keys of a cache: against float64, and the kernel against plain torch."""

import math

import pytest
import torch

from arbitor.kernel import backend
from arbitor.kernel.attention import cached_triton
from arbitor.kernel.attention.cached import attend_seen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sequences, queries, keys, heads, head width.
SHAPES = [(1, 1, 1, 1, 16), (2, 1, 65, 3, 64), (1, 3, 130, 2, 20), (2, 17, 40, 2, 32)]


def random_problem(shape, dtype):
    """As a layer passes them: every logit within sqrt(H), values a slice of something."""
    B, M, S, N, H = shape
    generator = torch.Generator().manual_seed(S)

    def random(*size):
        return torch.randn(size, generator=generator)

    query, key = (torch.nn.functional.rms_norm(random(B, t, N, H), (H,)) for t in (M, S))
    seen_MS = torch.rand(M, S, generator=generator) < 0.5
    seen_MS[:, 0] = True
    heads = (query, key, random(B, S, N, 8 + H)[..., 8:])
    return [x.to(DEVICE, dtype) for x in heads], seen_MS.to(DEVICE)


def in_float64(query, key, value, seen_MS):
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    return (scores.masked_fill(~seen_MS, -math.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES)
def test_output_equals_float64(shape, name, dtype):
    heads, seen_MS = random_problem(shape, dtype)
    backend.set_backend(name)
    out = attend_seen(*heads, seen_MS).double()
    exact = in_float64(*heads, seen_MS)
    assert out.shape == exact.shape
    # The result is rounded once; weights, where training's kernels run, by 2^-9 of each too.
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-20
    bound = rounding * (exact.abs() + heads[2].double().abs().amax())
    assert ((out - exact).abs() <= bound).all()
    path = "triton" if name == "triton" and shape[1] <= 16 else "torch"
    assert backend.path_counts() == {("attention.cached", path): 1}


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_kernel_rounds_where_plain_torch_does(shape, monkeypatch):
    heads, seen_MS = random_problem(shape, torch.bfloat16)
    backend.set_backend("triton")
    got = cached_triton.attend_seen(*heads, seen_MS).double()
    monkeypatch.setattr(cached_triton, "MAX_QUERIES", 0)
    expected = attend_seen(*heads, seen_MS).double()
    # Sums of float32 differ in their order alone: a bfloat16 of each few hundred rounds otherwise.
    assert (got != expected).float().mean() < 0.02
    assert ((got - expected).abs() <= 2**-7 * expected.abs()).all()
