"""Bytes per second of generation: packed ternary weights against bfloat16 ones of the same shapes.

Both go through the same ledger and the same recorded step; the bfloat16 model has plain matmuls in
the place of quantizers and planes, on a GPU compiled with the gate and the norm before them.
Weights are random: only time is measured, once everything has been compiled.

    python -m benchmarks.generation --sizes 1024x12 2048x20 --batch 1 16
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.decoder import Decoder
from arbitor.kernel.backend import set_backend
from arbitor.kernel.swiglu.reference import swiglu_forward
from arbitor.kernel.ternary_scale import TernaryLinear
from arbitor.main import ARBModel, ModelConfig
from arbitor.profiling import profiler, table
from benchmarks.record import Record, out_path
from benchmarks.timing import compiled


def main() -> None:
    options = parse()
    record, rows = Record(options), []
    set_backend("auto")
    # A graph for each shape of weight and number of positions; an eager one would be no peer.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for size in options.sizes:
            for kind in ("ternary", "bfloat16"):
                model = build(size, kind, options)
                rows += [measure(model, size, kind, batch, options) for batch in options.batch]
                del model
    record.write(options.out, rows=rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1024x12", "2048x20"], help="width x layers")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512, help="bytes")
    parser.add_argument("--bytes", type=int, default=256)
    parser.add_argument("--profile", action="store_true", help="print where a step goes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=out_path)
    return parser.parse_args()


def build(size: str, kind: str, options: argparse.Namespace) -> ARBModel:
    width, layers = map(int, size.split("x"))
    config = ModelConfig(
        width,
        layers,
        enable_attention=True,
        attention_window=options.window,
        hca_stride=options.stride,
    )
    with torch.device(options.device):
        model = ARBModel(config, seed=0)
    if kind == "ternary":
        model.pack()
    else:
        torch.compiler.reset()  # what the model before it was compiled for
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
        run = compiled(plain_linear) if x.is_cuda else plain_linear
        return run(x, self.weight, self.gated)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), x


def plain_linear(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    x = swiglu_forward(x).to(x.dtype) if gated else x
    return F.linear(F.rms_norm(x, x.shape[-1:], eps=1e-6), weight)


def measure(model: ARBModel, size: str, kind: str, batch: int, options) -> dict:
    prompt = torch.randint(0, 256, (batch, options.prompt))
    Decoder(model, batch).feed(prompt)  # compiles
    decoder = Decoder(model, batch)
    started = time.perf_counter()
    logits = decoder.feed(prompt)
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
