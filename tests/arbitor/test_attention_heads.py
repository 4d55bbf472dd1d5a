"""Heads of queries, keys and values: the reference against float64, the kernels against it."""

import pytest
import torch
import torch.nn.functional as F

from arbitor.attention.mla import rotation_at, rotation_table
from arbitor.kernel import backend
from arbitor.kernel.attention_heads.op import attention_heads, key_heads, query_heads
from arbitor.kernel.attention_heads.reference import EPSILON, ROTATION_UNIT, rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Sequences, positions, heads, content width, rotary width.
SHAPES = [(3, 1, 1, 32, 32), (2, 63, 3, 32, 32), (1, 65, 2, 48, 16), (2, 33, 3, 13, 6)]
LARGE = [(1, 1000, 3, 32, 32), (8, 2048, 32, 32, 32), (2, 1000, 5, 1, 2), (1, 4097, 2, 96, 32)]
ALL = SHAPES + [pytest.param(shape, marks=pytest.mark.gpu) for shape in LARGE]


def random_problem(shape, dtype):
    """Inputs as `MultiHeadLatentAttention` passes them: the rotary key is a slice; gradients."""
    B, T, N, C, W = shape
    generator = torch.Generator().manual_seed(B * T + N)

    def random(*size):
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    query, expanded = random(B, T, N * (C + W)), random(B, T, N * (2 * C + W))
    rotary_key = random(B, T, 8 + W)[..., 8:]
    # Attention may return gradients with heads before positions, or a part of something.
    gradients = (
        random(B, N, T, C + W).transpose(1, 2),
        random(B, T, N, C + W),
        random(B, T, N, 3 + C + W)[..., 3:],
    )
    return (query, expanded, rotary_key), gradients


def run(name, inputs, gradients, shape):
    """Outputs and input gradients on a backend, all in float64."""
    backend.set_backend(name)
    _, T, N, _, W = shape
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = attention_heads(*leaves, rotation_table(T, W // 2, leaves[0].device), N)
    torch.autograd.backward(outputs, gradients)
    return [x.double() for x in (*outputs, *(leaf.grad for leaf in leaves))]


def in_float64(inputs, gradients, shape):
    """The same from the formulas alone, the rotation as complex numbers."""
    B, T, N, C, W = shape
    leaves = [x.double().detach().requires_grad_() for x in inputs]
    query, expanded, rotary_key = leaves
    table = rotation_table(T, W // 2, query.device).double() * ROTATION_UNIT
    turn = torch.complex(table[0], table[1])[None, :, None]

    def turned(x):
        x = F.rms_norm(x, (W,), eps=EPSILON)
        x = torch.complex(x[..., : W // 2], x[..., W // 2 :]) * turn
        return torch.cat([x.real, x.imag], dim=-1)

    query = query.view(B, T, N, C + W)
    expanded = expanded.view(B, T, N, 2 * C + W)
    content = [F.rms_norm(x[..., :C], (C,), eps=EPSILON) for x in (query, expanded)]
    rotary = turned(rotary_key[:, :, None]).expand(B, T, N, W)
    outputs = (
        torch.cat([content[0], turned(query[..., C:])], dim=-1),
        torch.cat([content[1], rotary], dim=-1),
        expanded[..., C:],
    )
    torch.autograd.backward(outputs, [g.double() for g in gradients])
    return [x.detach() for x in (*outputs, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", ALL)
def test_outputs_and_gradients_equal_float64(shape, name, dtype):
    inputs, gradients = random_problem(shape, dtype)
    got = run(name, inputs, gradients, shape)
    # bfloat16 rounds by 2^-8 of the number; float32 sums of up to 32 terms are good to 2^-20 of
    # the largest. The kernels' gradient takes the normalized vectors from the rounded outputs, and
    # cosines and sines are 2^-15 off: turning there and back scales by 1 +- 2^-13.5.
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-24
    for number, (ours, exact) in enumerate(
        zip(got, in_float64(inputs, gradients, shape), strict=True)
    ):
        of_largest = 2**-20 if number < 3 else max(2**-13, rounding)
        bound = rounding * exact.abs() + of_largest * exact.abs().max()
        assert ours.shape == exact.shape
        assert ((ours - exact).abs() <= bound).all(), number
    if name == "triton":
        assert backend.path_counts() == {
            ("attention_heads.forward", "triton"): 1,
            ("attention_heads.backward", "triton"): 1,
        }


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_attention_reads_the_results_without_copies(name):
    backend.set_backend(name)
    (query, expanded, rotary_key), _ = random_problem((2, 5, 3, 32, 32), torch.bfloat16)
    heads = attention_heads(query, expanded, rotary_key, rotation_table(5, 16, query.device), 3)
    for x in heads:
        assert x.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in x.stride()[:3])
    assert heads[2].data_ptr() == expanded[..., 32:].data_ptr()
    assert heads[0].is_contiguous()


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_and_queries_alone_are_those_of_all_heads(shape, name):
    (query, expanded, rotary_key), (_, *gradients) = inputs, grads = random_problem(
        shape, torch.bfloat16
    )
    asked, key, value, _, *expected = run(name, inputs, grads, shape)
    backend.clear_path_counts()
    leaves = [x.detach().requires_grad_() for x in (expanded, rotary_key)]
    table = rotation_table(shape[1], shape[4] // 2, expanded.device)
    outputs = key_heads(*leaves, table, shape[2])
    torch.autograd.backward(outputs, gradients)
    got = [x.double() for x in (*outputs, *(leaf.grad for leaf in leaves))]
    for ours, theirs in zip(got, (key, value, *expected), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(query_heads(query, table, shape[2]).double(), asked)
    counts = backend.path_counts()
    assert counts["key_heads.forward", name] == counts["query_heads.forward", name] == 1


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_slice_of_the_table_continues_a_sequence(name):
    backend.set_backend(name)
    shape = (2, 9, 3, 16, 16)
    inputs, _ = random_problem(shape, torch.bfloat16)
    table = rotation_table(9, 8, inputs[0].device)
    whole = attention_heads(*inputs, table, 3)
    rest = attention_heads(*(x[:, 6:] for x in inputs), table[:, 6:], 3)
    for a, b in zip(whole, rest, strict=True):
        assert torch.equal(a[:, 6:], b)


def test_a_table_with_a_stride_has_the_last_positions_of_its_blocks():
    table = rotation_table(12, 8, torch.device("cpu"))
    assert torch.equal(rotation_table(3, 8, torch.device("cpu"), 4), table[:, 3::4])
    assert torch.equal(rotation_at(torch.tensor([7, 2]), 8), table[:, [7, 2]])


def test_rotation_keeps_norms_and_depends_on_distance_alone():
    table = rotation_table(12, 8, torch.device("cpu"))
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    query, key = (rotate(x.expand(1, 12, 1, 16), table)[0, :, 0] for x in (query, key))
    # Cosines and sines are 2^-15 off.
    torch.testing.assert_close(
        query.norm(dim=-1), query[:1].norm(dim=-1).expand(12), rtol=1e-4, atol=0
    )
    products = query @ key.T
    torch.testing.assert_close(products[3, 1], products[9, 7], rtol=1e-3, atol=1e-3)


def test_the_table_holds_the_angles_of_all_positions():
    table = rotation_table(3000, 4, torch.device("cpu")) * ROTATION_UNIT
    angle = torch.arange(3000).double()[:, None] / 10 ** torch.arange(4)
    exact = torch.stack([angle.cos(), angle.sin()])
    assert (table - exact).abs().max() <= ROTATION_UNIT / 2 + 1e-9
