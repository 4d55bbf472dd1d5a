"""Integer gradient sums over the slots of a step, and the update of the weights by them.

A slot's float gradient becomes integers before anything is added to it, so the sum is exact: order,
number of workers and restarts cannot change it. After the sum there is no float at all.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arbitor.cuda_graph import Recording, can_record
from arbitor.gradient_sums import AllReduce, GradientSums, Work
from arbitor.kernel.latent_update.fixed_point import (
    STREAM_SLOT,
    STREAM_UPDATE,
    signed_word,
    stream_key,
    tensor_id,
)
from arbitor.kernel.latent_update.slots import quantize_exact
from arbitor.kernel.latent_update.state import calibrate
from arbitor.kernel.ternary_scale import TernaryWeight
from arbitor.loss import FIGURES
from arbitor.main import ARBModel
from arbitor.update_rule import UpdateConfig, rule_of


@dataclass(frozen=True)
class UpdateReport:
    """What one step did, counted over all workers and weights."""

    losses: list[float]  # one a slot
    figures: list[list[float]]  # of each slot, those of `arbitor.loss.FIGURES`
    flip_rate: float  # share of the weights whose trit changed
    zero_fraction: float  # share of the weights that are 0
    saturated_fraction: float  # share of the latents at their largest magnitude
    clipped_fraction: float  # share of the gradient entries beyond the integer range
    # Figures of the model's parts, and how many weights got only gradients that are too small to
    # give them exponents: those wait.
    parts: dict[str, float] = field(default_factory=dict)


class NonFiniteError(RuntimeError):
    """A loss or a gradient held NaN or infinity; nothing was updated."""


class TernaryOptimizer:
    """Collects the slots of a step on this worker; `step` sums over the workers and updates.

    Made after the weights are in place: it notes how often each of them has been updated. What
    differs from step to step lies in small tensors on the device, so that on a GPU the launches of
    a slot (`convert_gradients`) and of an update are recorded once and replayed.
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
        self.seed, self.slots_per_step, self.all_reduce = seed, slots_per_step, all_reduce
        self.rule = rule_of(config, total_steps, slots_per_step, seed)
        self.weights = model.ternary_weights()
        self.counters = model.step_counts()
        formats = {weight.format.state_format() for _, weight in self.weights}
        assert formats == {config.state_format()}, "the model was made with other state options"
        self.device = self.weights[0][1].log2_scale.device
        self._place = {name: i for i, (name, _) in enumerate(self.weights)}
        self._updates = {name: self.rule.updates_done(weight) for name, weight in self.weights}
        shapes = {name: self.rule.sum_shape(weight) for name, weight in self.weights}
        self._sums = GradientSums(shapes, self.rule.sum_dtype, self.device, all_reduce)
        self._slot_keys = self._zeros(len(self.weights), 1, dtype=torch.int32)
        self._words = self._zeros(len(self.weights), self.rule.num_words, dtype=torch.int32)
        self._num_slots = self._zeros(len(self.weights), 1, dtype=torch.int32)  # of all workers
        self._conversion = self._zeros(2)  # non-finite and clipped entries
        self._update_counts = self._zeros(3)  # flips, zeros, saturated
        self._launched_updates: set[tuple[str, ...]] = set()  # by bucket
        self._recorded_updates: dict[tuple[str, ...], Recording] = {}
        self._start_step()

    def _start_step(self) -> None:
        # Gradients of weights without exponents are kept as they are until the end of the step.
        self._first_gradients: dict[str, list[tuple[int, Tensor]]] = {}
        self._contributions = dict.fromkeys(self._updates, 0)
        self._losses: dict[int, Tensor] = {}  # a slot's loss, then its figures
        self._conversion.zero_()
        self._update_counts.zero_()
        self._slot_counts: dict[int, list[Tensor]] = {}  # by slot, as `take_counts` gave them

    def add_slot(self, step: int, slot: int, loss: Tensor) -> None:
        """Takes the gradients that the backward pass of one slot left on the weights."""
        self.begin_slot(step, slot)
        self.count_slot(slot, loss, self.convert_gradients(slot), self.take_counts())

    def begin_slot(self, step: int, slot: int) -> None:
        """Sets the streams of the slot's stochastic rounding."""
        if self.rule.rounds_slots:
            keys = [self._slot_key(step, slot, name) for name in self._place]
            self._slot_keys.copy_(torch.tensor(keys, dtype=torch.int32).unsqueeze(1))

    def convert_gradients(self, slot: int) -> list[str]:
        """Adds the gradients on the weights to the sums; the names of the weights that had one."""
        names = []
        for name, weight in self.weights:
            gradient, weight.slot_gradient = weight.slot_gradient, None
            if gradient is None:
                continue
            names.append(name)
            if self._updates[name]:
                self._add_integers(name, weight, gradient, self._slot_keys[self._place[name]])
            else:
                self._first_gradients.setdefault(name, []).append((slot, gradient))
        return names

    def take_counts(self) -> list[Tensor]:
        """What the slot that has just run made each of the counting modules count."""
        return [module.take_counts() for _, module in self.counters]

    def count_slot(
        self,
        slot: int,
        loss: Tensor,
        names: list[str],
        counts: list[Tensor],
        figures: Tensor | None = None,
    ) -> None:
        """Notes a slot: its loss and figures, the weights that got a gradient, what it counted."""
        if figures is None:
            figures = torch.full((len(FIGURES),), math.nan, device=self.device)
        self._losses[slot] = torch.cat([loss.detach().float().view(1), figures])
        self._slot_counts[slot] = counts
        for name in names:
            self._contributions[name] += 1

    def is_calibrated(self, names: list[str]) -> bool:
        """Whether all of these weights have exponents, so that a slot needs nothing of the host."""
        return all(self._updates[name] for name in names)

    def step(self, step: int) -> UpdateReport:
        """Sums over the workers, updates every weight that got a gradient, starts the next step.

        The sums travel while whatever does not need them runs: a bucket is updated beside the
        exchange of those after it.
        """
        self._set_words(step)
        losses, figures, count_lengths = self._gather(step)
        touched = [pair for pair in self.weights if self._contributions[pair[0]]]
        active = dict(pair for pair in touched if self._is_ready(step, *pair))
        conversion = self._begin_sum(self._conversion[1:])
        counts = self._begin_counts(count_lengths)
        buckets = self._sums.buckets(list(active))
        exchanges = [self._sums.begin_exchange(bucket) for bucket in buckets]
        self._end_sum(conversion)
        for bucket, exchange in zip(buckets, exchanges, strict=True):
            self._end_sum(exchange)
            self._sums.end_exchange(bucket)
            self._update(bucket)
        parts = self._apply_counts(step, counts)
        parts["ternary/untrained_weights"] = float(len(touched) - len(active))
        clipped = int(self._conversion[1])
        weights = max(1, sum(weight.num_weights for weight in active.values()))
        shares = [count / weights for count in self._update_counts.tolist()]
        converted = max(1, sum(self._contributions[n] * w.num_weights for n, w in active.items()))
        self._start_step()
        return UpdateReport(
            losses, figures, *shares, clipped_fraction=clipped / converted, parts=parts
        )

    def _gather(self, step: int) -> tuple[list[float], list[list[float]], list[int]]:
        """The losses and figures of all slots, and how many numbers each counting module counts in
        a slot; makes the contributions those of all workers. Stops what is not finite.

        What belongs to a slot comes from one worker, the others add 0: the sum copies it. A worker
        may have had no slot.
        """
        parts = [
            self._loss_bits(),
            torch.tensor(list(self._contributions.values()), dtype=torch.int32),
            self._count_lengths(),
            self._count_non_finite(),
        ]
        gathered = torch.cat([part.flatten().to(self.device) for part in parts])
        self._end_sum(self._begin_sum(gathered))
        sizes = [part.numel() for part in parts]
        self._num_slots.copy_(gathered.split(sizes)[1].unsqueeze(1))
        bits, contributions, lengths, non_finite = gathered.cpu().split(sizes)
        rows = bits.view(torch.float32).view_as(parts[0]).tolist()
        losses, figures = [row[0] for row in rows], [row[1:] for row in rows]
        bad = [slot for slot, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            raise NonFiniteError(f"step {step}: the loss of slot {bad[0]} is {losses[bad[0]]}")
        if non_finite:
            count = int(non_finite)
            raise NonFiniteError(f"step {step}: {count} gradient entries are not finite")
        self._contributions = dict(zip(self._updates, contributions.tolist(), strict=True))
        return losses, figures, lengths.view_as(parts[2]).amax(dim=0).tolist()

    def _count_lengths(self) -> Tensor:
        """int32 [slots, counting modules]: of this worker's slots, 0 elsewhere."""
        lengths = torch.zeros(self.slots_per_step, len(self.counters), dtype=torch.int32)
        for slot, counts in self._slot_counts.items():
            lengths[slot] = torch.tensor([counts_L.numel() for counts_L in counts])
        return lengths

    def _count_non_finite(self) -> Tensor:
        """int32 [1]: entries of this worker's gradients, also of those that wait for exponents."""
        count = self._conversion[:1].clone()
        for gradients in self._first_gradients.values():
            for _, gradient in gradients:
                count += gradient.numel() - gradient.isfinite().sum()
        return count.clamp_(max=1 << 16).int()  # of many workers too

    def _loss_bits(self) -> Tensor:
        """int32 [slots, 1 + figures]: the float32 losses and figures of this worker's slots, 0
        elsewhere."""
        bits = self._zeros(self.slots_per_step, 1 + len(FIGURES), dtype=torch.int32)
        for slot, loss in self._losses.items():
            bits[slot] = loss.view(torch.int32)
        return bits

    def _is_ready(self, step: int, name: str, weight: TernaryWeight) -> bool:
        """Calibrates a weight that gets its first gradient; false while that is all zero.

        Exponents come from the exact sum over all slots, then the same gradients become integers.
        """
        if self._updates[name]:
            return True
        gradients = self._first_gradients.pop(name, [])
        exact_sum = self._zeros(weight.num_rows, weight.num_cols)
        for _, gradient in gradients:
            exact_sum += quantize_exact(gradient.float())
        self._end_sum(self._begin_sum(exact_sum))
        if not calibrate(weight.state(), exact_sum):
            return False
        for slot, gradient in gradients:
            key = torch.tensor([self._slot_key(step, slot, name)], dtype=torch.int32)
            self._add_integers(name, weight, gradient, key.to(self.device))
        return True

    def _slot_key(self, step: int, slot: int, name: str) -> int:
        return signed_word(stream_key(self.seed, step, tensor_id(name), STREAM_SLOT + slot))

    def _add_integers(
        self, name: str, weight: TernaryWeight, gradient: Tensor, key: Tensor
    ) -> None:
        self.rule.add_slot(weight, gradient, key, self._sums[name], self._conversion)

    def _update(self, bucket: tuple[str, ...]) -> None:
        """Updates a bucket's weights; the launches are recorded once per bucket.

        The first update of a bucket is launched as it is: that compiles the kernels.
        """
        is_first = bucket not in self._launched_updates
        self._launched_updates.add(bucket)
        for name in bucket:
            self._updates[name] += 1
        if is_first or not can_record(self.device):
            self._launch_updates(bucket)
            return
        if bucket not in self._recorded_updates:
            self._recorded_updates[bucket] = Recording(lambda: self._launch_updates(bucket))
        self._recorded_updates[bucket].replay()

    def _begin_counts(self, lengths: list[int]) -> list[tuple[Tensor, Work | None]]:
        """Begins to gather what all slots counted: int64 [slots, numbers] for each module.

        A slot's numbers come from one worker, the others add 0.
        """
        begun = []
        for i, length in enumerate(lengths):
            counts_SL = self._zeros(self.slots_per_step, length)
            for slot, counts in self._slot_counts.items():
                counts_SL[slot] = counts[i]
            begun.append((counts_SL, self._begin_sum(counts_SL)))
        return begun

    def _apply_counts(
        self, step: int, gathered: list[tuple[Tensor, Work | None]]
    ) -> dict[str, float]:
        """Moves the integer state of the parts by what all slots counted.

        What was counted before the weights moved is applied after it.
        """
        figures: dict[str, float] = {}
        for (name, module), (counts_SL, work) in zip(self.counters, gathered, strict=True):
            self._end_sum(work)
            key = stream_key(self.seed, step, tensor_id(name), STREAM_UPDATE)
            figures |= module.apply_counts(counts_SL, key)
        return figures

    def _set_words(self, step: int) -> None:
        """Rates, key and number of each weight's next update, for the device to read."""
        words = [
            self.rule.step_words(name, weight, step, self._updates[name] + 1)
            for name, weight in self.weights
        ]
        self._words.copy_(torch.tensor(words, dtype=torch.int32))

    def _launch_updates(self, bucket: tuple[str, ...]) -> None:
        for name in bucket:
            total, place = self._sums[name], self._place[name]
            words, num_slots = self._words[place], self._num_slots[place]
            weight = self.weights[place][1]
            self.rule.update(weight, total, words, num_slots, self._update_counts)
            total.zero_()

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def _begin_sum(self, integers: Tensor) -> Work | None:
        """Begins to sum over the workers, in place; None where there is one."""
        return self.all_reduce(integers) if self.all_reduce is not None else None

    def _end_sum(self, work: Work | None) -> None:
        if work is not None:
            work.wait()
