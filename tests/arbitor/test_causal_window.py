"""Causal windows: contents against indexing, gradients against sums, on both paths."""

import pytest
import torch

from arbitor.kernel import backend
from arbitor.kernel.causal_window.op import causal_window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sequences, positions, width, window.
SHAPES = [(3, 1, 7, 3), (2, 2, 65, 3), (3, 63, 300, 3), (1, 9, 16, 1)]
ALL = SHAPES + [pytest.param((8, 2048, 2048, 3), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", ALL)
def test_windows_and_their_gradient(shape, name, dtype):
    B, T, D, W = shape
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(B, T, D, generator=generator).to(DEVICE, dtype).requires_grad_()
    grad = torch.randn(B, T, W, D, generator=generator).to(DEVICE, dtype)
    backend.set_backend(name)
    out = causal_window(x, W)
    out.backward(grad.flatten(2))
    windows, exact = out.detach().view(B, T, W, D), torch.zeros(B, T, D, dtype=torch.float64)
    exact = exact.to(DEVICE)
    for w in range(W):
        back = W - 1 - w
        assert torch.equal(windows[:, back:, w], x.detach()[:, : max(T - back, 0)])
        assert not windows[:, :back, w].any()
        if back < T:
            exact[:, : T - back] += grad[:, back:, w].double()
    # Up to two roundings of sums of three.
    rounding = 2**-7 if dtype == torch.bfloat16 else 2**-22
    assert ((x.grad - exact).abs() <= rounding * (exact.abs() + 3)).all()
    assert set(backend.path_counts()) <= {
        ("causal_window.forward", name),
        ("causal_window.backward", name),
    }
    assert backend.path_counts()["causal_window.forward", name] == 1
