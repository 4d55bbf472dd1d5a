"""The Triton base-3 packing against the reference: every byte, round trips, refusals."""

import pytest
import torch

from arbitor.errors import UserError
from arbitor.kernel.packing import reference
from arbitor.kernel.packing import triton as triton_packing

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(0,), (1,), (4,), (5,), (6,), (7, 13), (63, 65), (1000, 1), (3, 1, 1001)]
GPU_SHAPES = [(4097, 1000), (4096, 4096), (1, (1 << 31) + 7)]
GPU = [pytest.param(shape, marks=pytest.mark.gpu) for shape in GPU_SHAPES]


@pytest.mark.parametrize("shape", SHAPES + GPU)
def test_bytes_and_trits_are_the_reference(shape):
    generator = torch.Generator(DEVICE).manual_seed(1)
    trits = torch.randint(-1, 2, shape, dtype=torch.int8, generator=generator, device=DEVICE)
    packed = triton_packing.pack_base3(trits)
    if trits.numel() < 1 << 25:  # the reference takes ten times the memory
        assert torch.equal(packed.cpu(), reference.pack_base3(trits.cpu()))
    unpacked = triton_packing.unpack_base3(packed, shape)
    assert unpacked.dtype == torch.int8 and unpacked.shape == trits.shape
    assert torch.equal(unpacked, trits)


def test_every_byte_is_unpacked():
    packed = torch.arange(243, dtype=torch.uint8)
    unpacked = triton_packing.unpack_base3(packed.to(DEVICE), (243, 5))
    assert torch.equal(unpacked.cpu(), reference.unpack_base3(packed, (243, 5)))


def test_non_contiguous_trits_are_packed_row_major():
    trits = torch.tensor([[1, 0], [-1, 1], [0, 0]], dtype=torch.int8, device=DEVICE)
    packed = triton_packing.pack_base3(trits.T)
    assert torch.equal(packed.cpu(), reference.pack_base3(trits.T.cpu()))


@pytest.mark.parametrize("value", [-128, -2, 2, 127])
def test_other_values_are_refused(value):
    trits = torch.zeros(601, dtype=torch.int8, device=DEVICE)
    trits[600] = value
    with pytest.raises(UserError, match="-1, 0 or 1"):
        triton_packing.pack_base3(trits)


def test_damaged_bytes_are_refused():
    with pytest.raises(UserError, match="242"):
        triton_packing.unpack_base3(torch.full((1,), 243, dtype=torch.uint8, device=DEVICE), (5,))
    with pytest.raises(UserError, match="2 bytes, got 1"):
        triton_packing.unpack_base3(torch.zeros(1, dtype=torch.uint8, device=DEVICE), (6,))
