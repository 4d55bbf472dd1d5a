"""Model FLOPs against counts by hand, and against the products that a forward pass really makes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from arbitor.batch import SlotBatch
from arbitor.flops import slot_flops
from arbitor.kernel.backend import set_backend
from arbitor.main import ARBModel, ModelConfig
from arbitor.settings import build

WIDTH, INNER, T = 64, 128, 32
SHAPE = {"width": WIDTH, "num_layers": 2, "head_width": 32, "rotary_width": 16}


def model(**values):
    return ARBModel(build(ModelConfig, SHAPE | values), seed=0)


def test_the_light_text_stack_by_hand():
    sequencer, head = WIDTH * 3 * WIDTH, 288 * WIDTH
    feed_forward = 2 * INNER * WIDTH + INNER * WIDTH
    expected = 6 * (sequencer + 2 * feed_forward + head) * 4 * T
    assert slot_flops(model(), "text", 4, T, 0) == expected


def test_attention_counts_the_keys_that_a_position_sees():
    def of(**values):
        return slot_flops(model(enable_attention=True, **values), "text", 1, T, 0)

    layers_heads_width = 2 * 2 * 32
    dense, window = of(), of(attention_window=8)
    keys = sum(range(1, T + 1))
    kept = sum(min(t + 1, 8) for t in range(T))
    assert dense - window == 12 * layers_heads_width * (keys - kept)
    with_blocks = of(attention_window=8, hca_stride=4)
    assert with_blocks > window, "compressed blocks are keys, and cost weights"


def test_only_what_a_modality_runs_is_counted():
    parts = {f"enable_{name}": True for name in ("image", "audio", "video", "video_head")}
    built = model(**parts, enable_talker_head=True, enable_output_router=True)
    places = 16
    flops = {m: slot_flops(built, m, 1, T, places) for m in ("text", "image", "audio", "video")}
    router = 6 * T * 3 * WIDTH
    assert flops["audio"] - flops["text"] == router + 6 * places * 4096 * WIDTH
    assert flops["image"] == flops["video"] > flops["audio"] - 6 * places * 4096 * WIDTH
    assert flops["text"] == slot_flops(model(), "text", 1, T, 0)


def test_experts_count_as_the_chosen_ones_and_the_loop_as_its_rounds():
    with_experts, without = (
        slot_flops(model(enable_moe=value), "text", 1, T, 0) for value in (True, False)
    )
    inner = WIDTH // 2
    chosen = 2 * (2 * inner * inner)
    shared = 2 * inner * WIDTH + 8 * WIDTH
    assert with_experts - without == 6 * T * 2 * (chosen + shared)


def test_a_forward_pass_makes_a_third_of_them():
    """PyTorch's own count of the products of the reference path, which knows no utilisation."""
    set_backend("torch")
    symbols = torch.arange(2 * (T + 1)).view(2, T + 1).numpy().astype("uint16") % 256
    batch = SlotBatch.from_symbols(symbols, step=0, slot=0, source="text", modality="text")
    built = model()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        built.losses(batch)
    assert counter.get_total_flops() == pytest.approx(slot_flops(built, "text", 2, T, 0) / 3)
