"""ARBModel: encoder -> VQ bridge -> trunk -> MoEGraph loop -> head; reads like the figure.

`python -m arbitor.main CONFIG` prints a configuration's model, part by part; a size such as 150m
prints the full text stack of that size.
Shape letters: B sequences, T positions, D width, F feed-forward width, X = 2F, V symbols, C code
width.
"""

import sys
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from arbitor.attention.mla import MultiHeadLatentAttention
from arbitor.batch import SlotBatch
from arbitor.encoder.text import TextEncoder
from arbitor.errors import UserError
from arbitor.graph import MessageReader, MoEGraph
from arbitor.head.byte import ByteHead
from arbitor.kernel.matmul.quantize import ACTIVATIONS
from arbitor.kernel.state_format import StateFormat
from arbitor.kernel.ternary_scale import TernaryLinear, TernaryWeight
from arbitor.loop import Loop
from arbitor.loss import symbol_loss
from arbitor.model_table import model_table
from arbitor.moe import MixtureOfExperts
from arbitor.settings import build, read_yaml, section
from arbitor.step_counts import StepCounts
from arbitor.vq import CODE_WIDTH, MAX_CODES, VQBridge

# The dial of the sizes, (width, num_layers); the weights are those with attention and all parts.
SIZES = {
    "smoke": (128, 2),
    "30m": (512, 9),
    "150m": (1024, 12),
    "1b": (2048, 20),
    "3b": (3072, 27),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model; `width` and `num_layers` are the dial."""

    width: int = 256
    num_layers: int = 4
    enable_attention: bool = False
    enable_vq: bool = False
    enable_graph: bool = False
    enable_moe: bool = False
    enable_act: bool = False  # rounds of the loop per position instead of two
    enable_output_router: bool = False
    codebook_size: int = 4096
    head_width: int = 64
    rotary_width: int = 32
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

    @property
    def has_loop(self) -> bool:
        return self.enable_graph or self.enable_moe

    @property
    def output_gain(self) -> float:
        """Of what is added to the stream: two branches a layer keep its variance."""
        return (2 * self.num_layers) ** -0.5

    def validate(self) -> None:
        if self.enable_output_router:
            raise UserError("model: not built yet: OutputRouter; leave it disabled")
        for name in ("width", "num_layers", "head_width", "rotary_width", "codebook_size"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}: expected at least 1, got {getattr(self, name)}")
        if self.enable_graph and not self.enable_vq:
            raise UserError(
                "model.enable_graph: its nodes are codes of the VQ bridge; set model.enable_vq"
                " too, or give --no-graph"
            )
        if self.enable_act and not self.has_loop:
            raise UserError(
                "model.enable_act: it halts the loop over graph and experts; set model.enable_moe"
                " or model.enable_graph too"
            )
        if self.codebook_size > MAX_CODES:
            raise UserError(
                f"model.codebook_size: the search is exact and takes at most {MAX_CODES} codes,"
                f" got {self.codebook_size}"
            )
        if self.rotary_width % 2 or self.rotary_width >= self.head_width:
            raise UserError(
                f"model.rotary_width: expected an even number below head_width"
                f" ({self.head_width}), got {self.rotary_width}"
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
        self.vq_bridge = _vq_bridge(config) if config.enable_vq else None
        self.trunk = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.graph = MoEGraph(config.codebook_size, CODE_WIDTH) if config.enable_graph else None
        self.loop = _loop(config) if config.has_loop else None
        self.byte_head = ByteHead(config.width, config.activation)
        for name, weight in self.ternary_weights():
            weight.initialize(seed, name, format)

    def forward(self, batch: SlotBatch) -> Tensor:
        """Loss of one slot in nats per symbol, float32 scalar.

        Auxiliary losses of the parts give their gradients and leave its value alone.
        """
        logits_BTV, auxiliary = self._run(batch.symbols_BT)
        loss = symbol_loss(logits_BTV, batch.targets_BT)
        for part_loss in auxiliary:
            loss = loss + (part_loss - part_loss.detach())
        return loss

    def logits(self, symbols_BT: Tensor) -> Tensor:
        """int64 [B, T] -> bfloat16 [B, T, V]: what comes after each symbol."""
        return self._run(symbols_BT)[0]

    def _run(self, symbols_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the auxiliary losses of the parts that have one."""
        auxiliary, message_BTC = [], None
        hidden_BTD = self.text_encoder(symbols_BT)
        if self.vq_bridge is not None:
            hidden_BTD, codes_BT, vq_loss = self.vq_bridge(hidden_BTD)
            auxiliary.append(vq_loss)
        for block in self.trunk:
            hidden_BTD = block(hidden_BTD)
        if self.graph is not None:
            message_BTC = self.graph(codes_BT)
        if self.loop is not None:
            hidden_BTD, ponder_cost = self.loop(hidden_BTD, message_BTC)
            auxiliary += [] if ponder_cost is None else [ponder_cost]
        return self.byte_head(hidden_BTD), auxiliary

    def step_counts(self) -> list[tuple[str, StepCounts]]:
        """The modules whose integer state moves once a step, with their qualified names."""
        return [(n, m) for n, m in self.named_modules() if isinstance(m, StepCounts)]

    def ternary_weights(self) -> list[tuple[str, TernaryWeight]]:
        """Every weight of the model with its qualified name, in order of construction."""
        return [(n, m) for n, m in self.named_modules() if isinstance(m, TernaryWeight)]


class Block(nn.Module):
    """One layer of the trunk: context attention (optional), then a gated feed-forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = (
            MultiHeadLatentAttention(
                config.width,
                config.num_heads,
                config.head_width,
                config.rotary_width,
                config.latent_rank,
                config.activation,
                config.output_gain,
            )
            if config.enable_attention
            else None
        )
        self.feed_forward = FeedForward(config)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        if self.attention is not None:
            hidden_BTD = self.attention(hidden_BTD)
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


def _vq_bridge(config: ModelConfig) -> VQBridge:
    return VQBridge(config.width, config.codebook_size, config.activation, config.output_gain)


def _loop(config: ModelConfig) -> Loop:
    return Loop(LoopBlock(config), config.width, config.activation, config.enable_act)


def full_text_stack(size: str) -> dict[str, int | bool]:
    """The section `model` of a size of `SIZES` with everything that a text model has."""
    width, num_layers = SIZES[size]
    parts = {f"enable_{part}": True for part in ("attention", "vq", "graph", "moe")}
    return {"width": width, "num_layers": num_layers} | parts


def main(arguments: list[str]) -> str:
    """The table of a configuration's or a size's model; nothing is computed."""
    if len(arguments) != 1:
        raise UserError(
            "expected one CONFIG file or size: python -m arbitor.main CONFIG,"
            f" or one of {', '.join(SIZES)}"
        )
    (named,) = arguments
    values = {"model": full_text_stack(named)} if named in SIZES else read_yaml(named)
    config = build(ModelConfig, section(values, "model"), "model")
    update = section(values, "update")
    format_keys = {field.name for field in fields(StateFormat)} & update.keys()
    format = build(StateFormat, {key: update[key] for key in format_keys}, "update")
    with torch.device("meta"):  # shapes alone
        return model_table(ARBModel(config, 0, format), config)


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
