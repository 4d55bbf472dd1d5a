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
from arbitor.kernel.latent_update.moments import step_rates
from arbitor.kernel.latent_update.op import add_slot, update
from arbitor.kernel.latent_update.slots import quantize_exact, row_exponents, slot_format
from arbitor.kernel.latent_update.state import calibrate
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
        largest = {"latent_rate": 20, "table_rate": 1, "scale_rate": 0.5, "final_factor": 1}
        for name, limit in largest.items():
            if not 0 <= getattr(self, name) <= limit:
                raise UserError(f"update.{name}: expected 0 to {limit}, got {getattr(self, name)}")
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

    Made after the weights are in place: it notes how often each of them has been updated.
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
        self.device = self.weights[0][1].latent.device
        self._updates = {name: int(weight.num_updates) for name, weight in self.weights}
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        # Gradients of weights without exponents are kept as they are until the end of the step.
        self._first_gradients: dict[str, list[tuple[int, Tensor]]] = {}
        self._contributions = dict.fromkeys(self._updates, 0)
        self._losses: dict[int, Tensor] = {}
        self._conversion = self._counters(2)  # non-finite and clipped entries

    def add_slot(self, step: int, slot: int, loss: Tensor) -> None:
        """Takes the gradients that the backward pass of one slot left on the weights."""
        self._losses[slot] = loss.detach().float()
        for name, weight in self.weights:
            gradient, weight.slot_gradient = weight.slot_gradient, None
            if gradient is None:
                continue
            self._contributions[name] += 1
            if self._updates[name]:
                self._add_integers(step, slot, name, weight, gradient)
            else:
                self._first_gradients.setdefault(name, []).append((slot, gradient))

    def step(self, step: int) -> UpdateReport:
        """Sums over the workers, updates every weight that got a gradient, starts the next step."""
        losses = self._gather(step)
        touched = [pair for pair in self.weights if self._contributions[pair[0]]]
        active = [(name, weight) for name, weight in touched if self._is_ready(step, name, weight)]
        self._reduce(self._conversion)
        non_finite, clipped = self._conversion.tolist()
        if non_finite:
            raise NonFiniteError(f"step {step}: {non_finite} gradient entries are not finite")
        counters = self._counters(3)  # flips, zeros, saturated
        for name, weight in active:
            self._update(step, name, weight, counters)
        flips, zeros, _ = counters.tolist()
        weights = max(1, sum(weight.latent.numel() for _, weight in active))
        converted = max(1, sum(self._contributions[n] * w.latent.numel() for n, w in active))
        self._clear()
        return UpdateReport(losses, flips / weights, zeros / weights, clipped / converted)

    def _gather(self, step: int) -> list[float]:
        """The losses of all slots; makes the contributions those of all workers.

        A slot's loss comes from one worker, the others add 0: the sum of its bits copies it.
        """
        gathered = torch.zeros(
            self.slots_per_step + len(self.weights), dtype=torch.int32, device=self.device
        )
        for slot, loss in self._losses.items():
            gathered[slot] = loss.view(torch.int32)
        bits, contributions = gathered[: self.slots_per_step], gathered[self.slots_per_step :]
        contributions += torch.tensor(
            list(self._contributions.values()), dtype=torch.int32, device=self.device
        )
        self._reduce(gathered)
        losses = bits.view(torch.float32).tolist()
        bad = [slot for slot, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            raise NonFiniteError(f"step {step}: the loss of slot {bad[0]} is {losses[bad[0]]}")
        self._contributions = dict(zip(self._updates, contributions.tolist(), strict=True))
        return losses

    def _is_ready(self, step: int, name: str, weight: TernaryWeight) -> bool:
        """Calibrates a weight that gets its first gradient; false while that is all zero.

        Exponents come from the exact sum over all slots, then the same gradients become integers.
        """
        if self._updates[name]:
            return True
        gradients = self._first_gradients.pop(name, [])
        exact_sum = torch.zeros_like(weight.latent, dtype=torch.int64)
        for _, gradient in gradients:
            exact_sum += quantize_exact(gradient.float())
        self._reduce(exact_sum)
        if not calibrate(weight.state(), exact_sum):
            return False
        for slot, gradient in gradients:
            self._add_integers(step, slot, name, weight, gradient)
        return True

    def _add_integers(
        self, step: int, slot: int, name: str, weight: TernaryWeight, gradient: Tensor
    ) -> None:
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(weight.latent, dtype=self.slot_format.sum_dtype)
        key = stream_key(self.seed, step, tensor_id(name), STREAM_SLOT + slot)
        exponents_N = row_exponents(weight.row_moment, self.slot_format)
        add_slot(gradient, exponents_N, self.slot_format, key, self._sums[name], self._conversion)

    def _update(self, step: int, name: str, weight: TernaryWeight, counters: Tensor) -> None:
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
        scale_rate = 256 * self.config.scale_rate
        rates = step_rates(round(latent_rate * factor), round(scale_rate * factor))
        key = stream_key(self.seed, step, tensor_id(name), STREAM_UPDATE)
        self._updates[name] += 1
        update(
            weight.state(), grad_sum, self.slot_format, rates, key, self._updates[name], counters
        )

    def _counters(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=self.device)

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
