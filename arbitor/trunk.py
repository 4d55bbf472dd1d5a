"""The layers of the trunk, and what a round of the loop after it adds.

Shape letters: B sequences, T positions, D width, F feed-forward width, X = 2F, C code width.
"""

from torch import Tensor, nn

from arbitor.attention.context_attention import ContextAttention
from arbitor.attention.kv_cache import CacheStep, LayerCache
from arbitor.attention.mla import MultiHeadLatentAttention
from arbitor.graph import MessageReader
from arbitor.kernel.ternary_scale import TernaryLinear
from arbitor.model_config import ModelConfig
from arbitor.moe import MixtureOfExperts
from arbitor.vq import CODE_WIDTH


class Block(nn.Module):
    """One layer of the trunk: context attention (optional), then a gated feed-forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = _context_attention(config) if config.enable_attention else None
        self.feed_forward = FeedForward(config)

    def forward(
        self, hidden_BTD: Tensor, cache: LayerCache | None = None, step: CacheStep | None = None
    ) -> Tensor:
        if self.attention is not None:
            hidden_BTD = self.attention(hidden_BTD, cache, step)
        return self.feed_forward(hidden_BTD)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020), D -> 2F -> F -> D, added to its input."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner = config.width, config.feed_forward_width
        self.gate_and_up = TernaryLinear(width, 2 * inner, config.activation)
        self.down = TernaryLinear(
            inner, width, config.activation, gain=config.output_gain, gated=True
        )

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        gate_and_up_BTX, hidden_BTD = self.gate_and_up.fork(hidden_BTD)
        return hidden_BTD + self.down(gate_and_up_BTX)


def _context_attention(config: ModelConfig) -> ContextAttention:
    mla = MultiHeadLatentAttention(
        config.width,
        config.num_heads,
        config.head_width,
        config.rotary_width,
        config.latent_rank,
        config.activation,
        config.output_gain,
    )
    return ContextAttention(mla, config.attention_window, config.hca_stride)


class LoopBlock(nn.Module):
    """What one round of the loop adds: what the position reads of its message, then experts."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        shape = (config.activation, config.output_gain)
        code_width = CODE_WIDTH if config.enable_graph else 0
        self.read = MessageReader(config.width, code_width, *shape) if code_width else None
        self.experts = (
            MixtureOfExperts(config.width, code_width, *shape) if config.enable_moe else None
        )

    def forward(self, hidden_BTD: Tensor, message_BTC: Tensor | None) -> Tensor:
        added_BTD = 0
        if self.read is not None:
            added_BTD = self.read(hidden_BTD, message_BTC)
        if self.experts is not None:
            added_BTD = added_BTD + self.experts(hidden_BTD + added_BTD, message_BTC)
        return added_BTD
