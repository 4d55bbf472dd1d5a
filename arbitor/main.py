"""ARBModel: encoder of the slot's modality -> trunk -> head; reads like the figure.

Shape letters: B sequences, T positions, D width, F feed-forward width, X = 2F, V symbols.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from arbitor.attention.mla import MultiHeadLatentAttention
from arbitor.batch import SlotBatch
from arbitor.encoder.audio import AudioEncoder
from arbitor.encoder.image import ImageEncoder, PatchGrid, to_values
from arbitor.encoder.places import Places
from arbitor.encoder.text import TextEncoder
from arbitor.encoder.video import VideoEncoder
from arbitor.errors import UserError
from arbitor.head.byte import ByteHead
from arbitor.head.router import OutputRouter
from arbitor.head.talker import TalkerHead
from arbitor.head.video import VideoHead
from arbitor.kernel.matmul.quantize import ACTIVATIONS
from arbitor.kernel.state_format import StateFormat
from arbitor.kernel.ternary_scale import TernaryLinear, TernaryWeight
from arbitor.loss import ROUTER_WEIGHT, SlotLosses, symbol_loss, watch_gradient


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
    # Encoders and heads of the other modalities. None: a run builds those that its sources need.
    enable_image: bool | None = None
    enable_audio: bool | None = None
    enable_video: bool | None = None
    enable_talker_head: bool | None = None
    enable_video_head: bool | None = None
    video_head_layers: int = 2
    image: PatchGrid = field(default_factory=PatchGrid)
    video: PatchGrid = field(default_factory=PatchGrid)
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
    def denoised_grids(self) -> dict[str, PatchGrid]:
        """The modalities that the video head speaks."""
        grids = {"image": self.image, "video": self.video}
        return {name: grid for name, grid in grids.items() if getattr(self, f"enable_{name}")}

    def validate(self) -> None:
        parts = {
            "vq": "VQ bridge",
            "graph": "MoEGraph",
            "moe": "MoE",
        }
        missing = [part for key, part in parts.items() if getattr(self, f"enable_{key}")]
        if missing:
            raise UserError(f"model: not built yet: {', '.join(missing)}; leave them disabled")
        for name in ("width", "num_layers", "head_width", "rotary_width", "video_head_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}: expected at least 1, got {getattr(self, name)}")
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
        self.image_encoder = self.audio_encoder = self.video_encoder = None
        if config.enable_image:
            self.image_encoder = ImageEncoder(config.image, config.width, config.activation)
        if config.enable_audio:
            self.audio_encoder = AudioEncoder(config.width)
        if config.enable_video:
            self.video_encoder = VideoEncoder(config.video, config.width, config.activation)
        self.trunk = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.byte_head = ByteHead(config.width, config.activation)
        self.talker_head = self.video_head = self.output_router = None
        if config.enable_talker_head:
            self.talker_head = TalkerHead(config.width, config.activation)
        if config.enable_video_head:
            self.video_head = make_video_head(config, seed)
        if config.enable_output_router:
            self.output_router = OutputRouter(config.width, config.activation)
        for name, weight in self.ternary_weights():
            weight.initialize(seed, name, format)

    def forward(self, batch: SlotBatch) -> Tensor:
        """Loss of one slot, float32 scalar: nats per byte, nats per code, velocity error summed."""
        return self.losses(batch).loss

    def losses(self, batch: SlotBatch) -> SlotLosses:
        """The loss of a slot and the parts that it is the sum of."""
        places = None if batch.content_BPX is None else Places.of(batch)
        hidden_BTD = self.hidden(self.embed(batch, places))
        hidden_BTD, gradient_rms = watch_gradient(hidden_BTD)
        figures = {"trunk_gradient_rms": gradient_rms}
        loss = symbol_loss(self.byte_head(hidden_BTD), batch.targets_BT)
        figures["bytes"] = loss.detach()
        content = None
        if batch.modality == "audio" and self.talker_head is not None:
            content = self.talker_head.loss(hidden_BTD, batch.targets_BT, places)
        if batch.modality in ("image", "video") and self.video_head is not None:
            content = self.video_head.loss(hidden_BTD, batch, places)
        if content is not None:
            loss, figures["content"] = loss + content, content.detach()
        if places is not None and self.output_router is not None:
            router = self.output_router.loss(
                hidden_BTD, batch.symbols_BT, batch.targets_BT, places, self.unit(batch.modality)
            )
            loss = loss + ROUTER_WEIGHT * router.loss
            figures["router"] = router.loss.detach()
            figures["router_accuracy"] = router.accuracy
            figures["router_majority"] = router.majority
        return SlotLosses(loss, figures)

    def embed(self, batch: SlotBatch, places: Places | None) -> Tensor:
        """bfloat16 [B, T, D]: the content at its places, by the encoder of its modality, and the
        symbols elsewhere."""
        text_BTD = self.text_encoder(batch.symbols_BT)
        if batch.modality == "image" and self.image_encoder is not None:
            values_BTX = to_values(places.content())
            return places.fill(text_BTD, self.image_encoder(values_BTX, places.number_BT))
        if batch.modality == "video" and self.video_encoder is not None:
            values_BTX = to_values(places.content())
            return places.fill(text_BTD, self.video_encoder(values_BTX, places.number_BT))
        if batch.modality == "audio" and self.audio_encoder is not None:
            return places.fill(text_BTD, self.audio_encoder(places.content()))
        return text_BTD

    def hidden(self, embedded_BTD: Tensor) -> Tensor:
        """What the heads read, bfloat16 [B, T, D]."""
        for block in self.trunk:
            embedded_BTD = block(embedded_BTD)
        return embedded_BTD

    def logits(self, symbols_BT: Tensor) -> Tensor:
        """int64 [B, T] of text or code -> bfloat16 [B, T, V]: what comes after each symbol."""
        return self.byte_head(self.hidden(self.text_encoder(symbols_BT)))

    def unit(self, modality: str) -> int:
        """Places that are spoken at once: a frame's patches, or one frame of sound."""
        grids = {"image": self.config.image, "video": self.config.video}
        return grids[modality].patches_per_frame if modality in grids else 1

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
            MultiHeadLatentAttention(
                config.width,
                config.num_heads,
                config.head_width,
                config.rotary_width,
                config.latent_rank,
                config.activation,
                output_gain,
            )
            if config.enable_attention
            else None
        )
        self.feed_forward = FeedForward(config, output_gain)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        if self.attention is not None:
            hidden_BTD = self.attention(hidden_BTD)
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


def make_video_head(config: ModelConfig, seed: int) -> VideoHead:
    return VideoHead(
        config.denoised_grids,
        config.width,
        config.video_head_layers,
        config.head_width,
        config.feed_forward_width,
        config.activation,
        seed,
    )
