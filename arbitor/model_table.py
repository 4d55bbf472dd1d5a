"""A model as a table: each part, whether it is built and why, its weights and what they take."""

import re
from typing import Any

from torch import nn

from arbitor.kernel.ternary_scale import TernaryWeight

# Label, what the names of its tensors start with, and the configuration key that builds it.
_PARTS = (
    ("text encoder", r"text_encoder\.", None),
    ("image encoder", r"image_encoder\.", "enable_image"),
    ("audio encoder", r"audio_encoder\.", "enable_audio"),
    ("video encoder", r"video_encoder\.", "enable_video"),
    ("VQ bridge", r"vq_bridge\.", "enable_vq"),
    ("trunk: attention", r"trunk\.\d+\.attention\.", "enable_attention"),
    ("trunk: feed-forward", r"trunk\.\d+\.feed_forward\.", None),
    ("MoEGraph", r"graph\.|loop\.block\.read\.", "enable_graph"),
    ("experts", r"loop\.block\.experts\.", "enable_moe"),
    ("loop: injection", r"loop\.decay", "has_loop"),
    ("loop: halting", r"loop\.halt\.", "enable_act"),
    ("byte head", r"byte_head\.", None),
    ("talker head", r"talker_head\.", "enable_talker_head"),
    ("video head", r"video_head\.", "enable_video_head"),
    ("output router", r"output_router\.", "enable_output_router"),
)
_WHY = {"has_loop": "enable_graph or enable_moe"}


def model_table(model: nn.Module, config: Any) -> str:
    """One line a part. Works on a model on the meta device: shapes alone are read."""
    tensors = model.state_dict()
    weights = {n: m.num_weights for n, m in model.named_modules() if isinstance(m, TernaryWeight)}
    lines = [f"{'part':<20} {'built':<40} {'weights':>15} {'bytes':>15} {'bits/weight':>11}"]
    total_weights = total_bytes = 0
    for label, pattern, key in _PARTS:
        num_weights = sum(n for name, n in weights.items() if re.match(pattern, name + "."))
        num_bytes = sum(
            t.numel() * t.element_size() for n, t in tensors.items() if re.match(pattern, n)
        )
        lines.append(_line(label, _built(config, key), num_weights, num_bytes))
        total_weights, total_bytes = total_weights + num_weights, total_bytes + num_bytes
    assert total_weights == sum(weights.values()), "a weight belongs to no part of the table"
    lines.append(_line("all", "", total_weights, total_bytes))
    return "\n".join(lines)


def _built(config: Any, key: str | None) -> str:
    if key is None:
        return "always"
    return ("yes: " if getattr(config, key) else "no: without ") + _WHY.get(key, key)


def _line(label: str, built: str, weights: int, num_bytes: int) -> str:
    bits = f"{8 * num_bytes / weights:.2f}" if weights else "-"
    return f"{label:<20} {built:<40} {weights:>15,} {num_bytes:>15,} {bits:>11}"
