"""What a model must compute for a slot, and what a device could: model FLOP utilisation.

MFU = model FLOPs of a step / (seconds of the step x workers x bfloat16 peak of one device). The
FLOPs of a slot are 6 for each weight of a linear and each position that the weight is applied to,
and in attention 12 x heads x head width for each key that a position sees, in each layer: forward
and backward, nothing recomputed. Not counted: tables, the search for codes, graph messages and the
attention inside the video head. Experts count as the chosen ones, the loop as its fixed rounds.
"""

from arbitor.kernel.ternary_scale import TernaryEmbedding
from arbitor.loop import ROUNDS
from arbitor.main import ARBModel
from arbitor.modality import BYTE_MODALITIES
from arbitor.model_config import ModelConfig
from arbitor.moe import NUM_EXPERTS, TOP_K

# Dense bfloat16, operations a second, by the name that CUDA gives the device. Vendors' figures.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}

_ENCODERS = ("image_encoder.", "audio_encoder.", "video_encoder.")
_OF_MODALITY = ("video_head.noisy_patch.", "video_head.velocity_of_patch.")


def slot_flops(
    model: ARBModel, modality: str, batch_size: int, sequence_length: int, places: int
) -> float:
    """FLOPs of one slot of `batch_size` sequences with at most `places` patches or frames each."""
    positions = batch_size * sequence_length
    linears = sum(
        6 * weight.num_weights * _applications(name, modality, positions, batch_size * places)
        for name, weight in model.ternary_weights()
        if not isinstance(weight, TernaryEmbedding)
    )
    return linears + batch_size * _attention_flops(model.config, sequence_length)


def _applications(name: str, modality: str, positions: int, places: int) -> float:
    """How many positions of a slot a linear is applied to."""
    if name.startswith(_ENCODERS):
        return places if name.startswith(f"{modality}_encoder.") else 0
    if name.startswith("video_head."):
        foreign = name.startswith(_OF_MODALITY) and name.split(".")[2] != modality
        if modality not in ("image", "video") or foreign:
            return 0
        return positions if "context_key_value" in name else places
    if name.startswith("talker_head."):
        return places if modality == "audio" else 0
    if name.startswith("output_router."):
        return 0 if modality in BYTE_MODALITIES else positions
    if name.startswith("loop.block.experts.experts"):
        return positions * ROUNDS * TOP_K / NUM_EXPERTS
    return positions * ROUNDS if name.startswith("loop.") else positions


def _attention_flops(config: ModelConfig, sequence_length: int) -> int:
    """Of one sequence through all layers; a key costs a product with the query and one with it."""
    if not config.enable_attention:
        return 0
    keys = sum(_keys(config, position) for position in range(sequence_length))
    return 12 * config.num_layers * config.num_heads * config.head_width * keys


def _keys(config: ModelConfig, position: int) -> int:
    """Keys that a position sees: exact ones and compressed blocks."""
    window, stride = config.attention_window, config.hca_stride
    before = max(0, position + 1 - window) if window else 0
    if not stride:
        return position + 1 - before
    blocks = before // stride
    return position + 1 - blocks * stride + blocks
