"""Latents of 6 bits, momentum of 4: bytes against plain Python, and what a start in them keeps."""

import pytest
import torch

from arbitor.kernel.backend import set_backend
from arbitor.kernel.latent_update import moments, packed, slots
from arbitor.kernel.latent_update.op import update
from arbitor.kernel.latent_update.state import calibrate, init_state, trits
from arbitor.kernel.state_format import StateFormat
from tests.arbitor.update_cases import RATES, random_gradient

OPTIONS = [
    {"momentum_bits": 4},
    {"latent_bits": 6},
    {"momentum_bits": 4, "latent_bits": 6, "group_size": 16},
]
WIDTHS = [1, 2, 3, 5, 64, 65, 1000]


def random_codes(num_cols, low, high):
    generator = torch.Generator().manual_seed(num_cols)
    return torch.randint(low, high + 1, (3, num_cols), dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("num_cols", WIDTHS)
def test_nibbles_are_the_layout(num_cols):
    momentum = random_codes(num_cols, -7, 7)
    stored = packed.pack_nibbles(momentum)
    assert stored.shape == (3, -(-num_cols // 2)) and stored.dtype == torch.uint8
    for row in range(3):
        expected = [0] * stored.shape[1]
        for col, value in enumerate(momentum[row].tolist()):
            expected[col // 2] |= (value % 16) << (4 * (col % 2))
        assert stored[row].tolist() == expected
    assert torch.equal(packed.unpack_nibbles(stored, num_cols), momentum)


@pytest.mark.parametrize("num_cols", WIDTHS)
def test_six_bits_are_a_plane_of_nibbles_and_one_of_pairs(num_cols):
    latent = 4 * random_codes(num_cols, -31, 31)
    stored = packed.pack_latent(latent)
    num_nibbles = -(-num_cols // 2)
    assert stored.shape == (3, num_nibbles + -(-num_cols // 4)) and stored.dtype == torch.uint8
    for row in range(3):
        expected = [0] * stored.shape[1]
        for col, value in enumerate(latent[row].tolist()):
            code = (value // 4) % 64
            expected[col // 2] |= code % 16 << (4 * (col % 2))
            expected[num_nibbles + col // 4] |= code // 16 << (2 * (col % 4))
        assert stored[row].tolist() == expected
    assert torch.equal(packed.unpack_latent(stored, num_cols), latent)


@pytest.mark.parametrize("options", [{"latent_bits": 6}, {"momentum_bits": 4, "latent_bits": 6}])
def test_a_start_in_fewer_bits_has_the_same_trits(options):
    format = StateFormat(**options)
    plain = init_state(50, 130, 1.0, seed=0, name="w")
    before = plain.latent.clone()
    stored = packed.stored_state(plain, format)
    unpacked = packed.plain_state(stored, format, 130)
    assert torch.equal(plain.latent, before)
    assert torch.equal(trits(unpacked.latent), trits(before))
    difference = (unpacked.latent.int() - before.int()).abs()
    assert difference.max() <= 3 and difference[before.abs() <= 124].max() == 2
    assert not unpacked.momentum.any() and unpacked.row_moment is stored.row_moment


@pytest.mark.parametrize("options", [{}, {"momentum_bits": 4}, {"latent_bits": 6}])
def test_what_is_not_packed_is_the_states_own(options):
    format = StateFormat(**options)
    stored = packed.stored_state(init_state(5, 7, 1.0, seed=0, name="w"), format)
    plain = packed.plain_state(stored, format, 7)
    assert (plain.latent is stored.latent) == (format.latent_bits == 8)
    assert (plain.momentum is stored.momentum) == (format.momentum_bits == 8)
    plain.latent.fill_(-124), plain.momentum.fill_(-7)
    packed.store_(stored, plain, format)
    again = packed.plain_state(stored, format, 7)
    assert (again.latent == -124).all() and (again.momentum == -7).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_updates_of_a_stored_state_are_the_same_on_both_paths(options):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    format, slot_format = StateFormat(**options), slots.slot_format_of(4)
    grad = random_gradient(17, 130)
    results = []
    for backend in ("torch", "triton"):
        set_backend(backend)
        where = device if backend == "triton" else "cpu"
        state = packed.stored_state(init_state(17, 130, 1.0, seed=0, name="w"), format)
        calibrate(state, slots.quantize_exact(grad))
        state = type(state)(**{name: tensor.to(where) for name, tensor in vars(state).items()})
        counters = torch.zeros(3, dtype=torch.int64, device=where)
        for step in range(1, 3):
            exponent_N = slots.row_exponents(state.row_moment.cpu(), slot_format)
            total, _, _ = slots.quantize_slot(grad, exponent_N, slot_format, step)
            words = torch.tensor(moments.update_words(RATES, step, step), dtype=torch.int32)
            update(state, total.to(where), slot_format, words.to(where), counters, format)
        results.append([tensor.cpu() for tensor in [*vars(state).values(), counters]])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
