"""ModelConfig: the shape of the model and which of its parts are built."""

from dataclasses import dataclass, field

from arbitor.encoder.image import PatchGrid
from arbitor.errors import UserError
from arbitor.kernel.matmul.quantize import ACTIVATIONS
from arbitor.vq import MAX_CODES

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
        smallest = ("width", "num_layers", "head_width", "rotary_width", "codebook_size")
        for name in (*smallest, "video_head_layers"):
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
