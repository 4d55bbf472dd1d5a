"""Attention: torch's path and the kernels against dense float64.

Shape letters: B sequences, T positions, N heads, H head width, S keys.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arbitor.kernel import backend
from arbitor.kernel.attention import chunked, reference, triton
from arbitor.kernel.attention.op import attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Sequences, positions, heads, head width.
SHAPES = [(2, 1, 2, 16), (1, 63, 1, 32), (2, 65, 2, 16), (1, 96, 1, 64)]
LARGE = [(2, 1000, 3, 64), (1, 2049, 2, 64), (2, 1000, 3, 128), (2, 2048, 8, 64), (1, 65, 1, 128)]
ALL = SHAPES + [pytest.param(shape, marks=pytest.mark.gpu) for shape in LARGE]
BY_TRITON = {("attention.forward", "triton"): 1, ("attention.backward", "triton"): 1}


@pytest.fixture
def kernels(monkeypatch, poisoned):
    """The Triton module with poisoned outputs; on the interpreter with blocks so small that short
    sequences have several, of queries wider than of keys and the other way round."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton, "FORWARD", {128: triton.Tile(32, 16, 4, 1)})
        monkeypatch.setattr(triton, "BACKWARD_QUERY", {128: triton.Tile(16, 32, 4, 1)})
        monkeypatch.setattr(triton, "BACKWARD_KEY", {128: triton.Tile(16, 32, 4, 1)})
    return triton


def random_problem(shape, dtype=torch.bfloat16, num_blocks=0):
    """Query, key and value as `MultiHeadLatentAttention` passes them, the value a slice; the
    gradient of the output; a pair of compressed keys and values, if there are blocks."""
    B, T, N, H = shape
    generator = torch.Generator().manual_seed(T)

    def random(length, width):
        return torch.randn(B, length, N, width, generator=generator)

    def pair(length):
        return F.rms_norm(random(length, H), (H,)), random(length, H + 8)

    def on_device(x):
        return x.to(DEVICE, dtype)

    query, grad = F.rms_norm(random(T, H), (H,)), random(T, H)
    (key, value), compressed = pair(T), pair(num_blocks) if num_blocks else ()
    value, *compressed = (on_device(x)[..., -H:] for x in (value, *compressed))
    return on_device(query), on_device(key), value, on_device(grad), *compressed


def run(name, problem, window=0, stride=1):
    """Output and gradients on a backend."""
    backend.set_backend(name)
    return backward(attend, problem, window, stride)


def backward(call, problem, window, stride):
    query, key, value, grad, *compressed = problem
    leaves = [x.detach().requires_grad_() for x in (query, key, value, *compressed)]
    out = call(*leaves[:3], leaves[3:] or None, window, stride)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def in_float64(problem, window=0, stride=1):
    """The same by the reference; and of each the sum of its terms without their signs."""
    problem = [x.double() for x in problem]
    exact = backward(reference.attend, problem, window, stride)
    query, key, value, grad, *compressed = problem
    (B, _, N, H), num_blocks = query.shape, compressed[0].shape[1] if compressed else 0
    S = num_blocks + key.shape[1]
    one_hot = torch.eye(S, dtype=torch.float64, device=key.device)[:, None].expand(B, S, N, S)
    one_hot = one_hot.split([num_blocks, key.shape[1]], dim=1)
    pair = (compressed[0], one_hot[0]) if compressed else None
    weights_BTNS = reference.attend(query, key, one_hot[1], pair, window, stride)

    if compressed:
        key, value = (torch.cat([c, x], 1) for c, x in zip(compressed, (key, value), strict=True))
    query, key, value, grad = (x.abs() for x in (query, key, value, grad))
    products_BTNS = torch.einsum("btnh,bsnh->btns", grad, value)
    delta_BTN1 = (grad * exact[0].abs()).sum(-1, keepdim=True)
    grad_scores_BTNS = weights_BTNS * (products_BTNS + delta_BTN1) / math.sqrt(H)
    key_terms = torch.einsum("btns,btnh->bsnh", grad_scores_BTNS, query)
    value_terms = torch.einsum("btns,btnh->bsnh", weights_BTNS, grad)
    terms = [
        torch.einsum("btns,bsnh->btnh", weights_BTNS, value),
        torch.einsum("btns,bsnh->btnh", grad_scores_BTNS, key),
        *(x[:, num_blocks:] for x in (key_terms, value_terms)),
        *(x[:, :num_blocks] for x in (key_terms, value_terms)),
    ]
    return exact, terms


