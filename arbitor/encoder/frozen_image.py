"""A pretrained vision transformer in the place of the image encoder: frozen, its weights integers.

The file is safetensors with DINOv2's names (Oquab et al. 2023): `patch_embed.proj`, `cls_token`,
`pos_embed`, `norm` and, of `blocks.<i>`, those of OF_BLOCK, `ls1.gamma` and `ls2.gamma`.
Its patches see one another in both directions, so the whole picture is known at each of its places;
nothing in a picture is predicted from states at its places.
Shape letters: B pictures, P patches, X values of a patch, E width of the transformer, S = P + 1,
N heads, H head width, D width.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from arbitor.encoder.image import PatchGrid, to_values
from arbitor.errors import UserError
from arbitor.kernel.ternary_scale import TernaryLinear

HEAD_WIDTH = 64
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels it was trained on
OF_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
UNUSED = {"mask_token"}


class FrozenWeight(nn.Module):
    """Integers times a power of two a row, int8 for a matrix, which bfloat16 holds exactly, and
    int16 for what is added or multiplied elementwise."""

    def __init__(self, weight: Tensor):
        super().__init__()
        dtype = torch.int8 if weight.ndim == 2 else torch.int16
        limit = torch.iinfo(dtype).max
        rows = weight.float().reshape(-1, weight.shape[-1])
        largest = rows.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-60)
        exponent = torch.frexp(largest / limit).exponent  # 2^exponent is at least the argument
        codes = torch.ldexp(rows, -exponent).round().to(dtype)
        self.register_buffer("codes", codes.view_as(weight))
        self.register_buffer("exponent", exponent.view(*weight.shape[:-1], 1).to(torch.int8))

    def forward(self) -> Tensor:
        return torch.ldexp(self.codes.float(), self.exponent.int())


class FrozenImageEncoder(nn.Module):
    """Whole pictures, uint8 [B, P, X] -> bfloat16 [B, P, D]; only the last projection learns."""

    def __init__(self, weights: Mapping[str, Tensor], width: int, activation: str):
        super().__init__()
        self.num_blocks = _num_blocks(weights)
        self.weights = nn.ModuleDict(
            {_key(name): FrozenWeight(weight) for name, weight in weights.items()}
        )
        self.projection = TernaryLinear(weights["cls_token"].shape[-1], width, activation)

    def forward(self, content_BPX: Tensor) -> Tensor:
        return self.project(self.features(content_BPX))

    def project(self, features: Tensor) -> Tensor:
        """bfloat16 [..., E] -> [..., D]."""
        # What is frozen carries no gradient: without this autograd would not call the linear's.
        return self.projection(features.detach().requires_grad_(torch.is_grad_enabled()))

    @torch.no_grad()
    def features(self, content_BPX: Tensor) -> Tensor:
        """bfloat16 [B, P, E]: what the transformer says of each patch."""
        values_BPX = to_values(content_BPX).to(torch.bfloat16)
        patches_BPE = self._linear("patch_embed.proj", values_BPX).float()
        first_B1E = self._weight("cls_token").expand(len(patches_BPE), 1, -1)
        stream_BSE = torch.cat([first_B1E, patches_BPE], dim=1) + self._weight("pos_embed")
        for number in range(self.num_blocks):
            name = f"blocks.{number}"
            mixed = self._attend(name, self._norm(f"{name}.norm1", stream_BSE))
            stream_BSE = stream_BSE + mixed * self._weight(f"{name}.ls1.gamma")
            inner = self._linear(f"{name}.mlp.fc1", self._norm(f"{name}.norm2", stream_BSE))
            further = self._linear(f"{name}.mlp.fc2", F.gelu(inner))
            stream_BSE = stream_BSE + further * self._weight(f"{name}.ls2.gamma")
        return self._norm("norm", stream_BSE)[:, 1:]

    def _attend(self, name: str, x_BSE: Tensor) -> Tensor:
        heads = self._linear(f"{name}.attn.qkv", x_BSE).unflatten(-1, (3, -1, HEAD_WIDTH))
        query_BNSH, key_BNSH, value_BNSH = heads.permute(2, 0, 3, 1, 4)
        mixed_BNSH = F.scaled_dot_product_attention(query_BNSH, key_BNSH, value_BNSH)
        return self._linear(f"{name}.attn.proj", mixed_BNSH.transpose(1, 2).flatten(2))

    def _norm(self, name: str, x_BSE: Tensor) -> Tensor:
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return F.layer_norm(x_BSE, x_BSE.shape[-1:], weight, bias, eps=1e-6).to(torch.bfloat16)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return F.linear(x, weight.to(torch.bfloat16), bias.to(torch.bfloat16))

    def _weight(self, name: str) -> Tensor:
        return self.weights[_key(name)]()


def shapes_of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Of a saved model whose frozen encoder has this name: weights without values, on the meta
    device, in the place of the file that it was made from; none of a model without one."""
    found = ((re.fullmatch(rf"{name}\.weights\.(\w+)\.codes", key), key) for key in tensors)
    return {m[1]: torch.empty_like(tensors[key], device="meta") for m, key in found if m}


