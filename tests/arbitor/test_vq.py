"""The VQ bridge: gradients, usage counts, splitting of idle codes."""

import math

import pytest
import torch
import torch.nn.functional as F

from arbitor import vq
from arbitor.kernel.state_format import StateFormat
from arbitor.vq import CODE_WIDTH, IDLE_STEPS, VQBridge


def make_bridge(num_codes=32, width=64, **format):
    bridge = VQBridge(width, num_codes, "fp8", output_gain=0.5)
    for name, weight in bridge.named_children():
        weight.initialize(seed=0, name=name, format=StateFormat(**format))
    return bridge


def test_what_is_added_is_the_projected_code_and_the_gradient_passes_straight_through():
    bridge = make_bridge()
    hidden = torch.randn(2, 9, 64).bfloat16().requires_grad_()
    out, codes, loss = bridge(hidden)
    code = vq.normalize(bridge.codebook(codes)).to(torch.bfloat16)
    assert torch.equal(out, hidden + bridge.up(code))
    out.backward(torch.randn_like(out))
    assert bridge.down.slot_gradient is not None and bridge.up.slot_gradient is not None
    assert bridge.codebook.slot_gradient is None or not bridge.codebook.slot_gradient.any()


def test_the_auxiliary_loss_pulls_codes_and_positions_together():
    bridge = make_bridge()
    hidden = torch.randn(2, 9, 64).bfloat16().requires_grad_()
    _, codes, loss = bridge(hidden)
    loss.backward()
    weight = bridge.codebook.operand().float() * bridge.codebook.row_scale().unsqueeze(1)
    searched = vq.normalize(bridge.down(hidden)).detach()

    def distance(step):
        moved = weight - step * bridge.codebook.slot_gradient
        return F.mse_loss(vq.normalize(moved[codes]), searched)

    assert distance(1e-2) < distance(0.0)
    unused = torch.ones(32, dtype=torch.bool)
    unused[codes] = False
    assert unused.any() and not bridge.codebook.slot_gradient[unused].any()
    assert hidden.grad.any() and bridge.up.slot_gradient is None


def test_usage_idle_steps_and_perplexity():
    bridge = make_bridge(num_codes=4)
    figures = bridge.apply_counts(torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]), key=1)
    assert bridge.usage.tolist() == [256, 256, 0, 0] and bridge.idle.tolist() == [0, 0, 1, 1]
    assert figures["vq/perplexity"] == pytest.approx(2) and figures["vq/used"] == 0.5
    figures = bridge.apply_counts(torch.tensor([[0, 0, 0, 2], [0, 0, 0, 0]]), key=2)
    assert bridge.usage.tolist() == [256 - 4 + 7 * 64, 256 - 4, 64, 0]
    assert bridge.idle.tolist() == [0, 1, 0, 2]
    entropy = -(7 / 8 * math.log(7 / 8) + 1 / 8 * math.log(1 / 8))
    assert figures["vq/perplexity"] == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize(
    "format", [{}, {"latent_bits": 6, "momentum_bits": 4}, {"group_size": 32}], ids=str
)
def test_an_idle_code_becomes_a_nearby_copy_of_the_most_used_one(format):
    bridge = make_bridge(**format)
    before = bridge.codebook.latents().clone()
    bridge.idle[5] = IDLE_STEPS - 1
    bridge.usage += 64
    figures = bridge.apply_counts(torch.tensor([[3] * 100]), key=7)
    assert figures["vq/splits"] == 1
    latents = bridge.codebook.latents()
    moved = (latents[5].int() - before[3].int()).abs()
    assert moved.any() and moved.max() <= vq.SPLIT_NOISE + 4  # 6-bit latents count in fours
    untouched = [i for i in range(32) if i != 5]
    assert torch.equal(latents[untouched], before[untouched])
    assert torch.equal(bridge.codebook.log2_scale[5], bridge.codebook.log2_scale[3])
    trits = bridge.codebook.trits()
    assert 0 < (trits[5] != trits[3]).sum() < CODE_WIDTH // 2
    assert abs(int(bridge.usage[3] - bridge.usage[5])) <= 1 and bridge.idle[5] == 0


def test_a_code_that_was_crowded_before_it_fell_idle_is_not_split():
    bridge = make_bridge()
    bridge.usage[5] = 1000 * 64  # more than any other still
    bridge.idle[[5, 6]] = IDLE_STEPS - 1
    before = bridge.codebook.latents().clone()
    assert bridge.apply_counts(torch.tensor([[3] * 1000]), key=7)["vq/splits"] == 1
    latents = bridge.codebook.latents()
    assert (latents[5].int() - before[3].int()).abs().max() <= vq.SPLIT_NOISE


@pytest.mark.parametrize(("positions", "steps"), [(64, 8), (32, 16), (31, 17)])
def test_a_code_is_idle_when_the_mean_code_was_chosen_16_times_meanwhile(positions, steps):
    bridge = make_bridge()  # of 32 codes
    splits = [
        bridge.apply_counts(torch.full((1, positions), 3), key=step)["vq/splits"]
        for step in range(steps)
    ]
    assert splits[:-1] == [0] * (steps - 1) and splits[-1] == 1


def test_codes_are_not_split_where_trits_never_move():
    bridge = make_bridge(rule="bigint")
    bridge.idle[5] = IDLE_STEPS
    assert bridge.apply_counts(torch.tensor([[3] * 100]), key=7)["vq/splits"] == 0