def assert_within_rounding(got, exact, terms, more=0):
    """bfloat16 rounds by 2^-8: the weight or the gradient of a score in each term, the sum of the
    terms, for the gradients of scores the saved output too. float32 adds 2^-15 at most.

    PyTorch's own kernel sums gradients in bfloat16 over blocks of queries: it rounds `more`.
    """
    for number, (ours, theirs) in enumerate(zip(got, exact, strict=True)):
        roundings = (2, 3, 3, 2, 3, 2)[number] + more
        bound = (roundings * 2**-8 + 2**-15) * terms[number]
        assert ours.shape == theirs.shape
        assert ((ours.double() - theirs).abs() <= bound).all(), number


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("shape", ALL)
def test_output_and_gradients_equal_float64(shape, name, kernels):
    problem = random_problem(shape)
    got = run(name, problem)
    assert_within_rounding(got, *in_float64(problem), more=2 if name == "torch" else 0)
    assert got[0].is_contiguous()
    if name == "triton":
        assert backend.path_counts() == BY_TRITON


# Shape, window, stride, compressed blocks (more than are seen in some, none in others).
WINDOWS = [
    ((2, 65, 2, 16), 16, 4, 17),
    ((1, 70, 1, 32), 7, 3, 23),
    ((1, 96, 1, 16), 1, 16, 6),
    ((1, 97, 1, 16), 40, 16, 4),
    ((1, 40, 1, 16), 33, 8, 5),
    ((1, 90, 1, 16), 20, 5, 0),
    ((1, 33, 1, 16), 1, 1, 32),
    ((1, 1, 1, 16), 1, 2, 1),
]
LARGE_WINDOWS = [
    ((2, 1000, 3, 64), 128, 16, 63),
    ((1, 2049, 2, 64), 300, 1, 2049),
    ((1, 1500, 2, 64), 1000, 4, 375),
    ((1, 1000, 2, 128), 128, 16, 63),
    ((1, 1000, 2, 64), 200, 16, 0),
]


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize(
    "shape, window, stride, num_blocks",
    WINDOWS + [pytest.param(*case, marks=pytest.mark.gpu) for case in LARGE_WINDOWS],
)
def test_windows_and_compressed_keys_equal_float64(
    shape, window, stride, num_blocks, name, kernels, monkeypatch
):
    if DEVICE == "cpu":
        monkeypatch.setattr(chunked, "_CHUNK", 24)
    problem = random_problem(shape, num_blocks=num_blocks)
    got = run(name, problem, window, stride)
    assert_within_rounding(got, *in_float64(problem, window, stride))
    assert got[0].is_contiguous()
    if name == "triton":
        assert backend.path_counts() == BY_TRITON


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("window", [1, 30, 64])
def test_stride_1_on_the_keys_themselves_is_dense_attention(window, name, kernels, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK", 24)
    query, key, value, grad = random_problem((1, 64, 1, 16))
    exact, terms = in_float64((query, key, value, grad))
    got = run(name, (query, key, value, grad, key, value), window, 1)
    # The two gradients of a key, each of it rounded once.
    got = [*got[:2], got[2].double() + got[4].double(), got[3].double() + got[5].double()]
    assert_within_rounding(got, exact, terms)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_blocks_that_nobody_sees_are_ignored(name, kernels, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK", 24)
    problem = random_problem((1, 50, 1, 16), num_blocks=12)
    expected = run(name, problem, 20, 5)
    for x in problem[4:]:
        x[:, 6:] = float("nan")
    got = run(name, problem, 20, 5)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert not got[4][:, 6:].any() and got[4][:, 5].any()


def test_too_few_blocks_are_refused():
    problem = random_problem((1, 50, 1, 16), num_blocks=5)
    with pytest.raises(ValueError, match="see 6 compressed blocks, got 5"):
        run("torch", problem, 20, 5)
    with pytest.raises(ValueError, match="give its length"):
        run("torch", problem)


def test_memory_of_the_path_of_torch_is_linear(monkeypatch):
    """No tensor of it, forward or backward, has more numbers than queries and their gradient."""
    monkeypatch.setattr(chunked, "_CHUNK", 32)

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    self.numbers = max(self.numbers, x.numel())
            return out

    T, H = 2048, 16
    problem = random_problem((1, T, 1, H), num_blocks=T // 16)
    with Largest() as largest:
        run("torch", problem, 32, 16)
    assert T * H <= largest.numbers <= 2 * T * H


def test_largest_logits_stay_finite(kernels):
    """All queries and keys are the same vector of norm sqrt(H): every logit is sqrt(H)."""
    shape = (1, 50, 1, 128)
    _, _, value, grad = random_problem(shape)
    same = torch.ones(shape, dtype=torch.bfloat16, device=DEVICE)
    problem = (same, same, value, grad)
    assert_within_rounding(run("triton", problem), *in_float64(problem))


def test_sharp_attention_follows_the_largest_logit(kernels):
    """Keys are the queries in random order: logits between -sqrt(H) and sqrt(H)."""
    query, _, value, grad = random_problem((1, 65, 2, 64))
    key = query[:, torch.randperm(65, generator=torch.Generator().manual_seed(0))]
    problem = (query, -key, value, grad)
    assert_within_rounding(run("triton", problem), *in_float64(problem))


@pytest.mark.parametrize("window, stride, num_blocks", [(0, 1, 0), (16, 4, 17)])
def test_a_later_position_changes_no_bit_of_an_earlier_one(window, stride, num_blocks, kernels):
    problem = random_problem((1, 70, 1, 32), num_blocks=num_blocks)
    before = run("triton", problem, window, stride)[0]
    changed = [x.clone() for x in problem]
    for x in changed[:3]:
        x[:, 40:] *= -1
    for x in changed[4:]:
        x[:, 40 // stride :] *= -1
    after = run("triton", changed, window, stride)[0]
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


@pytest.mark.parametrize("window, stride, num_blocks", [(0, 1, 0), (128, 16, 94)])
@pytest.mark.parametrize(
    "shape", [(1, 33, 2, 32), pytest.param((4, 1500, 16, 64), marks=pytest.mark.gpu)]
)
def test_same_inputs_give_the_same_bits(shape, window, stride, num_blocks, kernels):
    problem = random_problem(shape, num_blocks=num_blocks)
    first = run("triton", problem, window, stride)
    for _ in range(3 if DEVICE == "cuda" else 1):
        for a, b in zip(first, run("triton", problem, window, stride), strict=True):
            assert torch.equal(a, b)


def test_gradients_of_any_strides_are_read(kernels):
    query, key, value, grad = random_problem((2, 20, 3, 16))
    heads_first = grad.transpose(1, 2).contiguous().transpose(1, 2)
    for strided in (heads_first, grad[..., :1].expand_as(grad)):
        got = run("triton", (query, key, value, strided))
        expected = run("triton", (query, key, value, strided.contiguous()))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype, H", [(torch.bfloat16, 24), (torch.float32, 32)])
@pytest.mark.parametrize("window", [0, 4])
def test_what_the_kernels_do_not_serve_takes_the_path_of_torch(window, dtype, H, kernels):
    problem = random_problem((1, 9, 2, H), dtype)
    got = run("triton", problem, window)
    assert backend.path_counts() == {("attention.forward", "torch"): 1}
    assert_within_rounding(got, *in_float64(problem, window))
