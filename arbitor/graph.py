"""MoEGraph: which codes follow which, and messages along those edges.

A message reads rows of code tables alone, never another position, so nothing looks ahead.
Shape letters: B sequences, T positions, D width, C code width, V codes, K edges of a code,
N = K + 1 nodes of a message, S slots of a step, U different edges.
"""

import torch
from torch import Tensor, nn

from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryLinear
from arbitor.step_counts import StepCounts

EDGES_PER_CODE = 8
SCORE_SHIFT = 6  # an edge gains 64 each time it is seen and loses 1/64 of its score a step
MAX_SCORE = 1 << 30


class MoEGraph(StepCounts):
    """Codes int64 [B, T] -> messages bfloat16 [B, T, C].

    A message is the code's own node features and those of its successors, by their score. Of each
    code the K best successors are kept, the lower code first among equal scores; score 0 = none.
    """

    def __init__(self, num_codes: int, code_width: int):
        super().__init__()
        self.num_codes = num_codes
        self.node_features = TernaryEmbedding(num_codes, code_width)
        shape = (num_codes, EDGES_PER_CODE)
        self.register_buffer("successor", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("score", torch.zeros(shape, dtype=torch.int32))

    def forward(self, codes_BT: Tensor) -> Tensor:
        self.count(self._edge_keys(codes_BT))
        score_BTK = self.score[codes_BT].float()
        share_BTK = score_BTK / score_BTK.sum(dim=-1, keepdim=True).clamp(min=1)
        own_BT1 = codes_BT.unsqueeze(-1)
        nodes_BTN = torch.cat([own_BT1, self.successor[codes_BT].long()], dim=-1)
        share_BTN = torch.cat([torch.ones_like(own_BT1).float(), share_BTK], dim=-1)
        features_BTNC = self.node_features(nodes_BTN).float()
        return (features_BTNC * share_BTN.unsqueeze(-1)).sum(dim=-2).to(torch.bfloat16)

    def _edge_keys(self, codes_BT: Tensor) -> Tensor:
        """int64 [B T]: code * (V + 1) + next code; V stands for the end of a row."""
        end_B1 = torch.full_like(codes_BT[:, :1], self.num_codes)
        following_BT = torch.cat([codes_BT[:, 1:], end_B1], dim=1)
        return (codes_BT * (self.num_codes + 1) + following_BT).flatten()

    def apply_counts(self, counts_SL: Tensor, key: int) -> dict[str, float]:
        """Takes the edge key of every position of every slot."""
        seen_U, times_U = counts_SL.flatten().unique(return_counts=True)
        is_edge_U = seen_U % (self.num_codes + 1) < self.num_codes
        seen_U, times_U = seen_U[is_edge_U], times_U[is_edge_U]
        known_U, score_U = self._decayed_edges()
        known = torch.isin(seen_U, known_U)
        share_known = float(times_U[known].sum() / times_U.sum().clamp(min=1))
        self._keep_best(
            *merge(torch.cat([known_U, seen_U]), torch.cat([score_U, times_U << SCORE_SHIFT]))
        )
        return {
            "graph/edges_per_code": float((self.score > 0).double().sum(dim=1).mean()),
            "graph/pairs_known": share_known,
        }

    def _decayed_edges(self) -> tuple[Tensor, Tensor]:
        """Keys and scores, both int64 [U], of the edges that are left after a step's decay."""
        code_V1 = torch.arange(self.num_codes, device=self.score.device).unsqueeze(1)
        key_VK = code_V1 * (self.num_codes + 1) + self.successor
        score_VK = self.score.long()
        score_VK = score_VK - ((score_VK + (1 << SCORE_SHIFT) - 1) >> SCORE_SHIFT)
        return key_VK[score_VK > 0], score_VK[score_VK > 0]

    def _keep_best(self, key_U: Tensor, score_U: Tensor) -> None:
        """Of ascending, different keys the K of each code with the highest scores."""
        order = score_U.sort(descending=True, stable=True).indices
        order = order[(key_U[order] // (self.num_codes + 1)).sort(stable=True).indices]
        key_U, score_U = key_U[order], score_U[order]
        code_U = key_U // (self.num_codes + 1)
        place_U = torch.arange(code_U.numel(), device=code_U.device)
        place_U = place_U - torch.searchsorted(code_U, code_U)
        kept = place_U < EDGES_PER_CODE
        where = (code_U[kept], place_U[kept])
        self.successor.zero_()[where] = (key_U[kept] % (self.num_codes + 1)).int()
        self.score.zero_()[where] = score_U[kept].clamp(max=MAX_SCORE).int()


def merge(key_U: Tensor, score_U: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending different keys, and the sum of the scores of each; int64."""
    keys, place_U = key_U.unique(return_inverse=True)
    return keys, torch.zeros_like(keys).index_add_(0, place_U, score_U)


class MessageReader(nn.Module):
    """What a position takes from its message: (state [B, T, D], message [B, T, C]) -> [B, T, D]."""

    def __init__(self, width: int, code_width: int, activation: str, output_gain: float):
        super().__init__()
        self.gate_and_value = TernaryLinear(width + code_width, 2 * code_width, activation)
        self.output = TernaryLinear(code_width, width, activation, gain=output_gain, gated=True)

    def forward(self, hidden_BTD: Tensor, message_BTC: Tensor) -> Tensor:
        both_BTX = torch.cat([hidden_BTD, message_BTC], dim=-1)
        return self.output(self.gate_and_value(both_BTX))
