"""TernaryLinear and TernaryEmbedding: modules whose only state is integers.

A weight is 2^(log2_scale / 256) * trit, where groups of a row have scales of their own times those.
Nothing here is an `nn.Parameter`: the backward pass leaves a float gradient of the effective weight
for one slot, which the optimizer turns into integers.
Shape letters: N outputs (rows), K inputs (columns), M positions, X columns that a linear is given,
D width, V symbols.
"""

from dataclasses import fields

import torch
from torch import Tensor, nn

from arbitor.kernel.backend import refuse_tilelang_training
from arbitor.kernel.correlation.state import (
    CorrelationState,
    init_correlation_state,
    relative_log2_scale,
)
from arbitor.kernel.embedding.op import lookup, lookup_backward
from arbitor.kernel.latent_update.group_exponents import (
    relative_exponents,
    scale_of_largest_group,
)
from arbitor.kernel.latent_update.packed import pack_latent, stored_state, unpack_latent
from arbitor.kernel.latent_update.state import (
    TernaryState,
    blank_state,
    init_state,
    trits,
)
from arbitor.kernel.matmul import op as matmul
from arbitor.kernel.matmul.plane import pack_plane, unpack_plane
from arbitor.kernel.matmul.quantize import Quantized
from arbitor.kernel.packed_weight import GroupedPackedState, PackedState, scaled_operand
from arbitor.kernel.rms_norm.op import normalize, normalize_backward
from arbitor.kernel.state_format import StateFormat


class TernaryWeight(nn.Module):
    """The integer state of one [N, K] weight matrix as buffers: those of the rule it learns by.

    `rate` says at which rate of the update rule the latents move: as a "matrix", or as a "table",
    which tables and heads do (`update.table_rate` of it).
    """

    def __init__(self, num_rows: int, num_cols: int, gain: float = 1.0, rate: str = "matrix"):
        super().__init__()
        self.num_rows, self.num_cols, self.gain, self.rate = num_rows, num_cols, gain, rate
        self.format = StateFormat()
        self.slot_gradient: Tensor | None = None  # [N, K], between backward and optimizer
        self.load(blank_state(num_rows, num_cols))

    def initialize(self, seed: int, name: str, format: StateFormat | None = None) -> None:
        """Fresh state keyed by the seed and the tensor's qualified name."""
        self.format = format or StateFormat()
        start = (self.num_rows, self.num_cols, self.gain, seed, name)
        if self.format.rule == "bigint":
            self.load(init_correlation_state(*start, self.format.correlation_group))
        else:
            self.load(stored_state(init_state(*start), self.format))

    def load(self, state: TernaryState | CorrelationState | PackedState) -> None:
        self._state_type = type(state)
        self._fixed_row_scale: Tensor | None = None  # of a packed weight
        self._buffers.clear()
        for field in fields(state):
            self.register_buffer(field.name, getattr(state, field.name))

    def pack(self) -> None:
        """Drops what only learning needs: from here on the weight is for generation."""
        log2_scale_N, group_scale = self.log2_scale, self._group_scale()
        if self.format.rule == "latent" and self.format.group_size:
            log2_scale_N = scale_of_largest_group(log2_scale_N, self.group_exponent)
        plane_NQ = pack_plane(self.trits())
        if group_scale is None:
            self.load(PackedState(plane_NQ, log2_scale_N))
        else:
            self.load(GroupedPackedState(plane_NQ, log2_scale_N, group_scale))

    @property
    def is_packed(self) -> bool:
        return issubclass(self._state_type, PackedState)

    @property
    def group_size(self) -> int:
        """Weights of a row that share a scale beside the row's; 0 where none do."""
        is_bigint = self.format.rule == "bigint"
        return self.format.correlation_group if is_bigint else self.format.group_size

    def state(self) -> TernaryState | CorrelationState | PackedState:
        """The buffers themselves, not copies."""
        return self._state_type(
            **{field.name: getattr(self, field.name) for field in fields(self._state_type)}
        )

    @property
    def num_weights(self) -> int:
        return self.num_rows * self.num_cols

    def latents(self) -> Tensor:
        """int8 [N, K]: the buffer itself, or what its packed form holds, unpacked anew."""
        if self.format.latent_bits == 6:
            return unpack_latent(self.latent, self.num_cols)
        return self.latent

    def copy_rows(self, source: Tensor, target: Tensor, noise: Tensor) -> None:
        """Makes rows `target` copies of rows `source` but for their latents, moved by `noise`.

        Row numbers are int64 [I], noise int32 [I, K] in latent units. Rule `latent` alone.
        """
        latent_IK = self.latents()[source].int() + noise
        limit, shift = self.format.largest_latent, self.format.latent_shift
        latent_IK = (latent_IK >> shift << shift).clamp_(-limit, limit).to(torch.int8)
        of_columns = ("col_moment", "tensor_moment", "num_updates")
        for name, state in self.named_buffers():
            if name not in of_columns:
                state[target] = state[source]
        is_packed = self.format.latent_bits == 6
        self.latent[target] = pack_latent(latent_IK) if is_packed else latent_IK

    def trits(self) -> Tensor:
        """int8 [N, K] of -1, 0, 1."""
        if self.is_packed or self.format.rule == "bigint":
            return unpack_plane(self.plane, self.num_cols)
        return trits(self.latents())

    def operand(self) -> Tensor:
        """bfloat16 [N, K]: trits, times their group's scale over `row_scale` if it has one."""
        return scaled_operand(self.trits(), self._group_scale(), self.group_size)

    def _group_scale(self) -> Tensor | None:
        """As in the packed state; None where a row has one scale."""
        if not self.group_size:
            return None
        if self.is_packed:
            return self.group_scale
        if self.format.rule == "bigint":
            return relative_log2_scale(self.state(), self.group_size)
        return relative_exponents(self.group_exponent)

    def kernel_operand(self) -> Tensor:
        """What matmuls and lookups take: int8 latents, the uint8 plane of a packed weight, or the
        bfloat16 operand where groups have scales."""
        if self.group_size:
            return self.operand()
        return self.plane if self.is_packed else self.latents()

    def row_scale(self) -> Tensor:
        """float32 [N]: 2^(log2_scale / 256), times the largest of the row's group octaves."""
        log2_scale_N = self.log2_scale
        if self.is_packed:
            fixed = self._fixed_row_scale
            if fixed is None or fixed.device != log2_scale_N.device:
                self._fixed_row_scale = matmul.row_scale(log2_scale_N)
            return self._fixed_row_scale
        if self.format.rule == "latent" and self.format.group_size:
            log2_scale_N = scale_of_largest_group(log2_scale_N, self.group_exponent)
        return matmul.row_scale(log2_scale_N)

    def add_gradient(self, grad_NK: Tensor) -> None:
        """Sums the uses of this weight in one slot, in the fixed order of the backward pass.

        float32; a GPU may leave the only use of a slot in bfloat16.
        """
        if self.slot_gradient is not None:
            grad_NK = self.slot_gradient.float() + grad_NK
        self.slot_gradient = grad_NK


