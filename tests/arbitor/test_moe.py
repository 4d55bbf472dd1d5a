"""Experts: choice, gates and gradients against a plain loop; the balance bias."""

import pytest
import torch
import torch.nn.functional as F

from arbitor.moe import (
    BIAS_STEP,
    NUM_EXPERTS,
    SCORE_ONE,
    MixtureOfExperts,
    _MixExperts,
    choose_experts,
)

WIDTH, MESSAGE = 64, 32


def make_experts(message_width=MESSAGE):
    experts = MixtureOfExperts(WIDTH, message_width, "fp8", output_gain=0.5)
    for name, weight in experts.named_children():
        weight.initialize(seed=0, name=name)
    return experts


def test_the_two_highest_scores_are_chosen_the_lower_expert_first():
    score = torch.tensor([[0.1, 0.9, 0.3, 0.9, 0.2, 0.9, 0.0, 0.5], [0.0] * 7 + [1.0]])
    bias = torch.zeros(NUM_EXPERTS, dtype=torch.int32)
    assert choose_experts(score, bias).nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 7]]
    bias[6] = SCORE_ONE
    assert choose_experts(score, bias)[:, 6].all()


def test_the_mixture_is_a_plain_loop_over_positions_and_their_experts():
    experts = make_experts()
    hidden, message = torch.randn(2, 7, WIDTH).bfloat16(), torch.randn(2, 7, MESSAGE).bfloat16()
    out = experts(hidden, message)
    gates = experts._route(hidden, message)
    inner = experts.shared_input(hidden).flatten(0, 1)
    every = experts.experts(inner).view(14, NUM_EXPERTS, -1).float()
    mixed = torch.zeros(14, WIDTH // 2)
    scores = experts.router(torch.cat([hidden, message], dim=-1)).flatten(0, 1).float().sigmoid()
    for m in range(14):
        two = sorted(range(NUM_EXPERTS), key=lambda e: (-float(scores[m, e]), e))[:2]
        for e in two:
            gate, up = every[m, e].chunk(2)
            share = scores[m, e] / (scores[m, two[0]] + scores[m, two[1]])
            assert gates[m, e] == pytest.approx(float(share), rel=1e-6)
            mixed[m] += share * F.silu(gate) * up
    expected = experts.shared_output(mixed.bfloat16()).view_as(hidden)
    # The sum over experts may differ in a last bit of bfloat16 before the output projection.
    assert F.cosine_similarity(out.float().flatten(), expected.float().flatten(), dim=0) > 0.9999


def test_experts_chosen_for_balance_alone_have_finite_gates_and_gradients():
    """Scores of both so small that they are 0 as float32."""
    experts = make_experts(message_width=0)
    experts.router.log2_scale.fill_(256 * 8)
    hidden = torch.randn(1, 1, WIDTH).bfloat16().requires_grad_()
    logits = experts.router(hidden).flatten().float()
    lowest = logits.argsort()[:2]
    assert (logits[lowest].sigmoid() == 0).all()
    experts.balance_bias[lowest] = SCORE_ONE + 1
    gates = experts._route(hidden, None)
    assert gates[0, lowest].sum().item() == pytest.approx(1)
    gates[0, lowest[0]].backward()
    assert hidden.grad.isfinite().all()


def test_gradients_of_the_mixture_are_those_of_autograd():
    random = torch.Generator().manual_seed(0)
    y = torch.randn(5, NUM_EXPERTS, 12, generator=random, requires_grad=True)
    gate = torch.rand(5, NUM_EXPERTS, generator=random, requires_grad=True)
    grad = torch.randn(5, 6, generator=random).bfloat16()
    _MixExperts.apply(y, gate).backward(grad)
    ours, (y.grad, gate.grad) = (y.grad, gate.grad), (None, None)
    left, right = y.chunk(2, dim=-1)
    ((F.silu(left) * right) * gate.unsqueeze(-1)).sum(dim=1).backward(grad.float())
    torch.testing.assert_close(ours[0], y.grad, rtol=1e-5, atol=1e-6)  # float32, sums of 8 terms
    torch.testing.assert_close(ours[1], gate.grad, rtol=1e-5, atol=1e-6)


def test_an_expert_that_no_position_chose_gets_no_gradient():
    experts = make_experts()
    experts.balance_bias[:] = torch.tensor([SCORE_ONE] * 2 + [-SCORE_ONE] * 6)
    experts(
        torch.randn(1, 9, WIDTH).bfloat16().requires_grad_(), torch.zeros(1, 9, MESSAGE)
    ).sum().backward()
    gradient_ENK = experts.experts.slot_gradient.view(NUM_EXPERTS, -1)
    assert gradient_ENK.any(dim=1).tolist() == [True] * 2 + [False] * 6
    assert experts.router.slot_gradient.any(dim=1).tolist() == [True] * 2 + [False] * 6


def test_the_bias_moves_by_integers_towards_the_mean_load():
    experts = make_experts()
    figures = experts.apply_counts(
        torch.tensor([[8, 0, 4, 4, 4, 4, 4, 4], [8, 0, 4, 4, 4, 4, 4, 4]]), 0
    )
    assert experts.balance_bias.tolist() == [-BIAS_STEP, BIAS_STEP, 0, 0, 0, 0, 0, 0]
    assert figures["moe/load_max"] == 0.25 and figures["moe/load_min"] == 0


def test_without_gradients_nothing_is_counted_and_with_them_every_use_is():
    experts = make_experts(message_width=0)
    hidden = torch.randn(2, 7, WIDTH).bfloat16()
    with torch.no_grad():
        experts(hidden, None)
    experts(hidden, None), experts(hidden, None)
    assert experts.take_counts().sum() == 2 * 2 * 14
