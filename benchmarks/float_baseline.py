"""The same ARBModel with float weights: plain AdamW, or straight-through ternary (BitNet b1.58).

Only the weights differ from the product's model: norms, activation quantizer, tables, shapes and
schedule are the same. Sources: Ma et al. 2024 (arXiv 2402.17764) for the absmean quantizer.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.batch import SlotBatch
from arbitor.kernel.matmul.reference import quantize_activation
from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryWeight
from arbitor.main import ARBModel, ModelConfig
from arbitor.optimizer import UpdateConfig

RULES = ("adamw", "ste", "ste-float-tables")


class FloatWeight(nn.Module):
    """A float32 master weight [N, K]; `ternary` rounds it to trits times its mean magnitude."""

    def __init__(self, ternary_weight: TernaryWeight, ternary: bool, generator: torch.Generator):
        super().__init__()
        rows, cols = ternary_weight.num_rows, ternary_weight.num_cols
        start = torch.randn(rows, cols, generator=generator, device=generator.device)
        start *= ternary_weight.gain / cols**0.5
        self.weight = nn.Parameter(start)
        self.ternary, self.is_table = ternary, ternary_weight.rate == "table"

    def effective(self) -> Tensor:
        if not self.ternary:
            return self.weight
        scale = self.weight.abs().mean().clamp(min=1e-6)
        rounded = (self.weight / scale).round().clamp(-1, 1) * scale
        return self.weight + (rounded - self.weight).detach()


class FloatLinear(FloatWeight):
    """RMSNorm, activation quantizer where the weight is ternary, bfloat16 matmul."""

    def __init__(self, linear, ternary, generator):
        super().__init__(linear, ternary, generator)
        self.activation, self.gated = linear.activation, linear.gated

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        x = F.rms_norm(x.float(), (x.shape[-1],), eps=1e-6)
        if self.ternary:
            with torch.no_grad():
                codes = quantize_activation(x.flatten(0, -2), self.activation).values()
            x = x + (codes.view_as(x) - x).detach()
        return F.linear(x.bfloat16(), self.effective().bfloat16())

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), x


class FloatEmbedding(FloatWeight):
    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.effective()).bfloat16()


def float_model(config: ModelConfig, rule: str, seed: int) -> ARBModel:
    """ARBModel with every ternary weight replaced as `rule`, one of `RULES`, says."""
    model = ARBModel(config, seed)
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    for name, weight in model.ternary_weights():
        ternary = rule == "ste" or (rule == "ste-float-tables" and weight.rate != "table")
        kind = FloatEmbedding if isinstance(weight, TernaryEmbedding) else FloatLinear
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, kind(weight, ternary, generator))
    return model


def make_adamw(model: ARBModel, lr: float, fused: bool = False) -> torch.optim.AdamW:
    """Weight decay 0.1 on matrices, none on tables; betas as language models use them."""
    weights = [module for module in model.modules() if isinstance(module, FloatWeight)]
    groups = [
        {"params": [w.weight for w in weights if w.is_table], "weight_decay": 0.0},
        {"params": [w.weight for w in weights if not w.is_table], "weight_decay": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


class FloatTrainer:
    """Trains one float model again and again, from fresh weights: it is compiled once."""

    def __init__(
        self, config: ModelConfig, rule: str, update: UpdateConfig, options: argparse.Namespace
    ):
        self.config, self.rule, self.options = config, rule, options
        self.schedule = update.schedule
        self.model = self._fresh(seed=0)
        self.loss = torch.compile(self.model) if options.compile else self.model

    def _fresh(self, seed: int) -> ARBModel:
        with torch.device(self.options.device):
            return float_model(self.config, self.rule, seed)

    def train(self, lr: float, seed: int, slots: Callable[[int], list[SlotBatch]]) -> ARBModel:
        """The model after all steps; `slots` gives the batches of a step."""
        options = self.options
        self.model.load_state_dict(self._fresh(seed).state_dict())
        optimizer = make_adamw(self.model, lr, fused=options.device == "cuda")
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * self.schedule(step, options.steps) / 65536
            for batch in slots(step):
                (self.loss(batch) / options.slots).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return self.model
