"""The audit: every persistent tensor listed, none of them float, the bits as designed."""

from dataclasses import replace

import pytest
import torch

from arbitor.audit import audit_command, bits_per_weight, live_tensors, one_step
from arbitor.errors import UserError
from arbitor.kernel.state_format import StateFormat
from arbitor.kernel.ternary_scale import TernaryWeight
from arbitor.main import ARBModel, ModelConfig
from arbitor.optimizer import UpdateConfig
from tests.arbitor.content_slots import ALL_PARTS

CONFIG = """
steps: 3
model:
  width: 64
  num_layers: 1
  head_width: 32
  rotary_width: 16
  enable_attention: true
  attention_window: 4
  hca_stride: 2
  enable_vq: true
  enable_graph: true
  enable_moe: true
  enable_act: true
"""


PARTS = ("attention", "vq", "graph", "moe", "act")
MODEL = ModelConfig(
    width=64,
    num_layers=1,
    head_width=32,
    rotary_width=16,
    attention_window=4,
    hca_stride=2,
    **{f"enable_{part}": True for part in PARTS},
)


@pytest.mark.parametrize("rule", ["latent", "bigint"])
def test_lists_every_tensor_and_finds_no_float(rule, tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG + f"update: {{rule: {rule}}}\n")
    assert audit_command([str(path)]) == 0
    printed = capsys.readouterr().out
    model = ARBModel(MODEL, 0, StateFormat(rule=rule))
    assert all(name in printed for name in model.state_dict())
    assert "weights" in printed and "FLOAT" not in printed


@pytest.mark.parametrize("parts", [(), ("vq", "graph", "moe")], ids=["content", "everything"])
def test_nothing_of_any_modality_is_float(parts):
    config = replace(ALL_PARTS, **{f"enable_{part}": True for part in parts})
    model = ARBModel(config, seed=0)
    optimizer = one_step(model, UpdateConfig(warmup_steps=1))
    tensors = live_tensors(model)
    assert not [tensor for tensor in tensors if tensor.is_float]
    for name, weight in model.ternary_weights():
        assert int(weight.num_updates) == 1, f"{name} was not trained"
    del optimizer


@pytest.mark.parametrize("where", ["buffer", "attribute", "optimizer"])
def test_a_planted_float_is_found(where):
    model = ARBModel(ModelConfig(width=64, num_layers=1), seed=0)
    optimizer = one_step(model, UpdateConfig())
    assert not any(tensor.is_float for tensor in live_tensors(model))
    planted = torch.zeros(3, dtype=torch.bfloat16)
    if where == "buffer":
        model.byte_head.register_buffer("master", planted)
    elif where == "attribute":
        model.byte_head.cache = [planted]
    else:
        optimizer.momentum = {"x": planted}
    del planted
    floats = [tensor for tensor in live_tensors(model) if tensor.is_float]
    assert len(floats) == 1
    assert floats[0].name == ("byte_head.master" if where == "buffer" else "")


@pytest.mark.parametrize(("rows", "cols"), [(256, 256), (1024, 1024), (1376, 256), (288, 4096)])
def test_bits_per_weight_follow_the_formula(rows, cols):
    bits = bits_per_weight(TernaryWeight(rows, cols))
    per_matrix = 16 + 32  # tensor moment and number of updates
    assert bits == pytest.approx(16.125 + 48 / cols + 16 / rows + per_matrix / (rows * cols))
    assert bits <= 16.5


@pytest.mark.parametrize(("rows", "cols"), [(128, 1024), (100, 101)])
@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"momentum_bits": 4}, 8 + 4),
        ({"latent_bits": 6}, 6 + 8),
        ({"momentum_bits": 4, "latent_bits": 6}, 6 + 4),
        ({"group_size": 32}, 8 + 8 + 8 / 32),
        ({"momentum_bits": 4, "latent_bits": 6, "group_size": 16}, 6 + 4 + 8 / 16),
    ],
    ids=str,
)
def test_bits_of_the_state_options(options, bits, rows, cols):
    weight = TernaryWeight(rows, cols)
    weight.initialize(0, "x", StateFormat(**options))
    per_matrix = 16 + 32  # tensor moment and number of updates
    expected = bits + 8 / 64 + 48 / cols + 16 / rows + per_matrix / (rows * cols)
    # Rows of packed planes and of groups end with whole bytes: at most four bytes a row unused.
    unused = 4 * 8 / cols if cols % 64 else 0
    assert expected - 1e-9 <= bits_per_weight(weight) <= expected + unused + 1e-9


@pytest.mark.parametrize(("group_size", "bits_of_groups"), [(0, 8), (32, 2), (256, 0.25)])
def test_bits_of_the_bigint_rule(group_size, bits_of_groups):
    weight = TernaryWeight(128, 1024)
    weight.initialize(0, "x", StateFormat(rule="bigint", group_size=group_size))
    per_matrix = 64  # step counter
    expected = 2 + bits_of_groups + 16 / 1024 + per_matrix / (128 * 1024)
    assert bits_per_weight(weight) == pytest.approx(expected)


def test_the_command_needs_one_file():
    with pytest.raises(UserError, match="expected one CONFIG file"):
        audit_command([])
