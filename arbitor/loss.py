"""Losses of the slots, by modality, and what they weigh against one another.

Shape letters: B sequences, T positions, V symbols.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from arbitor.batch import NO_TARGET
from arbitor.encoder.places import is_place
from arbitor.errors import UserError
from arbitor.kernel.cross_entropy.op import cross_entropy

ROUTER_WEIGHT = 2.0**-4

# What is told of a slot beside its loss; NaN where the slot has no such part.
FIGURES = (
    "bytes",  # nats per byte: text, code, captions and specials
    "content",  # nats per code of sound, or squared error of the velocity of patches
    "router",  # nats per border
    "router_accuracy",
    "router_majority",  # the accuracy of always naming the slot's most frequent head
    "trunk_gradient_rms",
)


@dataclass(frozen=True)
class LossWeight:
    """What the loss of a slot is multiplied by. Powers of two change no other bit of a gradient,
    but a weight waits for its first update until a gradient reaches 2^-36."""

    text: float = 1.0
    code: float = 1.0
    image: float = 1.0
    audio: float = 1.0
    video: float = 1.0

    def validate(self) -> None:
        for name, weight in asdict(self).items():
            if not (weight > 0 and math.frexp(weight)[0] == 0.5 and 2**-16 <= weight <= 2**16):
                raise UserError(
                    f"loss_weight.{name}: expected a power of two from 2^-16 to 2^16, such as 0.5"
                    f" or 4, got {weight}"
                )

    def of(self, modality: str) -> float:
        return getattr(self, modality)


@dataclass(frozen=True)
class SlotLosses:
    """The loss of a slot, to be differentiated, and its figures, float32 scalars by name."""

    loss: Tensor
    figures: Mapping[str, Tensor]

    def figures_tensor(self) -> Tensor:
        """float32 [len(FIGURES)]; that of the gradient is there after backward."""
        missing = torch.full_like(self.loss.detach(), math.nan)
        return torch.stack([self.figures.get(name, missing).float() for name in FIGURES])


def symbol_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross entropy in nats per symbol over the positions that have a target, in float32.

    The place of a patch or of a frame of sound is no target of the byte head.
    """
    targets_BT = targets_BT.masked_fill(is_place(targets_BT), NO_TARGET)
    return cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def watch_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """x, and a float32 scalar that the backward pass fills with the rms of its gradient."""
    rms = torch.zeros((), device=x.device)
    return _GradientRms.apply(x, rms), rms


class _GradientRms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rms: Tensor) -> Tensor:
        ctx.rms = rms
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.rms.copy_(grad.float().square().mean().sqrt())
        return grad, None
