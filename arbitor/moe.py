"""Mixture of ternary experts between shared projections: token-choice, dropless, top 2 of 8.

Loads are balanced by an integer bias on the scores (Wang et al. 2024) that moves once a step; there
is no auxiliary loss. Every expert runs on every position and the gates of those that were not
chosen are 0: all shapes are fixed and no position's bits depend on where others went. A grouped
kernel that runs the chosen ones alone would save 3/4 of the experts' matmul, which at these widths
is less than half of a feed-forward's.
Shape letters: B sequences, T positions, M = B T, D width, C code width, E experts, F expert width,
X = 2 F, S slots of a step.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from arbitor.kernel.swiglu.reference import swiglu_backward, swiglu_forward
from arbitor.kernel.ternary_scale import TernaryLinear
from arbitor.step_counts import StepCounts

NUM_EXPERTS = 8
TOP_K = 2
SCORE_ONE = 1 << 16  # scores between 0 and 1 are compared in this fixed point
BIAS_STEP = 256  # of SCORE_ONE


class MixtureOfExperts(StepCounts):
    """State [B, T, D] and, if the model has a graph, message [B, T, C] -> [B, T, D]."""

    def __init__(self, width: int, message_width: int, activation: str, output_gain: float):
        super().__init__()
        inner = self.inner = width // 2
        self.router = TernaryLinear(width + message_width, NUM_EXPERTS, activation)
        self.shared_input = TernaryLinear(width, inner, activation)
        self.experts = TernaryLinear(inner, NUM_EXPERTS * 2 * inner, activation)
        self.shared_output = TernaryLinear(inner, width, activation, gain=output_gain)
        self.register_buffer("balance_bias", torch.zeros(NUM_EXPERTS, dtype=torch.int32))

    def forward(self, hidden_BTD: Tensor, message_BTC: Tensor | None) -> Tensor:
        gate_ME = self._route(hidden_BTD, message_BTC)
        inner_MF = self.shared_input(hidden_BTD).flatten(0, 1)
        expert_MEX = self.experts(inner_MF).view(-1, NUM_EXPERTS, 2 * self.inner)
        mixed_MF = _MixExperts.apply(expert_MEX, gate_ME)
        return self.shared_output(mixed_MF).view_as(hidden_BTD)

    def _route(self, hidden_BTD: Tensor, message_BTC: Tensor | None) -> Tensor:
        """float32 gates [M, E]: 0 but for the chosen experts, whose gates sum to 1."""
        routed = hidden_BTD
        if message_BTC is not None:
            routed = torch.cat([hidden_BTD, message_BTC], dim=-1)
        logit_ME = self.router(routed).flatten(0, 1).float()
        chosen_ME = choose_experts(logit_ME.detach().sigmoid(), self.balance_bias)
        self.count(chosen_ME.sum(dim=0))
        # Score over the sum of the chosen scores, in logarithms: two scores may both be 0.
        return F.logsigmoid(logit_ME).masked_fill(~chosen_ME, -math.inf).softmax(dim=-1)

    def apply_counts(self, counts_SL: Tensor, key: int) -> dict[str, float]:
        """Takes the load of every expert in every slot; the bias moves towards the mean load."""
        load_E = counts_SL.sum(dim=0)
        surplus_E = load_E * NUM_EXPERTS - load_E.sum()
        self.balance_bias.sub_(BIAS_STEP * surplus_E.sign().int()).clamp_(-SCORE_ONE, SCORE_ONE)
        share_E = load_E.double() / load_E.sum()
        return {
            "moe/load_max": float(share_E.max()),
            "moe/load_min": float(share_E.min()),
            "moe/bias_max": float(self.balance_bias.abs().max() / SCORE_ONE),
        }


def choose_experts(score_ME: Tensor, bias_E: Tensor) -> Tensor:
    """bool [M, E]: the TOP_K highest of score + bias, the lower expert first among equal ones."""
    place_E = torch.arange(NUM_EXPERTS, device=score_ME.device)
    fixed_ME = (score_ME * SCORE_ONE).long() + bias_E
    order_ME = fixed_ME * NUM_EXPERTS + (NUM_EXPERTS - 1 - place_E)  # no two are equal
    chosen_ME = torch.zeros_like(order_ME, dtype=torch.bool)
    lowest = torch.iinfo(torch.int64).min
    for _ in range(TOP_K):
        left_ME = order_ME.masked_fill(chosen_ME, lowest)
        chosen_ME = chosen_ME | (left_ME == left_ME.amax(dim=-1, keepdim=True))
    return chosen_ME


class _MixExperts(torch.autograd.Function):
    """bfloat16 [M, F]: the SwiGLU of each expert times its gate, summed in order of the experts.

    An expert at a time, so that no float32 tensor of all experts exists.
    """

    @staticmethod
    def forward(ctx, expert_MEX: Tensor, gate_ME: Tensor) -> Tensor:
        ctx.save_for_backward(expert_MEX, gate_ME)
        mixed_MF = gate_ME[:, :1] * swiglu_forward(expert_MEX[:, 0])
        for e in range(1, NUM_EXPERTS):
            mixed_MF += gate_ME[:, e : e + 1] * swiglu_forward(expert_MEX[:, e])
        return mixed_MF.to(torch.bfloat16)

    @staticmethod
    def backward(ctx, grad_MF: Tensor) -> tuple[Tensor, Tensor]:
        expert_MEX, gate_ME = ctx.saved_tensors
        grad_MF = grad_MF.float()
        grad_MEX, grad_ME = torch.empty_like(expert_MEX), torch.empty_like(gate_ME)
        for e in range(NUM_EXPERTS):
            expert_MX = expert_MEX[:, e]
            grad_MEX[:, e] = swiglu_backward(grad_MF * gate_ME[:, e : e + 1], expert_MX)
            grad_ME[:, e] = (grad_MF * swiglu_forward(expert_MX)).sum(dim=-1)
        return grad_MEX, grad_ME
