"""ARBModel: encoder of the slot's modality -> trunk -> head; reads like the figure.

Shape letters: B sequences, T positions, D width, F feed-forward width, X = 2F, V symbols.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arbitor.attention.context_attention import ContextAttention
from arbitor.attention.kv_cache import CacheStep, KvLedger, LayerCache
from arbitor.attention.mla import MultiHeadLatentAttention
from arbitor.batch import SlotBatch
from arbitor.encoder.text import WINDOW, TextEncoder
from arbitor.errors import UserError
from arbitor.head.byte import ByteHead
from arbitor.kernel.matmul.quantize import ACTIVATIONS
from arbitor.kernel.state_format import StateFormat
from arbitor.kernel.ternary_scale import TernaryLinear, TernaryWeight
from arbitor.loss import symbol_loss


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model; `width` and `num_layers` are the dial."""

    width: int = 256
    num_layers: int = 4
    enable_attention: bool = False
    enable_vq: bool = False
    enable_graph: bool = False
    enable_moe: bool = False
    enable_output_router: bool = False
    head_width: int = 64
    rotary_width: int = 32
    attention_window: int = 0  # exact positions that one sees; 0 = all: dense attention
    hca_stride: int = 0  # positions before the window that become one; 0 = they are not seen
    activation: str = "fp8"

    @property
    def num_heads(self) -> int:
        return max(1, self.width // self.head_width)

    @property
    def latent_rank(self) -> int:
        return self.width // 2

    @property
    def feed_forward_width(self) -> int:
        """The widest multiple of 64 up to 8/3 of the width, as in SwiGLU models."""
        return max(64, 8 * self.width // 3 // 64 * 64)

    def validate(self) -> None:
        parts = {
            "vq": "VQ bridge",
            "graph": "MoEGraph",
            "moe": "MoE",
            "output_router": "OutputRouter",
        }
        missing = [part for key, part in parts.items() if getattr(self, f"enable_{key}")]
        if missing:
            raise UserError(f"model: not built yet: {', '.join(missing)}; leave them disabled")
        for name in ("width", "num_layers", "head_width", "rotary_width"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}: expected at least 1, got {getattr(self, name)}")
        if self.rotary_width % 2 or self.rotary_width >= self.head_width:
            raise UserError(
                f"model.rotary_width: expected an even number below head_width"
                f" ({self.head_width}), got {self.rotary_width}"
            )
        if self.attention_window < 0 or self.hca_stride < 0:
            raise UserError("model.attention_window, model.hca_stride: expected at least 0")
        if self.hca_stride and not self.attention_window:
            raise UserError(
                "model.hca_stride: what lies before a window is compressed; set"
                " model.attention_window, or hca_stride to 0 for dense attention"
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"model.activation: expected one of {', '.join(ACTIVATIONS)},"
                f" got {self.activation!r}"
            )


class ARBModel(nn.Module):
    """Calling it on a slot gives the slot's loss; gradients stay with the ternary weights."""

    def __init__(self, config: ModelConfig, seed: int, format: StateFormat | None = None):
        super().__init__()
        format = format or StateFormat()
        format.check_activation(config.activation)
        self.config = config
        self.text_encoder = TextEncoder(config.width, config.activation)
        self.trunk = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.byte_head = ByteHead(config.width, config.activation)
        for name, weight in self.ternary_weights():
            weight.initialize(seed, name, format)

    def forward(self, batch: SlotBatch) -> Tensor:
        """Loss of one slot in nats per symbol, float32 scalar."""
        return symbol_loss(self.logits(batch.symbols_BT), batch.targets_BT)

    def logits(self, symbols_BT: Tensor, ledger: KvLedger | None = None) -> Tensor:
        """int64 [B, T] -> bfloat16 [B, T, V]: what comes after each symbol.

        With a ledger the symbols go on where it ends, and it is moved on; it has reserved room.
        """
        before, step, caches = None, None, [None] * len(self.trunk)
        if ledger is not None:
            before, step, caches = ledger.embedded, ledger.step(symbols_BT.shape[1]), ledger.layers
        hidden_BTD = self.text_encoder(symbols_BT, before)
        for block, cache in zip(self.trunk, caches, strict=True):
            hidden_BTD = block(hidden_BTD, cache, step)
        if ledger is not None:
            ledger.position += symbols_BT.shape[1]
        return self.byte_head(hidden_BTD)

    def ledger(self, batch_size: int, dtype: torch.dtype = torch.bfloat16) -> KvLedger:
        """A ledger before the first symbol; dtype is that of the stream."""
        config, device = self.config, next(self.buffers()).device
        caches = [
            block.attention and block.attention.blank_cache(batch_size, dtype, device)
            for block in self.trunk
        ]
        return KvLedger(
            config.attention_window,
            config.hca_stride,
            config.rotary_width // 2,
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(batch_size, WINDOW - 1, config.width, dtype=dtype, device=device),
            caches,
        )

    def pack(self) -> None:
        """Keeps of every weight what generation needs: two bits a weight and its scales."""
        for _, weight in self.ternary_weights():
            weight.pack()

    def ternary_weights(self) -> list[tuple[str, TernaryWeight]]:
        """Every weight of the model with its qualified name, in order of construction."""
        return [(n, m) for n, m in self.named_modules() if isinstance(m, TernaryWeight)]


class Block(nn.Module):
    """One layer of the trunk: context attention (optional), then a gated feed-forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # Two residual branches a layer: their sum keeps the variance of the stream.
        output_gain = (2 * config.num_layers) ** -0.5
        self.attention = (
            _context_attention(config, output_gain) if config.enable_attention else None
        )
        self.feed_forward = FeedForward(config, output_gain)

    def forward(
        self, hidden_BTD: Tensor, cache: LayerCache | None = None, step: CacheStep | None = None
    ) -> Tensor:
        if self.attention is not None:
            hidden_BTD = self.attention(hidden_BTD, cache, step)
        return self.feed_forward(hidden_BTD)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020), D -> 2F -> F -> D, added to its input."""

    def __init__(self, config: ModelConfig, output_gain: float):
        super().__init__()
        width, inner = config.width, config.feed_forward_width
        self.gate_and_up = TernaryLinear(width, 2 * inner, config.activation)
        self.down = TernaryLinear(inner, width, config.activation, gain=output_gain, gated=True)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        gate_and_up_BTX, hidden_BTD = self.gate_and_up.fork(hidden_BTD)
        return hidden_BTD + self.down(gate_and_up_BTX)


def _context_attention(config: ModelConfig, output_gain: float) -> ContextAttention:
    mla = MultiHeadLatentAttention(
        config.width,
        config.num_heads,
        config.head_width,
        config.rotary_width,
        config.latent_rank,
        config.activation,
        output_gain,
    )
    return ContextAttention(mla, config.attention_window, config.hca_stride)
