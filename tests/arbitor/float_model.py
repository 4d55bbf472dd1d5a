"""A model's float32 twin: the same weights, nothing quantized, every product in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.kernel.swiglu.reference import swiglu_forward
from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryLinear, TernaryWeight


def make_float(module: nn.Module) -> nn.Module:
    """Replaces every ternary module inside `module`, which is returned."""
    kinds = {TernaryLinear: FloatLinear, TernaryEmbedding: FloatEmbedding}
    for name, child in module.named_children():
        if type(child) in kinds:
            setattr(module, name, kinds[type(child)](child))
        else:
            make_float(child)
    return module


def effective_weight(weight: TernaryWeight) -> Tensor:
    """float32 [N, K]"""
    return weight.operand().float() * weight.row_scale().unsqueeze(1)


class FloatLinear(nn.Module):
    def __init__(self, linear: TernaryLinear):
        super().__init__()
        self.activation, self.gated = linear.activation, linear.gated
        self.register_buffer("weight", effective_weight(linear))

    def forward(self, x: Tensor) -> Tensor:
        x = swiglu_forward(x) if self.gated else x
        return F.linear(F.rms_norm(x, x.shape[-1:], eps=1e-6), self.weight)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), x


class FloatEmbedding(nn.Module):
    def __init__(self, table: TernaryEmbedding):
        super().__init__()
        self.register_buffer("weight", effective_weight(table))

    def forward(self, indices: Tensor) -> Tensor:
        return self.weight[indices]


def random_symbols(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
