"""Does the latent rule learn as well as float masters? One script, same model, data and schedule.

    python -m benchmarks.learning --data FILE --rules latent ste adamw --seeds 0 1 --steps 600

FILE is text, or xz of text; its last part is held out. Each rule is searched over its rates (--lr,
--latent-rate) on the first seed and runs with the best on the others. Prints a JSON line a run.
"""

import argparse
import json
import lzma
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from arbitor.batch import SlotBatch
from arbitor.kernel.backend import set_backend
from arbitor.main import ARBModel, ModelConfig
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.settings import build, parse_value
from arbitor.trainer import SlotRunner, evaluate, train_step
from benchmarks.float_baseline import RULES, FloatTrainer
from benchmarks.record import Record, out_path

CURVE_POINTS = 20
VARIANTS = {  # the product's rules and formats of their state
    "latent": {},
    "latent-12": {"momentum_bits": 4},
    "latent-10": {"momentum_bits": 4, "latent_bits": 6},
    "latent-groups": {"group_size": 32},
    "bigint": {"rule": "bigint"},
}


def main() -> None:
    options = parse()
    record = Record(options)
    torch.set_num_threads(options.threads)
    train_bytes, held_out = split(options)
    results = []
    for rule in options.rules:
        rates = options.latent_rate if rule in VARIANTS else options.lr
        trainer = None if rule in VARIANTS else float_trainer(rule, options)

        def run(rate, seed, rule=rule, trainer=trainer):
            return train_and_judge(rule, trainer, rate, seed, options, train_bytes, held_out)

        first = [run(rate, options.seeds[0]) for rate in rates]
        best = min(first, key=lambda result: result["validation"])
        others = [run(best["lr"], seed) for seed in options.seeds[1:]]
        results += [*first, *others]
        print_summary(rule, best["lr"], [best, *others])
    record.write(options.out, runs=results)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    rules = [*VARIANTS, *RULES]
    parser.add_argument("--rules", nargs="+", default=["latent", "ste"], choices=rules)
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--latent-rate", nargs="+", type=float, default=[3.0])
    parser.add_argument("--attention", action="store_true")
    parser.add_argument(
        "--model", nargs="+", default=[], metavar="KEY=VALUE", help="more of the section model"
    )
    parser.add_argument(
        "--update", nargs="+", default=[], metavar="KEY=VALUE", help="more of the section update"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the AdamW rules")
    return parser.parse_args()


def parser_of(about: str) -> argparse.ArgumentParser:
    """The options of every comparison of training runs: data, shapes, schedule, device."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the file, at its end")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--activation", default="fp8")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--slots", type=int, default=4, help="slots a step")
    parser.add_argument("--sequences", type=int, default=4, help="sequences a slot")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--eval-slots", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=out_path, help="also write the runs here, as JSON")
    return parser


def model_config(options: argparse.Namespace) -> ModelConfig:
    values = {
        "width": options.width,
        "num_layers": options.layers,
        "enable_attention": options.attention,
        "activation": options.activation,
    }
    return build(ModelConfig, values | settings(options.model), "model")


def float_trainer(rule: str, options: argparse.Namespace) -> FloatTrainer:
    return FloatTrainer(model_config(options), rule, update_config(options), options)


def update_config(options: argparse.Namespace, **values: Any) -> UpdateConfig:
    values = {"warmup_steps": options.warmup} | values | settings(options.update)
    return build(UpdateConfig, values, "update")


def settings(assignments: list[str]) -> dict[str, Any]:
    """The values of KEY=VALUE texts."""
    pairs = (assignment.split("=", 1) for assignment in assignments)
    return {key: parse_value(text) for key, text in pairs}


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


def train_and_judge(rule, trainer, lr, seed, options, train_bytes, held_out) -> dict:
    """One training run; its final validation loss in nats per byte."""
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def slots(step):
        return training_slots(train_bytes, seed, step, options)

    # torch.compile makes its own kernels from the plain operations.
    set_backend(options.backend if trainer is None else "torch")
    if trainer is None:
        model, curve = train_ternary(rule, lr, seed, options, slots)
    else:
        model, curve = trainer.train(lr, seed, slots), []
    trained = time.perf_counter()
    result = {
        "rule": rule,
        "lr": lr,
        "seed": seed,
        "steps": options.steps,
        "weights": num_weights(model),
        "validation": round(evaluate(model, held_out)["loss"], 5),
        "seconds": round(trained - started, 1),
        "peak_memory_gib": peak_memory_gib(),
        "curve": curve,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "curve"}), flush=True)
    return result


def train_ternary(rule, rate, seed, options, slots) -> tuple[ARBModel, list[dict]]:
    """The product's model and optimizer; the curve shows how the latents spread."""
    config = update_config(options, latent_rate=rate, **VARIANTS[rule])
    with torch.device(options.device):
        model = ARBModel(model_config(options), seed, config)
    optimizer = TernaryOptimizer(
        model,
        config,
        total_steps=options.steps,
        slots_per_step=options.slots,
        seed=seed,
    )
    run_slot, curve = SlotRunner(model, optimizer), []
    for step in range(options.steps):
        report = train_step(run_slot, step, slots(step))
        if (step + 1) % max(1, options.steps // CURVE_POINTS) == 0:
            curve.append(
                {
                    "step": step + 1,
                    "loss": round(mean(report.losses), 4),
                    "flip_rate": round(report.flip_rate, 6),
                    "zero_fraction": round(report.zero_fraction, 4),
                    "saturated_fraction": round(report.saturated_fraction, 6),
                    **{name: round(value, 4) for name, value in report.parts.items()},
                }
            )
    return model, curve


def peak_memory_gib() -> float | None:
    """Of the training since the last reset; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def num_weights(model: ARBModel) -> int:
    ternary = sum(weight.num_weights for _, weight in model.ternary_weights())
    return ternary + sum(parameter.numel() for parameter in model.parameters())


def print_summary(rule: str, lr: float, runs: list[dict]) -> None:
    losses = [run["validation"] for run in runs]
    by_seed = " ".join(f"{loss:.4f}" for loss in losses)
    seconds = mean(run["seconds"] for run in runs)
    print(
        f"{rule:<18} rate {lr}: {by_seed}  mean {mean(losses):.4f}  {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
