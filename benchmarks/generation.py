"""Bytes per second of generation: packed ternary weights against bfloat16 ones of the same shapes.

Both go through the same ledger and the same recorded step; the bfloat16 model has plain matmuls in
the place of quantizers and planes. Weights are random: only time is measured.

    python -m benchmarks.generation --sizes 1024x12 2048x20 --batch 1 16
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.decoder import Decoder
from arbitor.kernel.backend import set_backend
from arbitor.kernel.swiglu.reference import swiglu_forward
from arbitor.kernel.ternary_scale import TernaryLinear
from arbitor.main import ARBModel, ModelConfig
from arbitor.profiling import profiler, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1024x12", "2048x20"], help="width x layers")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512, help="bytes")
    parser.add_argument("--bytes", type=int, default=256)
    parser.add_argument("--profile", action="store_true", help="print where a step goes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    set_backend("auto")
    rows = []
    for size in options.sizes:
        width, layers = map(int, size.split("x"))
        config = ModelConfig(
            width,
            layers,
            enable_attention=True,
            attention_window=options.window,
            hca_stride=options.stride,
        )
        for kind in ("ternary", "bfloat16"):
            model = build(config, kind, options.device)
            rows += [measure(model, size, kind, batch, options) for batch in options.batch]
            del model
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def build(config: ModelConfig, kind: str, device: str) -> ARBModel:
    with torch.device(device):
        model = ARBModel(config, seed=0)
    if kind == "ternary":
        model.pack()
    else:
        make_bfloat16(model)
    return model


def make_bfloat16(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, TernaryLinear):
            setattr(module, name, BFloat16Linear(child))
        else:
            make_bfloat16(child)


class BFloat16Linear(nn.Module):
    def __init__(self, linear: TernaryLinear):
        super().__init__()
        self.activation, self.gated = linear.activation, linear.gated
        weight = linear.operand().float() * linear.row_scale().unsqueeze(1)
        self.register_buffer("weight", weight.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        x = swiglu_forward(x).to(x.dtype) if self.gated else x
        return F.linear(F.rms_norm(x, x.shape[-1:], eps=1e-6), self.weight)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), x


def measure(model: ARBModel, size: str, kind: str, batch: int, options) -> dict:
    decoder = Decoder(model, batch)
    started = time.perf_counter()
    logits = decoder.feed(torch.randint(0, 256, (batch, options.prompt)))
    prompt_seconds = time.perf_counter() - started
    decoder.ledger.reserve(options.prompt + options.bytes + 2 * options.stride + 1)
    for _ in range(2 * options.stride):  # compiles and records both kinds of step
        logits = decoder.feed(logits[:, :256].argmax(dim=-1, keepdim=True))
    if options.profile:
        with profiler() as profile:
            decoder.feed(logits[:, :256].argmax(dim=-1, keepdim=True))
        print(table(profile), flush=True)
    started = time.perf_counter()
    for _ in range(options.bytes):
        logits = decoder.feed(logits[:, :256].argmax(dim=-1, keepdim=True))
    seconds = time.perf_counter() - started
    row = {
        "size": size,
        "weights": kind,
        "batch": batch,
        "bytes_per_s": round(batch * options.bytes / seconds, 1),
        "ms_per_step": round(1e3 * seconds / options.bytes, 3),
        "prompt_s": round(prompt_seconds, 3),
    }
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
