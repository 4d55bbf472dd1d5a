"""What a longer context costs: window and HCA against dense attention, time and memory a position.

    python -m benchmarks.context_cost --out benchmarks/results/FILE.json

Width 2048; slots of as many positions at every context. The forward is that of evaluation; a step
is forward and backward of a training slot, its update included.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from arbitor.kernel.backend import set_backend
from arbitor.main import ARBModel, ModelConfig
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.trainer import SlotRunner, train_step
from benchmarks.record import Record, out_path
from benchmarks.train_step import make_batch

REPEATS = 5
VARIANTS = {
    "dense": {},
    "window": {"attention_window": 128},
    "window + HCA": {"attention_window": 128, "hca_stride": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--positions", type=int, default=32768, help="of a slot")
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--out", type=out_path)
    options = parser.parse_args()
    record = Record(options)
    set_backend("triton")
    rows = []
    for variant, keys in VARIANTS.items():
        config = ModelConfig(options.width, options.layers, enable_attention=True, **keys)
        for context in options.contexts:
            rows.append(
                {"variant": variant, "context": context}
                | measure(config, context, options.positions)
            )
            print(json.dumps(rows[-1]), flush=True)
    record.write(options.out, rows=rows)


def measure(config: ModelConfig, context: int, positions: int) -> dict[str, Any]:
    """Nanoseconds a position and GiB at the peak, of a forward and of a training step."""
    with torch.device("cuda"):
        model = ARBModel(config, seed=0)
    batch = make_batch(0, positions, context)

    def forward() -> None:
        with torch.no_grad():
            model.losses(batch)

    row = timed("forward", forward, positions)
    optimizer = TernaryOptimizer(model, UpdateConfig(), total_steps=99, slots_per_step=1, seed=0)
    run_slot = SlotRunner(model, optimizer)
    steps = iter(range(99))
    return row | timed("step", lambda: train_step(run_slot, next(steps), [batch]), positions)


def timed(name: str, call: Callable[[], Any], positions: int) -> dict[str, Any]:
    for _ in range(3):  # compiles and records
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(REPEATS):
        call()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / REPEATS
    return {
        f"{name}_ns_per_position": round(1e9 * seconds / positions, 1),
        f"{name}_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


if __name__ == "__main__":
    main()
