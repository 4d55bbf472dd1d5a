"""ModelConfig: the shape of the model and which of its parts are built."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from arbitor.encoder.image import PatchGrid
from arbitor.errors import UserError
from arbitor.kernel.matmul.quantize import ACTIVATIONS
from arbitor.settings import build, build_part, section
from arbitor.vocab import CONTENT_SYMBOLS
from arbitor.vq import MAX_CODES

# The dial of the sizes, (width, num_layers); the weights are those with attention and all parts.
SIZES = {
    "smoke": (128, 2),
    "30m": (512, 9),
    "150m": (1024, 12),
    "1b": (2048, 20),
    "3b": (3072, 27),
}

_HEADS = {"talker_head": {"audio"}, "video_head": {"image", "video"}}


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
    # Encoders and heads of the other modalities. None: a run builds those that its sources need.
    enable_image: bool | None = None
    enable_audio: bool | None = None
    enable_video: bool | None = None
    enable_talker_head: bool | None = None
    enable_video_head: bool | None = None
    video_head_layers: int = 2
    image: PatchGrid = field(default_factory=PatchGrid)
    video: PatchGrid = field(default_factory=PatchGrid)
    # Safetensors of a DINOv2 transformer, which stays frozen; "" = an encoder that learns.
    image_encoder: str = ""
    codebook_size: int = 4096
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

    @property
    def has_loop(self) -> bool:
        return self.enable_graph or self.enable_moe

    @property
    def output_gain(self) -> float:
        """Of what is added to the stream: two branches a layer keep its variance."""
        return (2 * self.num_layers) ** -0.5

    @property
    def denoised_grids(self) -> dict[str, PatchGrid]:
        """The modalities that the video head speaks."""
        grids = {"image": self.image, "video": self.video}
        return {name: grid for name, grid in grids.items() if getattr(self, f"enable_{name}")}

    def patches_spoken_at_once(self, modality: str) -> int:
        """Places that a head fills together: a frame's patches, or one frame of sound."""
        grids = {"image": self.image, "video": self.video}
        return grids[modality].patches_per_frame if modality in grids else 1

    def validate(self) -> None:
        smallest = {"width": 2, "num_layers": 1, "head_width": 1, "rotary_width": 1}
        smallest |= {"codebook_size": 1, "video_head_layers": 1}
        for name, minimum in smallest.items():
            if getattr(self, name) < minimum:
                raise UserError(
                    f"model.{name}: expected at least {minimum}, got {getattr(self, name)}"
                )
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
                f"model.codebook_size: expected at most {MAX_CODES}, got {self.codebook_size}"
            )
        if self.rotary_width % 2 or self.rotary_width >= self.head_width:
            raise UserError(
                f"model.rotary_width: expected an even number below head_width"
                f" ({self.head_width}), got {self.rotary_width}"
            )
        if self.enable_video_head and self.width % self.head_width:
            raise UserError(
                f"model.width: the video head needs a multiple of head_width ({self.head_width}),"
                f" got {self.width}"
            )
        if self.attention_window < 0 or self.hca_stride < 0:
            raise UserError("model.attention_window, model.hca_stride: expected at least 0")
        if self.attention_window and not self.enable_attention:
            raise UserError(
                "model.attention_window: there is no attention that it could limit; set"
                " model.enable_attention, or attention_window and hca_stride to 0"
            )
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


@dataclass(frozen=True)
class _Source:
    """What a source says of the model, with the defaults of the data's section."""

    modality: str = "text"
    weight: float | list[list[float]] = 1.0

    @property
    def is_active(self) -> bool:
        points = self.weight if isinstance(self.weight, list) else [[0, self.weight]]
        return any(value > 0 for point in points for value in point[1:])


@dataclass(frozen=True)
class _Frames:
    """What the sections of pictures and films say of the model."""

    size: int
    patch: int = 16
    num_frames: int = 1
    frames_per_second: float = PatchGrid.frames_per_second

    def validate(self) -> None:
        if self.patch < 1:
            raise UserError(f"data: a patch has at least 1 pixel, got {self.patch}")


_FRAMES = {"image": {"size": 224}, "video": {"size": 64, "num_frames": 8}}  # the data's defaults


def read_model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model that a run with these values of a YAML builds; without sources the model's section
    says all."""
    config = build(ModelConfig, section(values, "model"), "model")
    data = section(values, "data")
    given = section(data, "sources")
    if not given:
        return config
    sources = [build_part(_Source, given[name], f"data.sources.{name}") for name in given]
    grids = {}
    for name, defaults in _FRAMES.items():
        frames = build_part(_Frames, defaults | section(data, name), f"data.{name}")
        side = frames.size // frames.patch
        grids[name] = PatchGrid(frames.patch, side, frames.num_frames, frames.frames_per_second)
    return with_decided_parts(config, {s.modality for s in sources if s.is_active}, grids)


def with_decided_parts(
    config: ModelConfig, needed: Collection[str], grids: Mapping[str, PatchGrid]
) -> ModelConfig:
    """The same model with every part decided: encoders and heads, where it leaves them open, by the
    modalities of its sources, and the shapes of pictures and films.

    Raises UserError for a source whose encoder is switched off, and for parts that do not fit.
    """
    parts: dict[str, Any] = {}
    for name in CONTENT_SYMBOLS:
        given = getattr(config, f"enable_{name}")
        if given is False and name in needed:
            raise UserError(
                f"model.enable_{name}: is false, but a source of {name} has a weight above 0; leave"
                f" it out, or set that weight to 0"
            )
        parts[f"enable_{name}"] = name in needed if given is None else given
    built = {name for name in CONTENT_SYMBOLS if parts[f"enable_{name}"]}
    for name, modalities in _HEADS.items():
        wanted = getattr(config, f"enable_{name}") is not False
        parts[f"enable_{name}"] = wanted and bool(modalities & built)
    parts["enable_output_router"] = config.enable_output_router and bool(built)
    shapes = {name: grid for name, grid in grids.items() if name in built}
    config = replace(config, **parts, **shapes)
    config.validate()
    return config
