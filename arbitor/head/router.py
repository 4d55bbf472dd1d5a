"""OutputRouter: which head speaks next.

Asked at borders: where a unit of a kind has ended and another kind may follow, that is after a
frame of sound, after the last patch of a frame and after BEGIN and END. Elsewhere it is bytes that
follow bytes and patches that follow patches.
Shape letters: B sequences, T positions, D width, H heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from arbitor.batch import NO_TARGET
from arbitor.encoder.places import Places
from arbitor.head.byte import HEAD_GAIN
from arbitor.kernel.backend import count_path
from arbitor.kernel.cross_entropy.op import cross_entropy
from arbitor.kernel.ternary_scale import TernaryLinear
from arbitor.vocab import (
    AUDIO_FRAME,
    BEGIN_IMAGE,
    END_AUDIO,
    PATCH,
)

BYTE_HEAD, TALKER_HEAD, VIDEO_HEAD = range(3)
NUM_HEADS = 3


class RouterLoss(NamedTuple):
    """float32 scalars over the borders of a slot."""

    loss: Tensor  # cross entropy in nats
    accuracy: Tensor
    majority: Tensor  # the share of the head that speaks most often: what guessing it would give


class OutputRouter(nn.Module):
    """bfloat16 [..., D] -> bfloat16 logits [..., H]. Never called where the targets are text."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.projection = TernaryLinear(width, NUM_HEADS, activation, gain=HEAD_GAIN, rate="table")

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projection(hidden)

    def loss(
        self,
        hidden_BTD: Tensor,
        symbols_BT: Tensor,
        targets_BT: Tensor,
        places: Places,
        patches_per_frame: int,
    ) -> RouterLoss:
        count_path("output_router", "slot")
        border_BT = is_border(symbols_BT, places, patches_per_frame) & (targets_BT != NO_TARGET)
        head_BT = torch.where(border_BT, speaking_head(targets_BT), NO_TARGET)
        logits_BTH = self(hidden_BTD)
        right_BT = border_BT & (logits_BTH.argmax(-1) == head_BT)
        count = border_BT.sum()
        most = torch.stack([(head_BT == head).sum() for head in range(NUM_HEADS)]).max()
        loss = cross_entropy(logits_BTH.flatten(0, 1), head_BT.flatten())
        return RouterLoss(loss, right_BT.sum() / count, most / count)


def speaking_head(targets: Tensor) -> Tensor:
    """int64: the head that gives each target symbol."""
    return (targets == AUDIO_FRAME).long() * TALKER_HEAD + (targets == PATCH).long() * VIDEO_HEAD


def is_border(symbols_BT: Tensor, places: Places, patches_per_frame: int) -> Tensor:
    """bool [B, T]: whether a unit ends with this position."""
    ends_frame_BT = (places.before_BT + 1) % patches_per_frame == 0
    is_special_BT = (symbols_BT >= BEGIN_IMAGE) & (symbols_BT <= END_AUDIO)
    ends_BT = (symbols_BT == PATCH) & ends_frame_BT
    return is_special_BT | (symbols_BT == AUDIO_FRAME) | ends_BT
