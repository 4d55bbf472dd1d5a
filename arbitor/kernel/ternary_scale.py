"""TernaryLinear and TernaryEmbedding: modules whose only state is integers.

A weight is 2^(log2_scale / 256) * trit. Nothing here is an `nn.Parameter`: the backward pass leaves
a float gradient of the effective weight for one slot, which the optimizer turns into integers.
Shape letters: N outputs (rows), K inputs (columns), M positions, D width, V symbols.
"""

from dataclasses import fields

import torch
from torch import Tensor, nn

from arbitor.kernel.embedding.reference import embedding_backward, embedding_forward
from arbitor.kernel.latent_update.fixed_point import (
    POW2_Q16,
    float32_power_of_two,
)
from arbitor.kernel.latent_update.state import (
    TernaryState,
    init_state,
    trits,
)
from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.matmul.reference import (
    matmul_backward_weight,
    matmul_backward_x,
    matmul_forward,
    quantize_activation,
)
from arbitor.kernel.rms_norm.reference import rms_norm_backward, rms_norm_forward


class TernaryWeight(nn.Module):
    """The integer state of one [N, K] weight matrix (`TernaryState`) as buffers.

    `rate` multiplies the latent rate of the update rule: tables and heads learn slower.
    """

    def __init__(self, num_rows: int, num_cols: int, gain: float = 1.0, rate: str = "matrix"):
        super().__init__()
        self.num_rows, self.num_cols, self.gain, self.rate = num_rows, num_cols, gain, rate
        self.slot_gradient: Tensor | None = None  # float32 [N, K], between backward and optimizer
        self.load(init_state(num_rows, num_cols, gain, seed=0, name=""))

    def initialize(self, seed: int, name: str) -> None:
        """Fresh state keyed by the seed and the tensor's qualified name."""
        self.load(init_state(self.num_rows, self.num_cols, self.gain, seed, name))

    def load(self, state: TernaryState) -> None:
        for field in fields(TernaryState):
            self.register_buffer(field.name, getattr(state, field.name))

    def state(self) -> TernaryState:
        """The buffers themselves, not copies."""
        return TernaryState(
            **{field.name: getattr(self, field.name) for field in fields(TernaryState)}
        )

    def operand(self) -> Tensor:
        """bfloat16 trits [N, K], decoded anew at each use."""
        return trits(self.latent).to(torch.bfloat16)

    def row_scale(self) -> Tensor:
        """float32 2^(log2_scale / 256), [N]."""
        log2_scale = self.log2_scale.int()
        mantissa = POW2_Q16.to(log2_scale.device)[log2_scale & 255].float()
        return mantissa * float32_power_of_two((log2_scale >> 8) - 16)

    def add_gradient(self, grad_NK: Tensor) -> None:
        """Sums the uses of this weight in one slot, in the fixed order of the backward pass."""
        self.slot_gradient = grad_NK if self.slot_gradient is None else self.slot_gradient + grad_NK


class TernaryLinear(TernaryWeight):
    """Gain-free RMSNorm, quantized activations, ternary matmul; no bias. [..., K] -> [..., N]."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        activation: str,
        gain: float = 1.0,
        rate: str = "matrix",
    ):
        super().__init__(num_outputs, num_inputs, gain, rate)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y_MN = _LinearFunction.apply(x.reshape(-1, self.num_cols), self)
        return y_MN.view(*x.shape[:-1], self.num_rows)


class TernaryEmbedding(TernaryWeight):
    """A ternary table: int64 indices [...] -> bfloat16 rows [..., D], of unit variance at first."""

    def __init__(self, num_symbols: int, width: int):
        super().__init__(num_symbols, width, gain=width**0.5, rate="table")

    def forward(self, indices: Tensor) -> Tensor:
        # Integer inputs carry no gradient: this scalar is what makes autograd call backward.
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled(), device=indices.device)
        y_MD = _EmbeddingFunction.apply(anchor, indices.reshape(-1), self)
        return y_MD.view(*indices.shape, self.num_cols)


class _LinearFunction(torch.autograd.Function):
    """Saves one byte an element: the codes, from which backward takes the normalized input too.

    The gradient passes the quantizer unchanged (straight-through).
    """

    @staticmethod
    def forward(ctx, x_MK: Tensor, linear: TernaryLinear) -> Tensor:
        normalized_MK, inverse_rms_M = rms_norm_forward(x_MK)
        x = quantize_activation(normalized_MK, linear.activation)
        ctx.linear, ctx.input_dtype = linear, x_MK.dtype
        ctx.save_for_backward(x.codes, x.scale, inverse_rms_M)
        return matmul_forward(x, linear.operand(), linear.row_scale())

    @staticmethod
    def backward(ctx, grad_MN: Tensor) -> tuple[Tensor, None]:
        codes, scale, inverse_rms_M = ctx.saved_tensors
        linear, x = ctx.linear, Quantized(codes, scale)
        linear.add_gradient(matmul_backward_weight(grad_MN, x, linear.activation))
        grad_MK = matmul_backward_x(
            grad_MN, linear.operand(), linear.row_scale(), linear.activation
        )
        grad_MK = rms_norm_backward(grad_MK, x.values(), inverse_rms_M)
        return grad_MK.to(ctx.input_dtype), None


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor: Tensor, indices_M: Tensor, table: TernaryEmbedding) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(indices_M)
        return embedding_forward(indices_M, table.operand(), table.row_scale())

    @staticmethod
    def backward(ctx, grad_MD: Tensor) -> tuple[None, None, None]:
        (indices_M,) = ctx.saved_tensors
        ctx.table.add_gradient(embedding_backward(indices_M, grad_MD, ctx.table.num_rows))
        return None, None, None
