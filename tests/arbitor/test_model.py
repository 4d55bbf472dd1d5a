"""ARBModel: no leaks, gradients against a float model, what is built."""

import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from arbitor.audit import one_step
from arbitor.batch import NO_TARGET, SlotBatch
from arbitor.errors import UserError
from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryLinear
from arbitor.main import SIZES, ARBModel, ModelConfig, main
from arbitor.model_config import read_model_config
from arbitor.optimizer import UpdateConfig
from arbitor.settings import build, parse_value, read_yaml, write_yaml
from arbitor.vocab import PADDING
from ray_jobs.config import RunConfig, load_run_config
from ray_jobs.construction import with_needed_parts
from tests.arbitor.content_slots import ALL_PARTS

TINY = ModelConfig(width=64, num_layers=2, head_width=32, rotary_width=16)
ATTENTION = ModelConfig(
    width=64, num_layers=2, head_width=32, rotary_width=16, enable_attention=True
)


FULL = replace(ATTENTION, enable_vq=True, enable_graph=True, enable_moe=True, codebook_size=64)
HALTING = replace(FULL, enable_act=True)


@pytest.mark.parametrize("config", [TINY, ATTENTION, FULL, HALTING])
@pytest.mark.parametrize("trained", [False, True])
def test_changing_a_position_changes_nothing_before_it_nor_in_other_rows(config, trained):
    model = ARBModel(config, seed=1)
    if trained:
        one_step(model, UpdateConfig())  # the graph has edges
    symbols = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    changed = symbols.clone()
    changed[1, 25] = (changed[1, 25] + 1) % 256
    with torch.no_grad():
        before, after = model.logits(symbols), model.logits(changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert torch.equal(before[1, :25], after[1, :25])
    assert not torch.equal(before[1, 25], after[1, 25])
    if config.enable_attention:  # further than the window of three sees
        assert not torch.equal(before[1, 35:], after[1, 35:])


def test_linear_gradients_follow_the_straight_through_float_model():
    linear = TernaryLinear(96, 40, "fp8")
    linear.initialize(seed=3, name="linear")
    x = torch.randn(64, 96, requires_grad=True)
    grad = torch.randn(64, 40)
    linear(x).backward(grad.bfloat16())

    weight = (linear.operand().float() * linear.row_scale().unsqueeze(1)).requires_grad_()
    reference_x = x.detach().clone().requires_grad_()
    F.linear(F.rms_norm(reference_x, (96,), eps=1e-6), weight).backward(grad)
    # e4m3 rounds at most 2^-4 of an entry, without bias: over 40 and 64 terms far less remains.
    for ours, exact in ((x.grad, reference_x.grad), (linear.slot_gradient, weight.grad)):
        assert (ours - exact).norm() / exact.norm() < 0.04
        assert F.cosine_similarity(ours.flatten(), exact.flatten(), dim=0) > 0.999


def test_a_weight_that_is_used_twice_sums_its_gradients():
    linear = TernaryLinear(32, 32, "fp8")
    linear.initialize(seed=3, name="linear")
    x = torch.randn(8, 32, requires_grad=True)
    linear(x).sum().backward()
    once = linear.slot_gradient
    linear.slot_gradient = None
    (linear(x) + linear(x)).sum().backward()
    assert torch.equal(linear.slot_gradient, once + once)


def test_what_comes_back_along_a_stream_past_a_linear_joins_its_gradient():
    linear = TernaryLinear(32, 16, "fp8")
    linear.initialize(seed=3, name="linear")
    x = torch.randn(2, 8, 32, requires_grad=True)
    grads = torch.randn(2, 8, 16).bfloat16(), torch.randn(2, 8, 32)
    linear(x).backward(grads[0])
    alone, x.grad = x.grad, None
    y, stream = linear.fork(x)
    assert torch.equal(stream, x)
    torch.autograd.backward([y, stream], grads)
    assert torch.equal(x.grad, alone + grads[1])


def test_embedding_gradient_sums_over_a_symbols_positions():
    table = TernaryEmbedding(5, 16)
    table.initialize(seed=0, name="table")
    indices = torch.tensor([[1, 3, 1], [4, 1, 3]])
    out = table(indices)
    grad = torch.randn(2, 3, 16)
    out.backward(grad.bfloat16())
    expected = torch.zeros(5, 16).index_add_(
        0, indices.flatten(), grad.bfloat16().float().flatten(0, 1)
    )
    assert torch.equal(table.slot_gradient, expected)
    assert torch.equal(out[0, 0], out[0, 2])


def test_padding_is_never_a_target():
    symbols = np.array([[7, 8, PADDING], [9, PADDING, PADDING]], np.uint16)
    batch = SlotBatch.from_symbols(symbols, step=0, slot=0, source="s", modality="text")
    assert batch.targets_BT.tolist() == [[8, NO_TARGET], [NO_TARGET, NO_TARGET]]
    assert batch.symbols_BT.tolist() == [[7, 8], [9, PADDING]]


def test_the_seed_and_the_name_decide_a_weights_start():
    one, two, other = ARBModel(TINY, seed=1), ARBModel(FULL, seed=1), ARBModel(TINY, seed=2)
    shared = set(one.state_dict()) & set(two.state_dict())
    assert {n for n, _ in one.ternary_weights()} <= {n for n, _ in two.ternary_weights()}
    assert all(torch.equal(one.state_dict()[n], two.state_dict()[n]) for n in shared)
    assert not torch.equal(one.byte_head.projection.latent, other.byte_head.projection.latent)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "model.width: expected at least 2"),
        ({"activation": "fp4"}, "model.activation: expected one of fp8, int8, got 'fp4'"),
        ({"rotary_width": 64}, "model.rotary_width: expected an even number below head_width"),
        ({"enable_graph": True}, "model.enable_graph: its nodes are codes of the VQ bridge"),
        ({"enable_act": True, "enable_vq": True}, "model.enable_act: it halts the loop"),
        ({"codebook_size": 1 << 21}, "model.codebook_size: expected at most 1048576, got 2097152"),
    ],
)
def test_a_shape_that_cannot_be_built_names_the_key(values, message):
    with pytest.raises(UserError, match=message):
        build(ModelConfig, values, "model")


