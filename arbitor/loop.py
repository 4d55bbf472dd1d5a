"""A block applied several times with the same weights: h <- A * h + B * e + block(h).

e is what enters the loop; A in (0, 1) and B = 1 - A per channel are frozen (linear time-invariant
injection), so that e stays in sight and h cannot grow by itself.
Shape letters: B sequences, T positions, D width, C code width, R rounds, S slots of a step.
"""

import torch
from torch import Tensor, nn

from arbitor.kernel.ternary_scale import TernaryLinear
from arbitor.step_counts import StepCounts

ROUNDS = 2
ACT_MAX_ITERATIONS = 4
ACT_THRESHOLD = 0.99  # a position halts when its halting probabilities sum to so much
PONDER_WEIGHT = 0.01  # nats for a round
_ONE = 1 << 15  # of the fixed point of A


class Loop(StepCounts):
    """(hidden [B, T, D], message or None) -> hidden [B, T, D] and the ponder cost, if there is one.

    Two rounds, or with `halting` up to four, halted per position (adaptive computation time, Graves
    2016): the result is the mean of the rounds' states by their halting probabilities. All rounds
    are computed, halted positions let theirs go.
    """

    def __init__(self, block: nn.Module, width: int, activation: str, halting: bool):
        super().__init__()
        self.block = block
        self.halt = TernaryLinear(width, 1, activation) if halting else None
        # From 1/4 to 3/4 over the channels: some forget the loop sooner, some what entered it.
        spread_D = torch.arange(width, dtype=torch.int64) * (_ONE // 2) // max(1, width - 1)
        self.register_buffer("decay", (_ONE // 4 + spread_D).to(torch.int16))

    def forward(
        self, hidden_BTD: Tensor, message_BTC: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.halt is not None:
            return self._forward_halting(hidden_BTD, message_BTC)
        entered_BTD = hidden_BTD
        for _ in range(ROUNDS):
            hidden_BTD = self._round(hidden_BTD, entered_BTD, message_BTC)
        self.count(torch.full((ROUNDS,), hidden_BTD[..., 0].numel(), device=hidden_BTD.device))
        return hidden_BTD, None

    def _round(self, hidden_BTD: Tensor, entered_BTD: Tensor, message_BTC: Tensor | None) -> Tensor:
        decay_D = self.decay.float() / _ONE
        kept_BTD = decay_D * hidden_BTD + (1 - decay_D) * entered_BTD
        return (kept_BTD + self.block(hidden_BTD, message_BTC)).to(torch.bfloat16)

    def _forward_halting(
        self, hidden_BTD: Tensor, message_BTC: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        entered_BTD, result_BTD, running = hidden_BTD, 0, []
        left_BT1 = torch.ones_like(hidden_BTD[..., :1], dtype=torch.float32)
        remainder_BT1 = torch.zeros_like(left_BT1)
        for r in range(ACT_MAX_ITERATIONS):
            hidden_BTD = self._round(hidden_BTD, entered_BTD, message_BTC)
            probability_BT1 = self.halt(hidden_BTD).float().sigmoid()
            running.append((left_BT1 > 0).sum())
            halts_BT1 = left_BT1 - probability_BT1 <= 1 - ACT_THRESHOLD
            if r == ACT_MAX_ITERATIONS - 1:
                halts_BT1 = torch.ones_like(halts_BT1)
            share_BT1 = torch.where(halts_BT1, left_BT1, probability_BT1)
            remainder_BT1 = torch.where(halts_BT1, remainder_BT1 + left_BT1, remainder_BT1)
            result_BTD = result_BTD + share_BT1 * hidden_BTD
            left_BT1 = left_BT1 - share_BT1
        self.count(torch.stack(running))
        # The number of rounds has no gradient; that of the remainder shortens them.
        return result_BTD.to(torch.bfloat16), PONDER_WEIGHT * remainder_BT1.mean()

    def apply_counts(self, counts_SL: Tensor, key: int) -> dict[str, float]:
        """Takes the positions that each round found running; there is no state to move."""
        running_R = counts_SL.sum(dim=0)
        return {"loop/rounds": int(running_R.sum()) / int(running_R[0])}
