"""The frozen image encoder: a small transformer of DINOv2's layout against one in plain floats."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from arbitor.audit import live_tensors, one_step
from arbitor.content import describe
from arbitor.decoder import Sampling
from arbitor.encoder.frozen_image import FrozenImageEncoder, FrozenWeight, read_transformer
from arbitor.encoder.image import PatchGrid
from arbitor.encoder.places import Places
from arbitor.errors import UserError
from arbitor.export import main, open_model
from arbitor.main import ARBModel
from arbitor.media.patches import from_patches
from arbitor.optimizer import UpdateConfig
from tests.arbitor.content_slots import ALL_PARTS, IMAGE, made_up_slot
from tests.arbitor.test_export import save

WIDTH, BLOCKS, INNER = 128, 2, 192  # two heads


def stand_in(grid=IMAGE):
    """Tensors of a transformer for the pictures of `grid`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0, around=0.0):
        return around + scale * torch.randn(shape, generator=generator)

    def layer(name, outputs, inputs):
        weight = normal(outputs, inputs, scale=inputs**-0.5)
        return {f"{name}.weight": weight, f"{name}.bias": normal(outputs, scale=0.1)}

    def norm(name):
        weight, bias = normal(WIDTH, scale=0.2, around=1.0), normal(WIDTH, scale=0.1)
        return {f"{name}.weight": weight, f"{name}.bias": bias}

    values = 3 * grid.patch**2
    tensors = layer("patch_embed.proj", WIDTH, values) | norm("norm")
    kernel = tensors["patch_embed.proj.weight"]
    tensors["patch_embed.proj.weight"] = kernel.view(WIDTH, 3, grid.patch, grid.patch)
    tensors["cls_token"] = normal(1, 1, WIDTH)
    tensors["mask_token"] = normal(1, WIDTH)
    tensors["pos_embed"] = normal(1, 1 + grid.patches_per_frame, WIDTH)
    for i in range(BLOCKS):
        tensors |= norm(f"blocks.{i}.norm1") | norm(f"blocks.{i}.norm2")
        tensors |= layer(f"blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH)
        tensors |= layer(f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        tensors |= layer(f"blocks.{i}.mlp.fc1", INNER, WIDTH)
        tensors |= layer(f"blocks.{i}.mlp.fc2", WIDTH, INNER)
        tensors[f"blocks.{i}.ls1.gamma"] = normal(WIDTH, scale=0.1, around=0.5)
        tensors[f"blocks.{i}.ls2.gamma"] = normal(WIDTH, scale=0.1, around=0.5)
    return tensors


def plain_features(w, pixels_BHW3):
    """What DINOv2 computes, in float32, from pixels 0..255."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((pixels_BHW3 / 255 - mean) / deviation).permute(0, 3, 1, 2)
    kernel = w["patch_embed.proj.weight"]
    x = F.conv2d(x, kernel, w["patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = torch.cat([w["cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + w["pos_embed"]

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(BLOCKS):
        query, key, value = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)).chunk(3, 2)
        heads = (y.unflatten(2, (2, 64)).transpose(1, 2) for y in (query, key, value))
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + w[f"blocks.{i}.ls1.gamma"] * linear(f"blocks.{i}.attn.proj", mixed)
        inner = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)))
        x = x + w[f"blocks.{i}.ls2.gamma"] * linear(f"blocks.{i}.mlp.fc2", inner)
    return norm("norm", x)[:, 1:]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "dino.safetensors"
    save_file(stand_in(), path)
    return path


def test_features_are_those_of_the_float_transformer(path):
    content = made_up_slot("image").content_BPX
    pixels = torch.from_numpy(from_patches(content.numpy(), IMAGE.patch)).float()
    expected = plain_features(stand_in(), pixels)
    found = FrozenImageEncoder(read_transformer(path, IMAGE), 64, "fp8").features(content)
    # Weights keep 6.5 bits or more, activations the 8 of bfloat16: 2^-7 a product, over some ten.
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


def test_a_frozen_weight_keeps_its_bits():
    weight = torch.tensor([[1.0, -0.3, 0.01], [1e-4, 3e-5, 0.0], [0.0, 0.0, 0.0]])
    held = FrozenWeight(weight)
    assert held.codes.dtype == torch.int8 and held.exponent.dtype == torch.int8
    largest = weight.abs().amax(1, keepdim=True)
    assert ((held() - weight).abs() <= largest / 127).all()
    assert torch.equal(held().to(torch.bfloat16).float(), held())


def test_only_the_projection_learns_and_nothing_persists_as_float(path):
    model = ARBModel(replace(ALL_PARTS, image_encoder=str(path)), seed=0)
    before = {n: b.clone() for n, b in model.image_encoder.weights.named_buffers()}
    latents = model.image_encoder.projection.latents().clone()
    optimizer = one_step(model, UpdateConfig(warmup_steps=1))
    assert all(torch.equal(b, before[n]) for n, b in model.image_encoder.weights.named_buffers())
    assert not torch.equal(latents, model.image_encoder.projection.latents())
    assert not [tensor for tensor in live_tensors(model) if tensor.is_float]
    del optimizer


@torch.no_grad()
def test_a_picture_changes_no_state_before_it_nor_in_other_rows(path):
    model = ARBModel(replace(ALL_PARTS, image_encoder=str(path)), seed=0)
    batch = made_up_slot("image")
    content = batch.content_BPX.clone()
    content[1, 3] ^= 255
    other = replace(batch, content_BPX=content)
    before, after = (model.hidden(model.embed(b, Places.of(b))) for b in (batch, other))
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    first = int(Places.of(batch).first_position()[1])
    assert torch.equal(before[1, :first], after[1, :first])
    assert not torch.equal(before[1, first], after[1, first]), "its first place knows it whole"


def test_a_checkpoint_and_a_file_hold_all_of_it(tmp_path):
    path = tmp_path / "dino.safetensors"
    save_file(stand_in(), path)
    trained = save(tmp_path, config=replace(ALL_PARTS, image_encoder=str(path)))
    path.unlink()
    main([str(tmp_path), "--out", str(tmp_path / "model.safetensors")])
    batch = made_up_slot("image")
    expected = trained.image_encoder(batch.content_BPX)
    for name in ("", "model.safetensors"):
        model = open_model(tmp_path / name).model
        assert torch.equal(model.image_encoder(batch.content_BPX), expected)
        content = batch.content_BPX.numpy()
        assert len(describe(model, "image", content, 4, Sampling(temperature=0))) == 3


@pytest.mark.parametrize("name", ["blocks.1.attn.qkv.bias", "blocks.0.ls2.gamma", "pos_embed"])
def test_a_missing_tensor_is_named(name, tmp_path):
    tensors = stand_in()
    del tensors[name]
    save_file(tensors, tmp_path / "x.safetensors")
    message = f"model.image_encoder: .*x.safetensors lacks {name}; expected a DINOv2"
    with pytest.raises(UserError, match=message):
        read_transformer(tmp_path / "x.safetensors", IMAGE)


def test_a_tensor_that_would_be_left_out_is_named(tmp_path):
    tensors = stand_in() | {"register_tokens": torch.zeros(1, 4, WIDTH)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="has register_tokens, which a DINOv2"):
        read_transformer(tmp_path / "x.safetensors", IMAGE)


def test_pictures_of_another_size_and_a_missing_file_are_refused(path, tmp_path):
    with pytest.raises(UserError, match="takes 4 patches of 4 pixels; set data.image.patch to 4"):
        read_transformer(path, PatchGrid(patch=4, side=3))
    with pytest.raises(UserError, match="no.safetensors cannot be read as safetensors"):
        read_transformer(tmp_path / "no.safetensors", IMAGE)