class TernaryLinear(TernaryWeight):
    """Gain-free RMSNorm, quantized activations, ternary matmul; no bias. [..., K] -> [..., N].

    A gated one takes [..., 2 K], gates and then what they let through: it starts with their SwiGLU.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        activation: str,
        gain: float = 1.0,
        rate: str = "matrix",
        gated: bool = False,
    ):
        super().__init__(num_outputs, num_inputs, gain, rate)
        self.activation, self.gated = activation, gated

    def forward(self, x: Tensor) -> Tensor:
        return self.fork(x)[0]

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and x for a residual stream that goes past the linear.

        What comes back along the stream is added inside the norm's gradient: a pass less.
        """
        if torch.is_grad_enabled():
            refuse_tilelang_training(self.format.rule)
        y_MN, x_MX = _LinearFunction.apply(x.reshape(-1, x.shape[-1]), self)
        return y_MN.view(*x.shape[:-1], self.num_rows), x_MX.view(x.shape)


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

    Before a gated linear gates and values are kept as well. The gradient passes the quantizer
    unchanged (straight-through).
    """

    @staticmethod
    def forward(ctx, x_MX: Tensor, linear: TernaryLinear) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # none made up where x does not go on
        for_backward, row_scale_N = any(ctx.needs_input_grad), linear.row_scale()
        x, saved, inverse_rms_M = normalize(x_MX, linear.activation, for_backward, linear.gated)
        if for_backward:
            ctx.linear, ctx.input_dtype = linear, x_MX.dtype
            gate_and_up_MX = x_MX if linear.gated else None
            ctx.save_for_backward(
                saved.codes, saved.scale, inverse_rms_M, row_scale_N, gate_and_up_MX
            )
        return matmul.forward(x, linear.kernel_operand(), row_scale_N), x_MX

    @staticmethod
    def backward(ctx, grad_MN: Tensor, residual_MX: Tensor | None) -> tuple[Tensor, None]:
        codes, scale, inverse_rms_M, row_scale_N, gate_and_up_MX = ctx.saved_tensors
        linear, x = ctx.linear, Quantized(codes, scale)
        grad_MK, grad_NK = matmul.backward(
            grad_MN, x, linear.kernel_operand(), row_scale_N, linear.activation
        )
        linear.add_gradient(grad_NK)
        grad_MX = normalize_backward(
            grad_MK, x, inverse_rms_M, ctx.input_dtype, gate_and_up_MX, residual_MX
        )
        return grad_MX, None


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor: Tensor, indices_M: Tensor, table: TernaryEmbedding) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(indices_M)
        return lookup(indices_M, table.kernel_operand(), table.row_scale(), table.num_cols)

    @staticmethod
    def backward(ctx, grad_MD: Tensor) -> tuple[None, None, None]:
        (indices_M,) = ctx.saved_tensors
        ctx.table.add_gradient(lookup_backward(indices_M, grad_MD, ctx.table.num_rows))
        return None, None, None
