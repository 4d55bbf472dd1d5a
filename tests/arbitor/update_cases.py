"""States and gradients that the tests of the update rule share."""

from dataclasses import fields

import torch

from arbitor.kernel.latent_update import fixed_point as fp
from arbitor.kernel.latent_update import moments, slots
from arbitor.kernel.latent_update import reference as rule
from arbitor.kernel.latent_update import state as start
from arbitor.kernel.latent_update.packed import plain_state, stored_state
from arbitor.kernel.state_format import INT8, StateFormat

FORMATS = [
    INT8,
    StateFormat(momentum_bits=4),
    StateFormat(latent_bits=6),
    StateFormat(momentum_bits=4, latent_bits=6),
]
RATES = moments.step_rates(3 << 16, round(2.56 * 65536))
SHAPES = [(1, 1), (1, 200), (63, 5), (65, 63), (70, 192), (33, 320), (1000, 129)]


def random_gradient(num_rows: int, num_cols: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns of very different sizes, about 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp2(torch.randn(num_rows, 1, generator=generator))
    cols = torch.exp2(torch.randn(num_cols, generator=generator))
    return torch.randn(num_rows, num_cols, generator=generator) * rows * cols * 1e-4


def fresh_state(
    num_rows: int, num_cols: int, grads: list[torch.Tensor], format: StateFormat = INT8
) -> start.TernaryState:
    """Calibrated and plain, its latents on the grid of the format."""
    state = start.init_state(num_rows, num_cols, 1.0, seed=1, name="w")
    state = plain_state(stored_state(state, format), format, num_cols)
    assert start.calibrate(state, sum(slots.quantize_exact(grad) for grad in grads))
    return state


def slot_sum(state, grads, slot_format, step=0) -> torch.Tensor:
    exponent = slots.row_exponents(state.row_moment, slot_format)
    total = torch.zeros(grads[0].shape, dtype=slot_format.sum_dtype)
    for slot, grad in enumerate(grads):
        key = fp.stream_key(1, step, 7, fp.STREAM_SLOT + slot)
        total += slots.quantize_slot(grad, exponent, slot_format, key)[0]
    return total


def step_on(state, grads, slot_format, step=0, rates=RATES) -> rule.UpdateStats:
    key = fp.stream_key(1, step, 7, fp.STREAM_UPDATE)
    return rule.update(state, slot_sum(state, grads, slot_format, step), slot_format, rates, key)


def assert_equal_states(left, right):
    for field in fields(left):
        assert torch.equal(getattr(left, field.name), getattr(right, field.name)), field.name
