"""Integer gradient sums over the slots of a step, and the latent update on them.

A slot's float gradient becomes integers before anything is added to it, so the sum is exact: order,
number of workers and restarts cannot change it. After the sum there is no float at all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.errors import UserError
from arbitor.kernel.latent_update.fixed_point import (
    STREAM_SLOT,
    STREAM_UPDATE,
    stream_key,
    tensor_id,
)
from arbitor.kernel.latent_update.moments import (
    step_rates,
)
from arbitor.kernel.latent_update.reference import (
    UpdateStats,
    update,
)
from arbitor.kernel.latent_update.slots import (
    quantize_exact,
    quantize_slot,
    row_exponents,
    slot_format,
)
from arbitor.kernel.latent_update.state import (
    calibrate,
)
from arbitor.kernel.ternary_scale import TernaryWeight
from arbitor.main import ARBModel

AllReduce = Callable[[Tensor], None]  # sums an int32 or int64 tensor over the workers, in place


@dataclass(frozen=True)
class UpdateConfig:
    """The latent rule. Rates are in latent units (int8 steps) and octaves of the row scale."""

    latent_rate: float = 3.0  # 0 freezes the trits; the scales still learn
    table_rate: float = 0.3  # embedding and head learn at this multiple of latent_rate
    scale_rate: float = 0.01
    warmup_steps: int = 100
    final_factor: float = 0.1  # the cosine ends at this multiple of the rates

    def validate(self) -> None:
        for name in ("latent_rate", "table_rate", "scale_rate", "final_factor"):
            if not 0 <= getattr(self, name) <= 40:
                raise UserError(f"update.{name}: expected 0 to 40, got {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise UserError(f"update.warmup_steps: expected at least 0, got {self.warmup_steps}")

    def schedule(self, step: int, total_steps: int) -> int:
        """Warm-up times cosine at a step counted from 0, in 1/65536.

        Rounded to an integer, so that the last bit of a library's cosine does not matter.
        """
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total_steps))))
        return round(65536 * warmup * (self.final_factor + (1 - self.final_factor) * cosine))


@dataclass(frozen=True)
class UpdateReport:
    """What one step did, counted over all workers and weights."""

    losses: list[float]  # one a slot
    flip_rate: float  # share of the weights whose trit changed
    zero_fraction: float  # share of the weights that are 0
    clipped_fraction: float  # share of the gradient entries beyond the integer range


class NonFiniteError(RuntimeError):
    """A loss or a gradient held NaN or infinity; nothing was updated."""


class TernaryOptimizer:
    """Collects the slots of a step on this worker; `step` sums over the workers and updates.

    Made after the weights are in place: it notes which of them have been updated before.
    """

    def __init__(
        self,
        model: ARBModel,
        config: UpdateConfig,
        *,
        total_steps: int,
        slots_per_step: int,
        seed: int,
        all_reduce: AllReduce | None = None,
    ):
        self.config, self.total_steps, self.seed = config, total_steps, seed
        self.slots_per_step, self.all_reduce = slots_per_step, all_reduce
        self.slot_format = slot_format(slots_per_step)
        self.weights = model.ternary_weights()
        self._calibrated = {name for name, w in self.weights if w.num_updates.item() > 0}
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        # Gradients of weights without exponents are kept as they are until the end of the step.
        self._first_gradients: dict[str, list[tuple[int, Tensor]]] = {}
        self._contributions = torch.zeros(len(self.weights), dtype=torch.int32)
        self._loss_bits = torch.zeros(self.slots_per_step, dtype=torch.int32)
        self._conversion = torch.zeros(3, dtype=torch.int64)  # non-finite, clipped, all entries

    def add_slot(self, step: int, slot: int, loss: Tensor) -> None:
        """Takes the gradients that the backward pass of one slot left on the weights."""
        self._loss_bits[slot] = loss.detach().float().cpu().view(torch.int32)
        for index, (name, weight) in enumerate(self.weights):
            gradient, weight.slot_gradient = weight.slot_gradient, None
            if gradient is None:
                continue
            self._contributions[index] += 1
            if name in self._calibrated:
                self._add_integers(step, slot, name, weight, gradient)
            else:
                self._first_gradients.setdefault(name, []).append((slot, gradient))

    def step(self, step: int) -> UpdateReport:
        """Sums over the workers, updates every weight that got a gradient, starts the next step."""
        losses = self._reduced_losses(step)
        self._reduce(self._contributions)
        touched = [w for w, count in zip(self.weights, self._contributions, strict=True) if count]
        active = [(name, weight) for name, weight in touched if self._is_ready(step, name, weight)]
        self._reduce(self._conversion)
        non_finite, clipped, converted = self._conversion.tolist()
        if non_finite:
            raise NonFiniteError(f"step {step}: {non_finite} gradient entries are not finite")
        flips = zeros = 0
        for name, weight in active:
            stats = self._update(step, name, weight)
            flips, zeros = flips + stats.flips, zeros + stats.zeros
        total = max(1, sum(weight.latent.numel() for _, weight in active))
        self._clear()
        return UpdateReport(losses, flips / total, zeros / total, clipped / max(1, converted))

    def _reduced_losses(self, step: int) -> list[float]:
        # Each slot's bits come from one worker, the others add 0: the integer sum copies the float.
        self._reduce(self._loss_bits)
        losses = self._loss_bits.view(torch.float32).tolist()
        bad = [slot for slot, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            raise NonFiniteError(f"step {step}: the loss of slot {bad[0]} is {losses[bad[0]]}")
        return losses

    def _is_ready(self, step: int, name: str, weight: TernaryWeight) -> bool:
        """Calibrates a weight that gets its first gradient; false while that is all zero.

        Exponents come from the exact sum over all slots, then the same gradients become integers.
        """
        if name in self._calibrated:
            return True
        gradients = self._first_gradients.pop(name, [])
        exact_sum = torch.zeros_like(weight.latent, dtype=torch.int64)
        for _, gradient in gradients:
            exact_sum += quantize_exact(gradient)
        self._reduce(exact_sum)
        if not calibrate(weight.state(), exact_sum):
            return False
        self._calibrated.add(name)
        for slot, gradient in gradients:
            self._add_integers(step, slot, name, weight, gradient)
        return True

    def _add_integers(
        self, step: int, slot: int, name: str, weight: TernaryWeight, gradient: Tensor
    ) -> None:
        key = stream_key(self.seed, step, tensor_id(name), STREAM_SLOT + slot)
        exponents_N = row_exponents(weight.row_moment, self.slot_format)
        integers, non_finite, clipped = quantize_slot(gradient, exponents_N, self.slot_format, key)
        if name in self._sums:
            self._sums[name] += integers
        else:
            self._sums[name] = integers
        self._conversion += torch.tensor([non_finite, clipped, gradient.numel()])

    def _update(self, step: int, name: str, weight: TernaryWeight) -> UpdateStats:
        grad_sum = self._sums.pop(name, None)
        if grad_sum is None:  # only other workers had slots that use this weight
            grad_sum = torch.zeros_like(weight.latent, dtype=self.slot_format.sum_dtype)
        if self.all_reduce is not None:
            grad_sum = all_reduce_packed(grad_sum, self.all_reduce)
        factor = self.config.schedule(step, self.total_steps)
        latent_rate = self.config.latent_rate
        if weight.rate == "table":
            latent_rate *= self.config.table_rate
        # The row scale counts in 1/256 octave.
        rates = step_rates(
            round(latent_rate * factor), round(256 * self.config.scale_rate * factor)
        )
        key = stream_key(self.seed, step, tensor_id(name), STREAM_UPDATE)
        return update(weight.state(), grad_sum, self.slot_format, rates, key)

    def _reduce(self, integers: Tensor) -> None:
        if self.all_reduce is not None:
            self.all_reduce(integers)


def all_reduce_packed(sums: Tensor, all_reduce: AllReduce) -> Tensor:
    """Sums int16 tensors as two to an int32 lane (no 16-bit sums on gloo or NCCL); int32 as it is.

    lane = low + high * 2^16 with a signed low half, exact while both sums stay within int16: the
    slot format sees to that.
    """
    if sums.dtype == torch.int32:
        all_reduce(sums)
        return sums
    flat = sums.flatten()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    halves = flat.view(-1, 2).int()
    lanes = halves[:, 0] + (halves[:, 1] << 16)
    all_reduce(lanes)
    low = (lanes << 16) >> 16
    high = (lanes - low) >> 16
    return (
        torch.stack([low, high], dim=1).to(torch.int16).flatten()[: sums.numel()].view(sums.shape)
    )
