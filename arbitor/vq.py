"""VQ bridge: each position finds the nearest row of a ternary codebook, which is added back to it.

Straight-through vector quantization (van den Oord et al. 2017) without a bottleneck. Codes that
nobody uses are replaced by splitting the most used ones, a function of the state alone.
Shape letters: B sequences, T positions, M = B T, D width, C code width, V codes, S slots of a step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arbitor.code_search import nearest_codes
from arbitor.kernel.latent_update.fixed_point import counter_hash, element_index
from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryLinear
from arbitor.step_counts import StepCounts

CODE_WIDTH = 64
MAX_CODES = 1 << 20
START_GAIN = 1 / 8  # codes mean little at first: they start as a whisper, the scale is learned
CODEBOOK_WEIGHT = 0.1  # pulls codes to the positions that chose them
# Pulls positions to their code; more than a little draws all to a few codes.
COMMITMENT_WEIGHT = 0.0005
USAGE_SHIFT = 6  # usage forgets 1/64 a step
# A code is replaced that nobody chose in 8 steps and while the mean code was chosen 16 times.
IDLE_CHOICES = 16
IDLE_STEPS = 8
SPLIT_SHARE = 16  # at most 1/16 of the codes are replaced in a step
SPLIT_NOISE = 31  # latents of a split code move by at most so much: small trits flip


class VQBridge(StepCounts):
    """bfloat16 [B, T, D] -> the same with code vectors added, codes int64 [B, T], auxiliary loss.

    `usage` is a decaying count of the positions that chose a code, in 1/64 of a position; `idle`
    the number of steps since one did.
    """

    def __init__(self, width: int, num_codes: int, activation: str, output_gain: float):
        super().__init__()
        self.down = TernaryLinear(width, CODE_WIDTH, activation)
        self.codebook = TernaryEmbedding(num_codes, CODE_WIDTH)
        self.up = TernaryLinear(CODE_WIDTH, width, activation, gain=output_gain * START_GAIN)
        self.register_buffer("usage", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("idle", torch.zeros(num_codes, dtype=torch.int32))

    def forward(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        searched_BTC, hidden_BTD = self.down.fork(hidden_BTD)
        searched_BTC = normalize(searched_BTC)
        with torch.no_grad():
            codes_M = nearest_codes(searched_BTC.flatten(0, 1), self.codebook.operand())
        codes_BT = codes_M.view(hidden_BTD.shape[:2])
        self.count(codes_M)
        code_BTC = normalize(self.codebook(codes_BT))
        loss = CODEBOOK_WEIGHT * F.mse_loss(code_BTC, searched_BTC.detach())
        loss = loss + COMMITMENT_WEIGHT * F.mse_loss(searched_BTC, code_BTC.detach())
        # The value is the code, the gradient goes to what was searched for.
        straight_through_BTC = code_BTC.detach() + (searched_BTC - searched_BTC.detach())
        added_BTD = self.up(straight_through_BTC.to(torch.bfloat16))
        return hidden_BTD + added_BTD, codes_BT, loss

    def apply_counts(self, counts_SL: Tensor, key: int) -> dict[str, float]:
        """Takes the code of every position of every slot."""
        count_V = torch.bincount(counts_SL.flatten(), minlength=self.usage.numel())
        forgotten_V = (self.usage + (1 << USAGE_SHIFT) - 1) >> USAGE_SHIFT
        self.usage.add_((count_V << USAGE_SHIFT) - forgotten_V)
        self.idle.add_(1).masked_fill_(count_V > 0, 0)
        splits = self._split_codes(counts_SL.numel(), key)
        share_V = count_V.double() / count_V.sum()
        return {
            "vq/perplexity": float(torch.special.entr(share_V).sum().exp()),
            "vq/used": float((count_V > 0).double().mean()),
            "vq/splits": float(splits),
        }

    def _split_codes(self, positions: int, key: int) -> int:
        """The i-th idle code becomes a copy, some trits flipped, of the i-th most used one.

        Only codes of twice the mean usage are split. Under the rule `bigint`, whose trits never
        move, codes stay what they are.
        """
        if self.codebook.format.rule == "bigint":
            return 0
        num_codes = self.usage.numel()
        idle_steps = max(IDLE_STEPS, -(-IDLE_CHOICES * num_codes // positions))
        idle = (self.idle >= idle_steps).nonzero().flatten()
        usage_V, most_used = self.usage.sort(descending=True, stable=True)
        is_crowded_V = usage_V * num_codes >= 2 * usage_V.sum()
        # Usage forgets slowly: a code that was crowded may be idle by now.
        crowded = most_used[is_crowded_V & (self.idle[most_used] < idle_steps)]
        splits = min(idle.numel(), crowded.numel(), max(1, num_codes // SPLIT_SHARE))
        idle, crowded = idle[:splits], crowded[:splits]
        index = element_index(range(splits), CODE_WIDTH, CODE_WIDTH, self.usage.device)
        noise = (counter_hash(index, key) & 2 * SPLIT_NOISE + 1) - SPLIT_NOISE
        self.codebook.copy_rows(crowded, idle, noise.clamp_(max=SPLIT_NOISE))
        half = self.usage[crowded] >> 1
        self.usage[crowded] -= half
        self.usage[idle] = half
        self.idle[idle] = 0
        return splits


def normalize(x: Tensor) -> Tensor:
    """float32 x / rms(x) along the last axis; zeros stay zeros."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)