def read_transformer(path: Path, grid: PatchGrid) -> dict[str, Tensor]:
    """The file's tensors, the first projection made for values of -1..1 in the order of ours."""
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model.image_encoder: {path} cannot be read as safetensors ({error}); give the file of"
            " a DINOv2 vision transformer"
        ) from error
    _check_names(path, weights)
    kernel_E3YX = weights.pop("patch_embed.proj.weight").float()
    patch, places = kernel_E3YX.shape[-1], weights["pos_embed"].shape[1] - 1
    if (patch, places) != (grid.patch, grid.patches_per_frame):
        raise UserError(
            f"model.image_encoder: {path} takes {places} patches of {patch} pixels; set"
            f" data.image.patch to {patch} and data.image.size to {round(places**0.5) * patch},"
            f" not {grid.side * grid.patch}"
        )
    if weights["cls_token"].shape[-1] % HEAD_WIDTH:
        raise UserError(
            f"model.image_encoder: {path} is {weights['cls_token'].shape[-1]} wide; expected a"
            f" multiple of {HEAD_WIDTH}, the width of its heads"
        )
    mean, deviation = (torch.tensor(x, device="cpu").view(3, 1, 1) for x in (MEAN, DEVIATION))
    offset_E = (kernel_E3YX * (0.5 - mean) / deviation).sum(dim=(1, 2, 3))
    weights["patch_embed.proj.bias"] = weights["patch_embed.proj.bias"].float() + offset_E
    scaled = kernel_E3YX / (2 * deviation)
    weights["patch_embed.proj.weight"] = scaled.permute(0, 2, 3, 1).flatten(1)
    return {name: weight for name, weight in weights.items() if name not in UNUSED}


def _check_names(path: Path, weights: dict[str, Tensor]) -> None:
    layers = ["patch_embed.proj", "norm"]
    expected = {"cls_token", "pos_embed"}
    for number in range(max(1, _num_blocks(weights))):
        layers += [f"blocks.{number}.{layer}" for layer in OF_BLOCK]
        expected |= {f"blocks.{number}.{scale}.gamma" for scale in ("ls1", "ls2")}
    expected |= {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    for name in sorted(expected - weights.keys()):
        raise UserError(
            f"model.image_encoder: {path} lacks {name}; expected a DINOv2 vision transformer"
        )
    for name in sorted(weights.keys() - expected - UNUSED):
        raise UserError(
            f"model.image_encoder: {path} has {name}, which a DINOv2 vision transformer has not"
        )


def _num_blocks(names: Iterable[str]) -> int:
    numbers = (int(name.split("_")[1]) for name in map(_key, names) if name.startswith("blocks_"))
    return max(numbers, default=-1) + 1


def _key(name: str) -> str:
    return name.replace(".", "_")
