"""The update rules: what a slot's gradient adds to a weight's sum, and what the sum does to it.

Sums are integers, so order, number of workers and restarts cannot change them. Whatever differs
from step to step is read from the device: launches can be recorded and replayed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.errors import UserError
from arbitor.kernel.correlation.op import accumulate_correlation
from arbitor.kernel.correlation.reference import finish_step
from arbitor.kernel.latent_update.fixed_point import STREAM_UPDATE, stream_key, tensor_id
from arbitor.kernel.latent_update.moments import NUM_WORDS, step_rates, update_words
from arbitor.kernel.latent_update.op import add_slot, update
from arbitor.kernel.latent_update.slots import slot_format_of
from arbitor.kernel.state_format import StateFormat
from arbitor.kernel.ternary_scale import TernaryWeight


@dataclass(frozen=True)
class UpdateConfig(StateFormat):
    """The rule with its state, and the rates of the rule `latent`; `bigint` has none.

    Rates are in latent units (int8 steps) and octaves of the row scale.
    """

    latent_rate: float = 3.0  # 0 freezes the trits; the scales still learn
    table_rate: float = 0.3  # embedding and head learn at this multiple of latent_rate
    scale_rate: float = 0.01
    warmup_steps: int = 100
    final_factor: float = 0.02  # the cosine ends at this multiple of the rates

    def validate(self) -> None:
        super().validate()
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


class LatentRule:
    """Latents move against the normalized momentum of the integer gradient, row scales with it."""

    num_words = NUM_WORDS

    def __init__(self, config: UpdateConfig, total_steps: int, slots_per_step: int, seed: int):
        self.config, self.total_steps, self.seed = config, total_steps, seed
        self.slot_format = slot_format_of(slots_per_step)

    @property
    def rounds_slots(self) -> bool:
        """Whether a slot's conversion reads its key."""
        return self.slot_format.stochastic

    def updates_done(self, weight: TernaryWeight) -> int:
        """0 = the weight's exponents are to be calibrated on its first gradients."""
        return int(weight.num_updates)

    @property
    def sum_dtype(self) -> torch.dtype:
        return self.slot_format.sum_dtype

    def sum_shape(self, weight: TernaryWeight) -> tuple[int, ...]:
        return weight.num_rows, weight.num_cols

    def add_slot(
        self, weight: TernaryWeight, gradient: Tensor, key: Tensor, total: Tensor, counters: Tensor
    ) -> None:
        """Adds a slot's gradient to the sum, its non-finite and clipped entries to `counters`."""
        add_slot(gradient, weight.row_moment, self.slot_format, key, total, counters)

    def step_words(self, name: str, weight: TernaryWeight, step: int, updates: int) -> list[int]:
        """What update number `updates` of the weight needs to know of the step."""
        config, factor = self.config, self.config.schedule(step, self.total_steps)
        latent_rate = config.latent_rate * (config.table_rate if weight.rate == "table" else 1)
        scale_rate = 256 * config.scale_rate  # scales count in 1/256 octave
        rates = step_rates(round(latent_rate * factor), round(scale_rate * factor))
        key = stream_key(self.seed, step, tensor_id(name), STREAM_UPDATE)
        return update_words(rates, key, updates)

    def update(
        self,
        weight: TernaryWeight,
        total: Tensor,
        words: Tensor,
        num_slots: Tensor,
        counters: Tensor,
    ) -> None:
        """Adds the numbers of flips, zeros and saturated latents to `counters`."""
        update(weight.state(), total, self.slot_format, words, counters, weight.format)


class BigintRule:
    """The scale of a group falls where gradients and trits agree in sign; trits never move."""

    num_words = 0
    rounds_slots = False
    sum_dtype = torch.int32

    def updates_done(self, weight: TernaryWeight) -> int:
        return 1  # nothing to calibrate

    def sum_shape(self, weight: TernaryWeight) -> tuple[int, ...]:
        return tuple(weight.corr_accum.shape)

    def add_slot(
        self, weight: TernaryWeight, gradient: Tensor, key: Tensor, total: Tensor, counters: Tensor
    ) -> None:
        """Adds a slot's correlations to the sum, its non-finite entries to `counters`."""
        group_size = weight.format.correlation_group
        accumulate_correlation(gradient, weight.trits(), total, group_size, counters)

    def step_words(self, name: str, weight: TernaryWeight, step: int, updates: int) -> list[int]:
        return []

    def update(
        self,
        weight: TernaryWeight,
        total: Tensor,
        words: Tensor,
        num_slots: Tensor,
        counters: Tensor,
    ) -> None:
        """`num_slots` int32 [1]: slots of all workers in the sum. Counts zeros alone."""
        state = weight.state()
        finish_step(state.corr_accum, state.step_counter, total, num_slots)
        counters[1] += (weight.trits() == 0).sum()


def rule_of(
    config: UpdateConfig, total_steps: int, slots_per_step: int, seed: int
) -> LatentRule | BigintRule:
    """The rule that `config.rule` names."""
    if config.rule == "latent":
        return LatentRule(config, total_steps, slots_per_step, seed)
    return BigintRule()
