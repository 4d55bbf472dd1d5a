"""The loop: rounds, injection and halting against plain loops over positions."""

import torch
from torch import nn

from arbitor.loop import ACT_MAX_ITERATIONS, PONDER_WEIGHT, Loop

WIDTH = 32


class Doubling(nn.Module):
    """Adds what depends on the state and the message; keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, hidden, message):
        self.seen.append(hidden)
        return hidden.tanh() + message


def make_loop(halting=False):
    loop = Loop(Doubling(), WIDTH, "fp8", halting)
    if halting:
        loop.halt.initialize(seed=0, name="halt")
    return loop


def inputs():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, WIDTH, generator=random).bfloat16() for _ in range(2)]


def plain_round(loop, hidden, entered, message):
    decay = loop.decay.float() / 32768
    update = hidden.tanh() + message
    return (decay * hidden + (1 - decay) * entered + update).to(torch.bfloat16)


def test_two_rounds_mix_state_and_what_entered():
    loop, (hidden, message) = make_loop(), inputs()
    out, ponder = loop(hidden, message)
    once = plain_round(loop, hidden, hidden, message)
    assert torch.equal(out, plain_round(loop, once, hidden, message)) and ponder is None
    assert loop.decay.dtype == torch.int16 and 0 < loop.decay.min() < loop.decay.max() < 32767
    counts = loop.take_counts()
    assert loop.apply_counts(torch.stack([counts, counts]), 0) == {"loop/rounds": 2.0}


def test_halting_is_graves_sum_over_rounds():
    loop, (hidden, message) = make_loop(halting=True), inputs()
    out, ponder = loop(hidden, message)
    states, state = [], hidden
    for _ in range(ACT_MAX_ITERATIONS):
        state = plain_round(loop, state, hidden, message)
        states.append(state)
    probabilities = [loop.halt(state).float().sigmoid() for state in states]
    expected, rounds, remainders = torch.zeros(2, 5, WIDTH), 0, 0.0
    for b in range(2):
        for t in range(5):
            left = 1.0
            for r in range(ACT_MAX_ITERATIONS):
                rounds += 1
                p = float(probabilities[r][b, t])
                if left - p <= 0.01 or r == ACT_MAX_ITERATIONS - 1:
                    expected[b, t] += left * states[r][b, t].float()
                    remainders += left
                    break
                expected[b, t] += p * states[r][b, t].float()
                left -= p
    # Sums of four float32 terms, then bfloat16.
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-4)
    assert abs(float(ponder) - PONDER_WEIGHT * remainders / 10) < 1e-6
    running = loop.take_counts()
    assert int(running.sum()) == rounds and int(running[0]) == 10
    assert loop.apply_counts(running.unsqueeze(0), 0)["loop/rounds"] == rounds / 10


def test_the_ponder_cost_and_the_result_train_the_halting():
    loop, (hidden, message) = make_loop(halting=True), inputs()
    out, ponder = loop(hidden.requires_grad_(), message)
    ponder.backward(retain_graph=True)
    assert loop.halt.slot_gradient.any()
    loop.halt.slot_gradient = None
    out.float().square().sum().backward()
    assert loop.halt.slot_gradient.any()
