"""Base-3 packing: five trits a byte, 1.6 bits a weight, for checkpoints and inference."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arbitor.errors import UserError

TRITS_PER_BYTE = 5
_PLACE_VALUES = (1, 3, 9, 27, 81)


def pack_base3(trits: Tensor) -> Tensor:
    """uint8 [ceil(n/5)] of n trits (int8, -1 to 1, any shape), flattened row-major.

    byte = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4 with c = trit + 1; the last byte is filled up with
    codes 0. UserError for any other value.
    """
    codes = trits.flatten().to(torch.int16) + 1
    if ((codes < 0) | (codes > 2)).any():
        raise UserError("trits to pack must be -1, 0 or 1; round the tensor to trits first")
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % TRITS_PER_BYTE)).view(
        -1, TRITS_PER_BYTE
    )
    places = codes.new_tensor(_PLACE_VALUES)
    return (codes * places).sum(1, dtype=torch.int16).to(torch.uint8)


def unpack_base3(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """int8 trits of `shape` from the bytes of `pack_base3`.

    UserError for a wrong number of bytes and for a byte above 242, which no five trits give.
    """
    num_trits = math.prod(shape)
    num_bytes = -(-num_trits // TRITS_PER_BYTE)
    if packed.numel() != num_bytes:
        raise UserError(
            f"packed trits of shape {list(shape)} take {num_bytes} bytes, got {packed.numel()};"
            " the shape and the packed tensor must come from one checkpoint"
        )
    if (packed > 242).any():
        raise UserError("packed trits hold a byte above 242: the tensor is damaged or not base 3")
    codes = torch.div(
        packed.flatten().unsqueeze(1).to(torch.int16),
        torch.tensor(_PLACE_VALUES, dtype=torch.int16, device=packed.device),
        rounding_mode="floor",
    )
    return (codes % 3 - 1).to(torch.int8).flatten()[:num_trits].view(*shape)
