"""Does the latent rule learn as well as float masters? One script, same model, data and schedule.

    python benchmarks/learning.py --data FILE --rules latent ste adamw --seeds 0 1 --steps 600

FILE is text, or xz of text; its last part is held out. AdamW rules are searched over --lr on the
first seed and run with the best on the others. Prints one JSON line a run, then a table.
"""

import argparse
import json
import lzma
import platform
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from arbitor.batch import SlotBatch
from arbitor.main import ARBModel, ModelConfig
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.trainer import SlotRunner, evaluate, train_step
from benchmarks.float_baseline import RULES, float_model, make_adamw


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    train_bytes, held_out = split(options)
    results = []
    for rule in options.rules:
        rates = [None] if rule == "latent" else options.lr
        first = [
            run(rule, rate, options.seeds[0], options, train_bytes, held_out) for rate in rates
        ]
        best = min(first, key=lambda result: result["validation"])
        others = [
            run(rule, best["lr"], seed, options, train_bytes, held_out)
            for seed in options.seeds[1:]
        ]
        results.append((rule, best["lr"], [best, *others]))
    print(f"\n{'rule':<18} {'lr':>8} {'validation, by seed':>24} {'mean':>8} {'seconds':>8}")
    for rule, lr, runs in results:
        losses = [result["validation"] for result in runs]
        by_seed = " ".join(f"{loss:.4f}" for loss in losses)
        seconds = mean(result["seconds"] for result in runs)
        print(f"{rule:<18} {lr or '-':>8} {by_seed:>24} {mean(losses):>8.4f} {seconds:>8.0f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the file, at its end")
    parser.add_argument("--rules", nargs="+", default=["latent", "ste"], choices=["latent", *RULES])
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--slots", type=int, default=4, help="slots a step")
    parser.add_argument("--sequences", type=int, default=4, help="sequences a slot")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--eval-slots", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def split(options: argparse.Namespace) -> tuple[np.ndarray, list[SlotBatch]]:
    """Training bytes, and fixed evenly spaced held-out batches, the same for every run."""
    content = options.data.read_bytes()
    if options.data.suffix == ".xz":
        content = lzma.decompress(content)
    data = np.frombuffer(content, np.uint8)
    border = int(len(data) * (1 - options.held_out))
    held_out = data[border:]
    count = options.eval_slots * options.sequences
    starts = np.linspace(0, len(held_out) - options.context - 2, count).astype(np.int64)
    batches = [
        make_batch(held_out, starts[i :: options.eval_slots], 0, i, options)
        for i in range(options.eval_slots)
    ]
    return data[:border], batches


def make_batch(data, starts, step, slot, options) -> SlotBatch:
    symbols = np.stack([data[start : start + options.context + 1] for start in starts])
    return SlotBatch.from_symbols(
        symbols, step=step, slot=slot, source="text", modality="text", device=options.device
    )


def training_slots(data, seed: int, step: int, options) -> list[SlotBatch]:
    random = np.random.default_rng([seed, step])
    shape = (options.slots, options.sequences)
    starts = random.integers(0, len(data) - options.context - 1, shape)
    return [make_batch(data, starts[slot], step, slot, options) for slot in range(options.slots)]


def run(rule, lr, seed, options, train_bytes, held_out) -> dict:
    """One training run; its final validation loss in nats per byte."""
    config = ModelConfig(
        width=options.width, num_layers=options.layers, enable_attention=options.attention
    )
    started = time.perf_counter()
    if rule == "latent":
        model = train_latent(config, seed, options, train_bytes)
    else:
        model = train_float(config, rule, lr, seed, options, train_bytes)
    result = {
        "rule": rule,
        "lr": lr,
        "seed": seed,
        "validation": round(evaluate(model, held_out), 4),
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
    }
    print(json.dumps(result), flush=True)
    return result


def train_latent(config, seed, options, train_bytes) -> ARBModel:
    model = ARBModel(config, seed).to(options.device)
    optimizer = TernaryOptimizer(
        model,
        UpdateConfig(warmup_steps=options.warmup),
        total_steps=options.steps,
        slots_per_step=options.slots,
        seed=seed,
    )
    run_slot = SlotRunner(model, optimizer)
    for step in range(options.steps):
        train_step(run_slot, step, training_slots(train_bytes, seed, step, options))
    return model


def train_float(config, rule, lr, seed, options, train_bytes) -> ARBModel:
    model = float_model(config, rule, seed).to(options.device)
    optimizer = make_adamw(model, lr)
    schedule = UpdateConfig(warmup_steps=options.warmup).schedule
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, options.steps) / 65536
        for batch in training_slots(train_bytes, seed, step, options):
            (model(batch) / options.slots).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    main()
