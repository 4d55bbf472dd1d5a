"""Attention: torch's path and the kernels against dense float64.

Shape letters: B sequences, T positions, N heads, H head width, S keys.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from arbitor.kernel import backend
from arbitor.kernel.attention import reference
from arbitor.kernel.attention.op import attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Sequences, positions, heads, head width.
SHAPES = [(2, 1, 2, 16), (1, 63, 1, 32), (2, 65, 2, 16), (1, 96, 1, 64)]
LARGE = [(2, 1000, 3, 64), (1, 2049, 2, 64), (2, 1000, 3, 128), (2, 2048, 8, 64), (1, 65, 1, 128)]
ALL = SHAPES + [pytest.param(shape, marks=pytest.mark.gpu) for shape in LARGE]
BY_TRITON = {("attention.forward", "triton"): 1, ("attention.backward", "triton"): 1}


@pytest.fixture(autouse=True)
def fresh_backend(monkeypatch):
    monkeypatch.setattr(backend, "_active", None)
    backend.clear_path_counts()
    yield
    backend.clear_path_counts()


@pytest.fixture
def kernels(monkeypatch):
    """The Triton module with poisoned outputs; on the interpreter with blocks so small that short
    sequences have several, of queries wider than of keys and the other way round."""
    triton = pytest.importorskip("arbitor.kernel.attention.triton")
    if DEVICE == "cpu":
        monkeypatch.setattr(triton, "FORWARD", {128: triton.Tile(32, 16, 4, 1)})
        monkeypatch.setattr(triton, "BACKWARD_QUERY", {128: triton.Tile(16, 32, 4, 1)})
        monkeypatch.setattr(triton, "BACKWARD_KEY", {128: triton.Tile(16, 32, 4, 1)})
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **k: empty(*s, **k).fill_(float("nan")))
    return triton


def random_problem(shape, dtype=torch.bfloat16):
    """Query, key and value as `MultiHeadLatentAttention` passes them, the value a slice, and the
    gradient of the output."""
    B, T, N, H = shape
    generator = torch.Generator().manual_seed(T)

    def random(width):
        return torch.randn(B, T, N, width, generator=generator)

    query, key = (F.rms_norm(random(H), (H,)) for _ in range(2))
    value, grad = random(H + 8).to(DEVICE, dtype)[..., 8:], random(H)
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype), value, grad.to(DEVICE, dtype)


def run(name, query, key, value, grad):
    """Output and gradients on a backend."""
    backend.set_backend(name)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = attend(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def in_float64(query, key, value, grad):
    """The same by the reference; and of each the sum of its terms without their signs."""
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    out = reference.attend(*leaves)
    out.backward(grad.double())
    exact = [out.detach(), *(leaf.grad for leaf in leaves)]

    query, key, value, grad = (x.detach().double().abs() for x in (*leaves, grad))
    B, _, N, H = query.shape
    S = key.shape[1]
    one_hot = torch.eye(S, dtype=torch.float64, device=key.device)[:, None].expand(B, S, N, S)
    weights_BTNS = reference.attend(*(x.detach() for x in leaves[:2]), one_hot)
    products_BTNS = torch.einsum("btnh,bsnh->btns", grad, value)
    delta_BTN1 = (grad * exact[0].abs()).sum(-1, keepdim=True)
    grad_scores_BTNS = weights_BTNS * (products_BTNS + delta_BTN1) / math.sqrt(H)
    terms = [
        torch.einsum("btns,bsnh->btnh", weights_BTNS, value),
        torch.einsum("btns,bsnh->btnh", grad_scores_BTNS, key),
        torch.einsum("btns,btnh->bsnh", grad_scores_BTNS, query),
        torch.einsum("btns,btnh->bsnh", weights_BTNS, grad),
    ]
    return exact, terms


def assert_within_rounding(got, exact, terms):
    """bfloat16 rounds by 2^-8: the weight or the gradient of a score in each term, the sum of the
    terms, for the gradients of scores the saved output too. float32 adds 2^-15 at most."""
    for number, roundings in enumerate((2, 3, 3, 2)):
        bound = (roundings * 2**-8 + 2**-15) * terms[number]
        assert got[number].shape == exact[number].shape
        assert ((got[number].double() - exact[number]).abs() <= bound).all(), number


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("shape", ALL)
def test_output_and_gradients_equal_float64(shape, name, kernels):
    problem = random_problem(shape)
    got = run(name, *problem)
    assert_within_rounding(got, *in_float64(*problem))
    assert got[0].is_contiguous()
    if name == "triton":
        assert backend.path_counts() == BY_TRITON


def test_largest_logits_stay_finite(kernels):
    """All queries and keys are the same vector of norm sqrt(H): every logit is sqrt(H)."""
    shape = (1, 50, 1, 128)
    _, _, value, grad = random_problem(shape)
    same = torch.ones(shape, dtype=torch.bfloat16, device=DEVICE)
    problem = (same, same, value, grad)
    assert_within_rounding(run("triton", *problem), *in_float64(*problem))


def test_sharp_attention_follows_the_largest_logit(kernels):
    """Keys are the queries in random order: logits between -sqrt(H) and sqrt(H)."""
    query, _, value, grad = random_problem((1, 65, 2, 64))
    key = query[:, torch.randperm(65, generator=torch.Generator().manual_seed(0))]
    problem = (query, -key, value, grad)
    assert_within_rounding(run("triton", *problem), *in_float64(*problem))


def test_a_later_position_changes_no_bit_of_an_earlier_one(kernels):
    problem = random_problem((1, 70, 1, 32))
    before = run("triton", *problem)[0]
    changed = [x.clone() for x in problem]
    for x in changed[:3]:
        x[:, 40:] = -x[:, 40:]
    after = run("triton", *changed)[0]
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


@pytest.mark.parametrize(
    "shape", [(1, 33, 2, 32), pytest.param((4, 1500, 16, 64), marks=pytest.mark.gpu)]
)
def test_same_inputs_give_the_same_bits(shape, kernels):
    problem = random_problem(shape)
    first = run("triton", *problem)
    for _ in range(3 if DEVICE == "cuda" else 1):
        for a, b in zip(first, run("triton", *problem), strict=True):
            assert torch.equal(a, b)


def test_gradients_of_any_strides_are_read(kernels):
    query, key, value, grad = random_problem((2, 20, 3, 16))
    heads_first = grad.transpose(1, 2).contiguous().transpose(1, 2)
    for strided in (heads_first, grad[..., :1].expand_as(grad)):
        got = run("triton", query, key, value, strided)
        expected = run("triton", query, key, value, strided.contiguous())
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype, H", [(torch.bfloat16, 24), (torch.float32, 32)])
def test_what_the_kernels_do_not_serve_takes_the_path_of_torch(dtype, H, kernels):
    problem = random_problem((1, 9, 2, H), dtype)
    out = run("triton", *problem)[0]
    assert backend.path_counts() == {("attention.forward", "torch"): 1}
    expected = reference.attend(*problem[:3])
    torch.testing.assert_close(out.float(), expected.float(), rtol=2**-7, atol=2**-7)
