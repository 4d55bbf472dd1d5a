"""Cross entropy and its gradient on both paths against float64."""

import pytest
import torch
import torch.nn.functional as F

from arbitor.batch import NO_TARGET
from arbitor.kernel import backend
from arbitor.kernel.cross_entropy.op import cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 2), (63, 288), (65, 63), (5, 1000)]
ALL = SHAPES + [pytest.param((16384, 288), marks=pytest.mark.gpu)]


def random_problem(shape):
    """Logits of some hundreds and below -100, every third position without a target."""
    M, V = shape
    generator = torch.Generator().manual_seed(M + V)
    logits = torch.randn(shape, generator=generator) * torch.logspace(-2, 2, M)[:, None]
    logits[-1] -= 200
    targets = torch.randint(0, V, (M,), generator=generator)
    targets[1::3] = NO_TARGET
    return logits.bfloat16().to(DEVICE), targets.to(DEVICE)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", ALL)
def test_loss_and_gradient_equal_float64(shape, name):
    logits, targets = random_problem(shape)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    backend.set_backend(name)
    loss = cross_entropy(leaf, targets)
    (3 * loss).backward()
    expected = F.cross_entropy(exact, targets, ignore_index=NO_TARGET)
    (3 * expected).backward()
    # float32 sums of up to 16,384 numbers; differences of logits of some hundreds.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    # One rounding to bfloat16 of a probability that is good to 2^-24 of the largest logit.
    relative = 2**-8 + 2**-22 * logits.abs().max().item()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=relative, atol=1e-7)
    assert not leaf.grad[targets == NO_TARGET].any()
    paths = {("cross_entropy.forward", name): 1}
    if name == "triton":
        paths["cross_entropy.backward", name] = 1
    assert backend.path_counts() == paths


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_without_any_target_the_loss_is_no_number_and_the_gradient_zero(name):
    backend.set_backend(name)
    logits = torch.randn(3, 5, device=DEVICE).bfloat16().requires_grad_()
    loss = cross_entropy(logits, torch.full((3,), NO_TARGET, device=DEVICE))
    loss.backward()
    assert loss.isnan()
    assert not logits.grad.any()
