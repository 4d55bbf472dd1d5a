"""Context attention: no leak, no gap, the same over a sequence and from the KV ledger."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from arbitor.attention.hca import BlockPooling, first_blocks
from arbitor.errors import UserError
from arbitor.kernel import backend
from arbitor.kernel.attention.reference import attend, exact_start
from arbitor.main import ARBModel, ModelConfig
from arbitor.settings import build
from tests.arbitor.float_model import make_float, random_symbols

WINDOW, STRIDE = 8, 4
DENSE = ModelConfig(width=64, num_layers=2, head_width=32, rotary_width=16, enable_attention=True)
SLIDING = replace(DENSE, attention_window=WINDOW)
HCA = replace(DENSE, attention_window=WINDOW, hca_stride=STRIDE)
# Context is the window and everything else: what a stride of 1 compresses is not compressed.
EXACT = replace(DENSE, attention_window=WINDOW, hca_stride=1)
CONTEXTS = {"dense": DENSE, "sliding": SLIDING, "hca": HCA, "stride 1": EXACT}
# What stands on the context: in decode it must see what it sees in training. Its choice of codes
# and experts is no continuous function, so the bounds of float32 are not for it.
FULL = replace(HCA, enable_vq=True, enable_graph=True, enable_moe=True, codebook_size=64)
CONFIGS = CONTEXTS | {"full": FULL}
# Shorter than the window, equal, one more, no multiple of the stride, several chunks.
LENGTHS = [1, 5, WINDOW, WINDOW + 1, WINDOW + STRIDE, 30, 47]


@torch.no_grad()
def decode(model, symbols, chunks, dtype=torch.bfloat16):
    """Logits [B, T, V] from the ledger, fed with chunks of these lengths."""
    ledger, parts = model.ledger(symbols.shape[0], dtype), []
    assert sum(chunks) == symbols.shape[1]
    for chunk in symbols.split(chunks, dim=1):
        ledger.reserve(sum(p.shape[1] for p in parts) + chunk.shape[1])
        parts.append(model.byte_head(model.hidden_after(chunk, ledger)))
    assert ledger.position.item() == symbols.shape[1]
    return torch.cat(parts, dim=1)


def in_chunks(length, size):
    return [min(size, length - start) for start in range(0, length, size)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CONTEXTS)
def test_the_ledger_gives_what_the_whole_sequence_gives_in_float32(name, length):
    model = make_float(ARBModel(CONTEXTS[name], seed=1))
    symbols = random_symbols(2, length)
    with torch.no_grad():
        whole = model.logits(symbols)
    assert whole.dtype == torch.float32
    for size in (1, 3, STRIDE, 13, length):
        logits = decode(model, symbols, in_chunks(length, size), torch.float32)
        assert (logits - whole).abs().max() < 1e-5, size


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_ledger_gives_what_the_whole_sequence_gives_in_eight_bits(name):
    model = ARBModel(CONTEXTS[name], seed=1)
    symbols = random_symbols(4, 130)
    with torch.no_grad():
        whole = model.logits(symbols).float()
    for chunks in (in_chunks(130, 1), in_chunks(130, 48)):
        logits = decode(model, symbols, chunks).float()
        assert (logits - whole).norm() / whole.norm() < 1e-2
        assert (logits.argmax(-1) == whole.argmax(-1)).float().mean() >= 0.999


def test_the_full_stack_chooses_the_same_codes_and_experts_from_the_ledger():
    """Where two are as near as the rounding, the other may be chosen: in few positions."""
    model = ARBModel(FULL, seed=1)
    symbols = random_symbols(4, 130)
    with torch.no_grad():
        whole = model.logits(symbols).float()
    difference = (decode(model, symbols, in_chunks(130, 1)).float() - whole).norm(dim=-1)
    other_BT = difference > 0.05 * whole.norm(dim=-1)
    assert other_BT.float().mean() < 0.02


def test_the_kernels_give_the_ledger_what_they_give_the_sequence():
    backend.set_backend("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ARBModel(replace(HCA, num_layers=1, attention_window=4, hca_stride=2), seed=1)
    symbols = random_symbols(2, 13).to(device)
    with torch.no_grad():
        whole = model.to(device).logits(symbols).float()
    model.pack()
    logits = decode(model, symbols, [7, 1, 1, 1, 1, 1, 1]).float()
    assert (logits - whole).norm() / whole.norm() < 1e-2
    assert backend.path_counts()["matmul.forward", "plane"]


def test_a_stride_of_one_is_dense_attention():
    symbols = random_symbols(2, 40)
    dense, exact = (make_float(ARBModel(config, seed=1)) for config in (DENSE, EXACT))
    with torch.no_grad():
        difference = dense.logits(symbols) - exact.logits(symbols)
    assert difference.abs().max() < 1e-5


def test_only_a_window_forgets_what_lies_before_it():
    symbols = random_symbols(1, 60)
    changed = symbols.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 256
    with torch.no_grad():
        last = {
            name: [ARBModel(config, seed=1).logits(s)[0, -1] for s in (symbols, changed)]
            for name, config in CONFIGS.items()
        }
    # Two layers and the sequencer reach 2 * (window - 1) + 2 positions back.
    assert {name: torch.equal(*pair) for name, pair in last.items()} == {
        "dense": False,
        "sliding": True,
        "hca": False,
        "stride 1": False,
        "full": False,
    }


@pytest.mark.parametrize("place", [0, 3, 4, 11, 12, 33])
@pytest.mark.parametrize("name", CONFIGS)
def test_changing_a_position_changes_no_bit_before_it_nor_in_other_rows(name, place):
    model = ARBModel(CONFIGS[name], seed=1)
    symbols = random_symbols(3, 50)
    changed = symbols.clone()
    changed[1, place] = (changed[1, place] + 1) % 256
    with torch.no_grad():
        before, after = model.logits(symbols), model.logits(changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert torch.equal(before[1, :place], after[1, :place])
    assert not torch.equal(before[1, place], after[1, place])


def test_exact_keys_and_blocks_cover_every_position_once():
    t = torch.arange(100)
    start = exact_start(t, WINDOW, STRIDE)
    assert (start % STRIDE == 0).all() and (t - start + 1 >= WINDOW).logical_or(start == 0).all()
    assert (t - start < WINDOW + STRIDE - 1).all()
    assert all(b - a in (0, STRIDE) for a, b in pairwise(start.tolist()))


def test_pooling_weighs_the_positions_of_each_block_alone():
    pooling = BlockPooling(32, 16, STRIDE, "fp8")
    for name in ("gate", "place"):
        getattr(pooling, name).initialize(seed=0, name=name)
    latent, rotary_key = torch.randn(2, 12, 32).bfloat16(), torch.randn(2, 12, 16).bfloat16()
    with torch.no_grad():
        hca_kv_cache, hca_pe_cache = pooling(latent, rotary_key)
        assert hca_kv_cache.shape == (2, 3, 32) and hca_pe_cache.shape == (2, 3, 16)
        low, high = latent.unflatten(1, (3, STRIDE)).aminmax(dim=2)
        assert ((hca_kv_cache >= low) & (hca_kv_cache <= high)).all()
        same = latent[:, :1].expand(-1, STRIDE, -1), rotary_key[:, :1].expand(-1, STRIDE, -1)
        for pooled, one in zip(pooling(*same), same, strict=True):
            # Weights of a softmax sum to 1 within float32, which bfloat16 rounds away.
            assert torch.allclose(pooled, one[:, :1], rtol=2**-8)
        latent[0, 5] += 1
        moved = (pooling(latent, rotary_key)[0] != hca_kv_cache).any(dim=-1)
    assert moved.tolist() == [[False, True, False], [False] * 3]


def test_a_cache_that_has_been_pooled_is_cropped_and_never_strided_again():
    hca_kv_cache, hca_pe_cache = torch.randn(2, 5, 8), torch.randn(2, 7, 4)
    latent, key = first_blocks(hca_kv_cache, hca_pe_cache, 4)
    assert torch.equal(latent, hca_kv_cache[:, :4]) and torch.equal(key, hca_pe_cache[:, :4])


def test_caches_of_too_few_blocks_are_refused_with_their_shapes():
    with pytest.raises(ValueError, match=r"5 .*\(2, 5, 8\) and hca_pe_cache \(2, 3, 4\)"):
        first_blocks(torch.randn(2, 5, 8), torch.randn(2, 3, 4), 5)
    with pytest.raises(ValueError, match=r"\(2, 5, 8\) and hca_pe_cache \(1, 5, 4\)"):
        first_blocks(torch.randn(2, 5, 8), torch.randn(1, 5, 4), 5)


def test_a_model_attends_to_its_pooled_caches_as_the_reference_does(monkeypatch):
    """The oracle's dense masks, on the same heads."""
    from arbitor.attention import context_attention

    symbols = random_symbols(2, 41)
    model = make_float(ARBModel(HCA, seed=1))
    with torch.no_grad():
        logits = model.logits(symbols)
        monkeypatch.setattr(context_attention, "attend", attend)
        assert (model.logits(symbols) - logits).abs().max() < 1e-5


def test_gradients_reach_the_gate_and_the_table_of_places():
    model = ARBModel(HCA, seed=1)
    model.logits(random_symbols(2, 40)).float().square().sum().backward()
    for name, weight in model.ternary_weights():
        assert weight.slot_gradient is not None and weight.slot_gradient.any(), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_window": -1}, "model.attention_window.*at least 0"),
        ({"attention_window": 8}, "model.attention_window: .*set model.enable_attention"),
        ({"hca_stride": 16}, "model.hca_stride: .*set model.attention_window"),
    ],
)
def test_a_context_that_cannot_be_built_names_the_key(values, message):
    with pytest.raises(UserError, match=message):
        build(ModelConfig, values, "model")
