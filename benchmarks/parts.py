"""What each part of the text model earns: loss, time and memory with it and without it.

    python -m benchmarks.parts --data FILE --context 1024 --slots 1 --sequences 16 --steps 1500 \\
        --width 512 --layers 8 --device cuda --out benchmarks/results/FILE.json

Same data, seeds and schedule for all (`benchmarks.learning`). The controls: experts against as many
active weights without a choice (two experts, both always on), and the loop against a block of its
own for every round, of equal operations.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import arbitor.main
import arbitor.moe
from arbitor.loop import ROUNDS
from arbitor.model_config import ModelConfig
from arbitor.trunk import LoopBlock
from benchmarks import learning
from benchmarks.record import Record

WINDOW, STRIDE = 128, 16
LATENT_RATE = 3.0
PARTS = {  # beside attention, which all but the first have
    "light": {},
    "attention": {},
    "window": {"attention_window": WINDOW},
    "window + HCA": {"attention_window": WINDOW, "hca_stride": STRIDE},
    "VQ": {"enable_vq": True},
    "VQ + graph": {"enable_vq": True, "enable_graph": True},
    "experts": {"enable_moe": True},
    "two experts, no choice": {"enable_moe": True},
    "experts, a block a round": {"enable_moe": True},
    "full": {"enable_vq": True, "enable_graph": True, "enable_moe": True},
}


class BlockPerRound(nn.Module):
    """The loop's block, with weights of its own in every round."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.blocks = nn.ModuleList(LoopBlock(config) for _ in range(ROUNDS))
        self.calls = 0

    def forward(self, hidden_BTD: Tensor, message_BTC: Tensor | None) -> Tensor:
        block = self.blocks[self.calls % ROUNDS]
        self.calls += 1
        return block(hidden_BTD, message_BTC)


CONTROLS = {
    "two experts, no choice": (arbitor.moe, "NUM_EXPERTS", arbitor.moe.TOP_K),
    "experts, a block a round": (arbitor.main, "LoopBlock", BlockPerRound),
}


def main() -> None:
    options = parse()
    record = Record(options)
    torch.set_num_threads(options.threads)
    train_bytes, held_out = learning.split(options)
    rows = []
    for part in options.parts:
        options.attention = part != "light"
        options.model = [f"{key}={value}" for key, value in PARTS[part].items()]
        for seed in options.seeds:
            with controlled(part):
                run = learning.train_and_judge(
                    "latent", None, LATENT_RATE, seed, options, train_bytes, held_out
                )
            rows.append({"part": part} | run)
    for row in rows:
        print(line_of(row))
    record.write(options.out, rows=rows)


def parse() -> argparse.Namespace:
    parser = learning.parser_of(__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.set_defaults(update=[])
    return parser.parse_args()


@contextmanager
def controlled(part: str) -> Iterator[None]:
    """Builds and trains the models of a control with one name of the program replaced."""
    if part not in CONTROLS:
        yield
        return
    module, name, value = CONTROLS[part]
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def line_of(row: dict[str, Any]) -> str:
    memory = f"{row['peak_memory_gib']:6.2f} GiB" if row["peak_memory_gib"] else ""
    return (
        f"{row['part']:<24} {row['weights']:>11,} weights  seed {row['seed']}"
        f"  {row['validation']:.4f}  {row['seconds']:7.1f} s {memory}"
    )


if __name__ == "__main__":
    main()
