"""The SwiGLU reference against float64 autograd; a gated linear against an explicit one."""

import pytest
import torch
import torch.nn.functional as F

from arbitor.kernel import backend
from arbitor.kernel.swiglu.reference import swiglu_backward, swiglu_forward
from arbitor.kernel.ternary_scale import TernaryLinear


@pytest.mark.parametrize("shape", [(1, 1), (63, 65), (2, 1000)])
def test_output_and_gradient_equal_float64(shape):
    M, K = shape
    generator = torch.Generator().manual_seed(K)
    x = torch.randn(M, 2 * K, generator=generator) * torch.logspace(-2, 2, M)[:, None]
    x, grad = x.bfloat16(), torch.randn(shape, generator=generator)
    exact = x.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    y = F.silu(gate) * up
    y.backward(grad.double())
    # A few float32 roundings of each term; the slope of silu cancels around -1.28.
    torch.testing.assert_close(swiglu_forward(x).double(), y.detach(), rtol=1e-6, atol=1e-30)
    atol = 1e-6 * up.abs().max().item()
    torch.testing.assert_close(swiglu_backward(grad, x).double(), exact.grad, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_gated_linear_is_a_linear_after_swiglu(name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 33, 2 * 96, generator=generator).bfloat16().to(device)
    grad = torch.randn(2, 33, 40, generator=generator).bfloat16().to(device)
    backend.set_backend(name)
    results = []
    for gated in (True, False):
        linear = TernaryLinear(96, 40, "fp8", gated=gated)
        linear.initialize(seed=3, name="linear")
        linear.to(device)
        leaf = x.clone().requires_grad_()
        inner = leaf if gated else explicit_swiglu(leaf)
        y = linear(inner)
        y.backward(grad)
        results.append([t.float() for t in (y, leaf.grad, linear.slot_gradient)])
    counts = backend.path_counts()
    assert counts["rms_norm.forward", name] == counts["rms_norm.backward", name] == 2
    for ours, expected in zip(*results, strict=True):
        # bfloat16 roundings of the gradient; a code off by one moves a sum by less.
        assert (ours - expected).norm() / expected.norm() < 2**-7


def explicit_swiglu(x):
    gate, up = x.float().chunk(2, dim=-1)
    return F.silu(gate) * up
