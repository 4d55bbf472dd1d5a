"""Base-3 packing: exact bytes, round trips, refusals."""

import pytest
import torch

from arbitor.errors import UserError
from arbitor.kernel.packing.reference import pack_base3, unpack_base3


def test_known_bytes():
    trits = torch.tensor([-1, 0, 1, -1, 0, 1, 1], dtype=torch.int8)
    first = 0 + 3 * 1 + 9 * 2 + 27 * 0 + 81 * 1
    second = 2 + 3 * 2  # the three places that are left carry code 0
    assert pack_base3(trits).tolist() == [first, second]
    assert pack_base3(torch.ones(5, dtype=torch.int8)).tolist() == [242]


@pytest.mark.parametrize("shape", [(0,), (1,), (4,), (5,), (6,), (7, 13), (3, 1, 11), (64, 65)])
def test_round_trip(shape):
    trits = torch.randint(-1, 2, shape, dtype=torch.int8, generator=torch.Generator())
    packed = pack_base3(trits)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-trits.numel() // 5)
    unpacked = unpack_base3(packed, shape)
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, trits)


def test_non_contiguous_trits_are_packed_row_major():
    trits = torch.tensor([[1, 0], [-1, 1], [0, 0]], dtype=torch.int8)
    assert torch.equal(pack_base3(trits.T), pack_base3(trits.T.contiguous()))


@pytest.mark.parametrize("value", [-128, -2, 2, 127])
def test_other_values_are_refused(value):
    with pytest.raises(UserError, match="-1, 0 or 1"):
        pack_base3(torch.tensor([0, value], dtype=torch.int8))


def test_damaged_bytes_are_refused():
    with pytest.raises(UserError, match="242"):
        unpack_base3(torch.tensor([243], dtype=torch.uint8), (5,))
    with pytest.raises(UserError, match="2 bytes, got 1"):
        unpack_base3(torch.tensor([0], dtype=torch.uint8), (6,))
