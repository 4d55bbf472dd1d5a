"""Packed weights compute what the weights that they came from compute, bit for bit."""

import pytest
import torch

from arbitor.kernel import backend
from arbitor.kernel.matmul import decode_gemv
from arbitor.kernel.state_format import StateFormat
from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryLinear

FORMATS = [
    StateFormat(),
    StateFormat(latent_bits=6, momentum_bits=4),
    StateFormat(group_size=16),
    StateFormat(rule="bigint"),
    StateFormat(rule="bigint", group_size=32),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def disturb(weight):
    """Scales as training leaves them: no two rows and groups alike."""
    generator = torch.Generator().manual_seed(1)

    def noise(like, low, high):
        return torch.randint(low, high, like.shape, generator=generator).to(like)

    weight.log2_scale += noise(weight.log2_scale, -400, 400)
    if weight.format.rule == "bigint":
        weight.step_counter += 7
        weight.corr_accum += noise(weight.corr_accum, -30, 30)
    elif weight.format.group_size:
        weight.group_exponent += noise(weight.group_exponent, -9, 4)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packing_changes_no_output(format):
    linear, table = TernaryLinear(100, 36, "fp8"), TernaryEmbedding(30, 70)
    x, indices = torch.randn(5, 100).bfloat16(), torch.tensor([[0, 29, 3]])
    with torch.no_grad():
        for weight, inputs in ((linear, x), (table, indices)):
            weight.initialize(0, "weight", format)
            disturb(weight)
            before, trits = weight(inputs), weight.trits()
            weight.pack()
            assert torch.equal(weight(inputs), before)
            assert torch.equal(weight.trits(), trits)
            assert (
                weight.is_packed and {"plane", "log2_scale"} <= dict(weight.named_buffers()).keys()
            )
            assert "latent" not in dict(weight.named_buffers())


@pytest.mark.parametrize("activation", ["fp8", "int8"])
@pytest.mark.parametrize(("positions", "path"), [(1, "plane"), (64, "plane"), (65, "unpacked")])
def test_few_positions_read_the_plane_itself(positions, path, activation, monkeypatch):
    monkeypatch.setattr(decode_gemv, "MAX_POSITIONS", 64)
    linear = TernaryLinear(100, 36, activation)
    linear.initialize(0, "linear")
    linear.pack()
    x = torch.randn(positions, 100).bfloat16().to(DEVICE)
    if activation == "int8":
        # Whole codes: random ones come so near to the border of two that backends differ by one.
        x = torch.randint(-127, 128, (positions, 100)).bfloat16().to(DEVICE)
        x[:, 0] = 127
    with torch.no_grad():
        backend.set_backend("torch")
        expected = linear.to(DEVICE)(x).float()
        backend.set_backend("triton")
        backend.clear_path_counts()
        got = linear(x).float()
    # Products are exact and sums are float32 of 100 terms; the result is rounded to bfloat16.
    assert ((got - expected).abs() <= 2**-7 * expected.abs() + 1e-4 * expected.abs().max()).all()
    read_plane = ("matmul.forward", "plane") in backend.path_counts()
    assert read_plane == (path == "plane")
