"""Training steps of a 1b-shape stack on one GPU: ours against the same model in bfloat16.

    python -m benchmarks.train_step --positions 16384 --out benchmarks/results/FILE.json

Synthetic slots, no Ray, one slot a step. Ours runs with its deterministic settings; `adamw` is the
same architecture with float32 weights, bfloat16 matmuls, torch.compile and fused AdamW; `ste` is
that with BitNet's straight-through weights. Ours replays CUDA graphs where they launch their
kernels one by one, which shows in small slots; torch.compile's "reduce-overhead" was not tried.
Model FLOP utilisation is (6 * weights in matmuls + 6 * layers * heads * head width * T) *
positions / seconds / the bfloat16 rate measured in the run: forward and backward of the matmuls and
of causal attention, recomputation not counted.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from arbitor.batch import SlotBatch
from arbitor.kernel.backend import clear_path_counts, path_counts, set_backend
from arbitor.kernel.ternary_scale import TernaryEmbedding
from arbitor.main import ARBModel, ModelConfig
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.profiling import profiler, table
from arbitor.trainer import SlotRunner, train_step
from benchmarks.float_baseline import float_model, make_adamw
from benchmarks.record import Record, out_path
from benchmarks.timing import measure_ceilings

WARMUP_STEPS = 3


def main() -> None:
    options = parse()
    record = Record(options)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config = ModelConfig(
        width=options.width,
        num_layers=options.layers,
        enable_attention=True,
        head_width=options.head_width,
    )
    peak = measure_ceilings().bfloat16
    rows = []
    for rule in options.rules:
        for positions in options.positions:
            rows.append(time_rule(rule, config, positions, options, peak))
            print(json.dumps(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    record.write(options.out, bfloat16_peak=peak, model=asdict(config), rows=rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rules = ["latent", "adamw", "ste"]
    parser.add_argument("--rules", nargs="+", default=rules, choices=rules)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048, help="positions of a sequence")
    parser.add_argument("--positions", nargs="+", type=int, default=[16384, 4096], help="a slot's")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--out", type=out_path)
    return parser.parse_args()


def time_rule(
    rule: str, config: ModelConfig, positions: int, options: argparse.Namespace, peak: float
) -> dict[str, Any]:
    """Positions per second, peak memory and utilisation of one rule at one slot size."""
    torch.use_deterministic_algorithms(rule == "latent")
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.reset_peak_memory_stats()
    clear_path_counts()
    batches = [make_batch(i, positions, options.length) for i in range(4)]
    step, weights = prepare(rule, config)
    for i in range(WARMUP_STEPS):
        step(i, batches[i % 4])
    torch.cuda.synchronize()
    started = time.perf_counter()
    for i in range(options.steps):
        step(WARMUP_STEPS + i, batches[i % 4])
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / options.steps
    if options.profile:
        with profiler() as profile:
            step(WARMUP_STEPS + options.steps, batches[0])
        print(table(profile), flush=True)
    attention = 6 * config.num_layers * config.num_heads * config.head_width * options.length
    return {
        "rule": rule,
        "positions": positions,
        "ms": round(1e3 * seconds, 2),
        "positions_per_s": round(positions / seconds),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "mfu": round((6 * weights + attention) * positions / seconds / peak, 3),
        "paths": {"/".join(path): count for path, count in path_counts().items()},
    }


def make_batch(number: int, positions: int, length: int) -> SlotBatch:
    shape = (positions // length, length + 1)
    symbols = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint16)
    return SlotBatch.from_symbols(
        symbols, step=0, slot=0, source="made-up", modality="text", device="cuda"
    )


def prepare(rule: str, config: ModelConfig) -> tuple[Callable[[int, SlotBatch], Any], int]:
    """A function that trains one step, and the number of weights in matmuls."""
    # torch.compile makes its own kernels from the plain operations.
    set_backend("triton" if rule == "latent" else "torch")
    if rule == "latent":
        with torch.device("cuda"):
            model = ARBModel(config, seed=0)
        optimizer = TernaryOptimizer(
            model, UpdateConfig(), total_steps=1000, slots_per_step=1, seed=0
        )
        run_slot = SlotRunner(model, optimizer)
        weights = [w for _, w in model.ternary_weights() if not isinstance(w, TernaryEmbedding)]
        return (
            lambda i, batch: train_step(run_slot, i, [batch]),
            sum(weight.num_weights for weight in weights),
        )
    with torch.device("cuda"):
        model = float_model(config, rule, seed=0)
    adamw = make_adamw(model, lr=1e-3, fused=True)
    torch.compiler.reset()  # else another size of slot would be compiled for every size
    compiled = torch.compile(model, dynamic=False)

    def float_step(i: int, batch: SlotBatch) -> None:
        compiled(batch).backward()
        adamw.step()
        adamw.zero_grad()

    embedding = model.text_encoder.embedding.weight.numel()
    return float_step, sum(p.numel() for p in model.parameters()) - embedding


if __name__ == "__main__":
    main()
