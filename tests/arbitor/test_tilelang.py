"""TileLang itself, where it is installed on a GPU: the forward matmul, and training beside it."""

import pytest
import torch

from arbitor.kernel import backend
from arbitor.kernel.latent_update.state import trits
from arbitor.kernel.matmul import reference
from arbitor.kernel.state_format import StateFormat
from arbitor.kernel.ternary_scale import TernaryLinear

pytest.importorskip("tilelang", reason="TileLang is an optional extra")
pytestmark = pytest.mark.gpu
SHAPES = [(1, 1, 16), (63, 65, 48), (1000, 65, 128), (65, 1000, 4096), (257, 384, 512)]


@pytest.fixture(autouse=True)
def tilelang_backend(fresh_backend):
    backend.set_backend("tilelang")


@pytest.mark.parametrize("operand", ["fp8", "int8", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_float64_on_the_same_codes(shape, operand):
    from arbitor.kernel.matmul.tilelang import matmul_forward

    M, N, K = shape
    latent_NK = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    row_scale_N = torch.rand(N) + 0.01
    x = reference.quantize_activation(torch.randn(M, K), "int8" if operand == "int8" else "fp8")
    trits_NK = trits(latent_NK)
    weight_NK = latent_NK if operand != "bfloat16" else trits_NK.bfloat16()
    x_gpu = type(x)(x.codes.cuda(), x.scale.cuda())
    y_MN = matmul_forward(x_gpu, weight_NK.cuda(), row_scale_N.cuda()).cpu().double()

    values, weight = x.codes.double() * x.scale, trits_NK.double() * row_scale_N[:, None]
    expected, absolute_sum = values @ weight.T, values.abs() @ weight.abs().T
    # bfloat16 rounds once, and an fp8 instruction keeps 13 bits below its largest product.
    assert ((y_MN - expected).abs() <= 2**-8 * (expected.abs() + absolute_sum)).all()


def test_the_rule_bigint_trains_beside_tilelang(monkeypatch):
    """The forward pass is TileLang's; the correlations are those of the torch path within 1 %."""
    monkeypatch.setenv(backend.TILELANG_TRAINING_VARIABLE, "1")
    gradients = []
    for name in ("tilelang", "torch"):
        backend.set_backend(name)
        linear = TernaryLinear(96, 40, "fp8")
        linear.initialize(seed=3, name="linear", format=StateFormat(rule="bigint"))
        linear.cuda()
        x = torch.linspace(-1, 1, 960, device="cuda").view(10, 96).requires_grad_()
        linear(x).float().square().sum().backward()
        gradients.append(linear.slot_gradient.float())
    assert backend.path_counts()["matmul.forward", "tilelang"] == 1
    assert (gradients[0] - gradients[1]).norm() <= 0.01 * gradients[1].norm()
