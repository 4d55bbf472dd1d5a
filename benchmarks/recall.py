"""Recall of what lies beyond the window: dense, window alone, window and HCA.

A sequence begins with pairs (key, value) strewn among filler; it ends with queries, a marker and a
key each, that ask for the key's value. Two layers and the sequencer reach less far back than the
pairs are, so a window alone can but guess; the loss is that of the values asked for. The share of
values that have the largest logit is printed, of sequences that nobody trained on.

    python -m benchmarks.recall --device cuda --out benchmarks/results/recall.json
"""

import argparse
import json
import time
from dataclasses import replace

import numpy as np
import torch

from arbitor.batch import NO_TARGET, SlotBatch
from arbitor.kernel.backend import set_backend
from arbitor.main import ARBModel, ModelConfig
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.trainer import SlotRunner, train_step
from benchmarks.record import Record, out_path

KEYS, VALUES, FILLER, MARKER = range(0, 64), range(64, 128), range(128, 255), 255
LAYERS = 2
TRIPLE = 3  # symbols of a pair with its marker


def main() -> None:
    options = parse()
    record = Record(options)
    set_backend(options.backend)
    torch.set_num_threads(options.threads)
    context = {"attention_window": options.window}
    variants = {
        "dense": {},
        "window": context,
        "window + HCA": context | {"hca_stride": options.stride},
    }
    results = []
    for name in options.variants or variants:
        for seed in options.seeds:
            accuracy, seconds = train_and_judge(variants[name], seed, options)
            results.append({"variant": name, "seed": seed, "recall": accuracy, "seconds": seconds})
            print(json.dumps(results[-1]), flush=True)
    print(f"chance: {1 / len(VALUES):.3f} of all values, {1 / options.pairs:.3f} of a sequence's")
    record.write(options.out, runs=results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=["dense", "window", "window + HCA"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=32, help="of a slot")
    parser.add_argument("--table-rate", type=float, default=1.0, help="0.3 takes far more steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=out_path)
    options = parser.parse_args()
    reach = LAYERS * (options.window + options.stride) + 2
    assert options.context - TRIPLE * options.pairs - reach >= options.context // 2, (
        "pairs in reach"
    )
    return options


def make_batch(random: np.random.Generator, step: int, slot: int, options) -> SlotBatch:
    shape, pairs = (options.sequences, options.context + 1), options.pairs
    symbols = random.integers(FILLER.start, FILLER.stop, shape, dtype=np.uint16)
    is_asked = np.zeros(shape, bool)
    for row, asked in zip(symbols, is_asked, strict=True):
        keys = random.choice(KEYS, pairs, replace=False)
        values = random.choice(VALUES, pairs, replace=False)
        places = 2 * random.choice(options.context // 4, pairs, replace=False)
        row[places], row[places + 1] = keys, values
        order = random.permutation(pairs)
        ends = options.context + 1 - TRIPLE * np.arange(pairs)
        row[ends - 3], row[ends - 2], row[ends - 1] = MARKER, keys[order], values[order]
        asked[ends - 1] = True
    batch = SlotBatch.from_symbols(
        symbols, step=step, slot=slot, source="recall", modality="text", device=options.device
    )
    is_asked = torch.from_numpy(is_asked[:, 1:]).to(options.device)
    return replace(batch, targets_BT=batch.targets_BT.where(is_asked, NO_TARGET))


def train_and_judge(variant: dict, seed: int, options) -> tuple[float, float]:
    """Share of the values asked for that the model names, and the seconds of training."""
    started, update = time.perf_counter(), UpdateConfig(table_rate=options.table_rate)
    config = ModelConfig(options.width, LAYERS, enable_attention=True, **variant)
    with torch.device(options.device):
        model = ARBModel(config, seed, update)
    optimizer = TernaryOptimizer(
        model, update, total_steps=options.steps, slots_per_step=options.slots, seed=seed
    )
    run_slot = SlotRunner(model, optimizer)
    for step in range(options.steps):
        random = np.random.default_rng([seed, step])
        slots = [make_batch(random, step, slot, options) for slot in range(options.slots)]
        report = train_step(run_slot, step, slots)
        if (step + 1) % max(1, options.steps // 10) == 0:
            print(f"step {step + 1}: {np.mean(report.losses):.3f}", flush=True)
    return recall(model, options), round(time.perf_counter() - started, 1)


@torch.no_grad()
def recall(model: ARBModel, options) -> float:
    random, right, asked = np.random.default_rng(-1 % 2**32), 0, 0
    for slot in range(16):
        batch = make_batch(random, 0, slot, options)
        is_asked = batch.targets_BT != NO_TARGET
        best_BT = model.logits(batch.symbols_BT).argmax(dim=-1)
        right += int((best_BT == batch.targets_BT)[is_asked].sum())
        asked += int(is_asked.sum())
    return round(right / asked, 4)


if __name__ == "__main__":
    main()
