"""Exported files: bits a weight, the documented bytes, the same logits, errors that help."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from arbitor.checkpoint import save_checkpoint
from arbitor.errors import UserError
from arbitor.export import export, main, open_model
from arbitor.kernel.state_format import StateFormat
from arbitor.main import ARBModel, ModelConfig
from tests.arbitor.content_slots import ALL_PARTS, made_up_slot
from tests.arbitor.float_model import random_symbols

CONFIG = ModelConfig(
    width=64,
    num_layers=2,
    head_width=32,
    rotary_width=16,
    enable_attention=True,
    attention_window=8,
    hca_stride=4,
)
FULL = replace(CONFIG, enable_vq=True, enable_graph=True, enable_moe=True, codebook_size=64)
FORMATS = [StateFormat(), StateFormat(latent_bits=6, group_size=16), StateFormat(rule="bigint")]


def save(folder, format=FORMATS[0], config=CONFIG, step=3, model=None, seed=1):
    """A run's folder with one checkpoint, and the model in it."""
    model = model or ARBModel(config, seed, format)
    values = {"seed": seed, "model": vars(config), "update": vars(format) | {"latent_rate": 3.0}}
    save_checkpoint(
        folder / "checkpoints",
        model.state_dict(),
        step=step,
        config=values,
        plan_fingerprint="",
        conditions={},
    )
    return model


CASES = [*((CONFIG, format) for format in FORMATS), (FULL, FORMATS[0])]


@pytest.mark.parametrize(("config", "format"), CASES, ids=["plain", "groups", "bigint", "full"])
def test_a_run_a_checkpoint_and_a_file_give_the_logits_of_the_trained_model(
    config, format, tmp_path
):
    model = save(tmp_path, format, config)
    main([str(tmp_path), "--out", str(tmp_path / "model.safetensors")])
    symbols = random_symbols(2, 30)
    with torch.no_grad():
        expected = model.logits(symbols)
        for path in ("", "checkpoints/step-00000003", "model.safetensors"):
            opened = open_model(tmp_path / path)
            assert opened.step == 3
            assert torch.equal(opened.model.logits(symbols), expected), path


@torch.no_grad()
def test_losses_of_pictures_have_the_noise_of_the_run(tmp_path):
    model = save(tmp_path, config=ALL_PARTS, seed=7)
    main([str(tmp_path), "--out", str(tmp_path / "model.safetensors")])
    for name in ("", "model.safetensors"):
        opened = open_model(tmp_path / name).model
        for batch in (made_up_slot("image"), made_up_slot("video")):
            assert torch.equal(opened(batch), model(batch)), name


def test_the_bytes_are_those_of_the_documented_format(tmp_path):
    model = save(tmp_path)
    export(open_model(tmp_path), tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(not tensor.is_floating_point() for tensor in tensors.values())
    for name, weight in model.ternary_weights():
        codes = [c + 1 for c in weight.trits().flatten().tolist()]
        codes += [0] * (-len(codes) % 5)
        fives = zip(*[iter(codes)] * 5, strict=True)
        expected = [sum(c * 3**i for i, c in enumerate(five)) for five in fives]
        assert tensors[f"{name}.packed_trits"].tolist() == expected
        assert torch.equal(tensors[f"{name}.log2_scale"], weight.log2_scale)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "arbitor-packed-trits" and metadata["step"] == "3"
    assert json.loads(metadata["config"])["model"]["hca_stride"] == 4


def test_at_most_two_bits_a_weight(tmp_path, capsys):
    save(tmp_path, config=replace(CONFIG, width=256, num_layers=1))
    main([str(tmp_path), "--out", str(tmp_path / "model.safetensors")])
    bits = float(capsys.readouterr().out.split(" bits a weight")[0].split()[-1])
    assert 1.6 < bits < 1.7


def test_what_is_no_model_is_refused_in_one_line(tmp_path):
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    export(open_model(tmp_path), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    with pytest.raises(UserError, match="holds no checkpoint; give a run's folder"):
        open_model(tmp_path / "checkpoints" / "nothing")
    save_file(tensors, path, {"format": "other"})
    with pytest.raises(UserError, match="expected the format arbitor-packed-trits"):
        open_model(path)
    short = {name: x for name, x in tensors.items() if name != "byte_head.projection.packed_trits"}
    save_file(short, path, metadata)
    with pytest.raises(UserError, match="lacks byte_head.projection.packed_trits"):
        open_model(path)
    save_file(tensors | {"stray": torch.zeros(1)}, path, metadata)
    with pytest.raises(UserError, match="not those of its configuration.*stray"):
        open_model(path)
    path.write_bytes(b"text")
    with pytest.raises(UserError, match="not a file of arbitor.export"):
        open_model(path)
    with pytest.raises(UserError, match="cannot be written"):
        export(open_model(tmp_path), tmp_path / "no" / "folder")