@pytest.mark.parametrize("rows", [1, 3])
def test_auxiliary_losses_change_gradients_and_not_the_value(rows):
    model = ARBModel(HALTING, seed=1)
    symbols = np.random.default_rng(0).integers(0, 256, (rows, 33), dtype=np.uint16)
    batch = SlotBatch.from_symbols(symbols, step=0, slot=0, source="s", modality="text")
    loss = model(batch)
    expected = F.cross_entropy(
        model.logits(batch.symbols_BT).float().flatten(0, 1), batch.targets_BT.flatten()
    )
    assert loss == expected
    loss.backward()
    assert model.vq_bridge.codebook.slot_gradient.any() and model.loop.halt.slot_gradient.any()


def test_every_weight_of_the_full_stack_gets_a_gradient():
    model = ARBModel(HALTING, seed=1)
    one_step(model, UpdateConfig())
    updates = {name: int(weight.num_updates) for name, weight in model.ternary_weights()}
    assert set(updates.values()) == {1}, updates


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_weights_of_their_names(size):
    total = main([size]).splitlines()[-1].split()
    weights = int(total[1].replace(",", ""))
    assert total[0] == "all" and 16 < float(total[3]) < 19
    expected = {"smoke": 1.14e6, "30m": 30e6, "150m": 150e6, "1b": 1e9, "3b": 3e9}[size]
    assert weights == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("update", ["", "update: {rule: bigint}", "update: {latent_bits: 6}"])
def test_the_table_names_every_part_and_why_it_is_there(tmp_path, update):
    path = tmp_path / "model.yaml"
    path.write_text(f"model: {{width: 64, num_layers: 2, enable_vq: true}}\n{update}\n")
    table = main([str(path)])
    assert re.search(r"^VQ bridge +yes: enable_vq +270,336 ", table, re.M)
    assert re.search(r"^experts +no: without enable_moe +0 +0 +-$", table, re.M)
    bits = float(table.split()[-1])
    assert 2 < bits < 18


def test_the_table_of_a_run_with_all_modalities_has_their_parts(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(write_yaml({"model": asdict(ALL_PARTS)}))
    for part in ("image encoder", "audio encoder", "video encoder", "talker head", "video head"):
        assert re.search(rf"^{part} +yes: enable_\w+ +[1-9]", main([str(path)]), re.M)


@pytest.mark.parametrize("name", ["pretrain", "smoke"])
def test_the_model_of_a_file_is_the_one_that_a_run_builds(name):
    path = f"configs/{name}.yaml"
    run = with_needed_parts(load_run_config("pretrain", [path], {}, "", in_job=False))
    assert read_model_config(read_yaml(path)) == run.model


@pytest.mark.parametrize(
    ("weight", "model", "expected"),
    [
        (1, {}, {"image", "video_head"}),
        ("[[0, 0], [9, 0.5]]", {"enable_output_router": True}, {"image", "video_head"}),
        ("[[0, 0], [9, 0]]", {"enable_output_router": True}, set()),
        (0, {"enable_image": True}, {"image", "video_head"}),
        (1, {"enable_video_head": False}, {"image"}),
    ],
)
def test_what_a_file_leaves_open_follows_from_its_sources(weight, model, expected):
    source = {"modality": "image", "path": "x", "weight": parse_value(str(weight))}
    text = {"path": "x"}
    values = {"model": model, "data": {"sources": {"a": source, "b": text}}}
    found = read_model_config(values)
    names = ("image", "audio", "video", "talker_head", "video_head")
    assert {name for name in names if getattr(found, f"enable_{name}")} == expected
    assert found == with_needed_parts(build(RunConfig, values | {"name": "x"})).model
    with pytest.raises(UserError, match="enable_audio: is false, but a source of audio"):
        read_model_config(
            {"model": {"enable_audio": False}, "data": {"sources": {"a": {"modality": "audio"}}}}
        )
