"""Do pictures, sound and film follow their captions, and captions their pictures?

    python -m data_pipeline.sample --out shards --times 4
    python -m benchmarks.media prepare --out rows.safetensors \\
        data.sources.audio.path=shards/audio data.sources.image.path=shards/image
    python -m benchmarks.media train --rows rows.safetensors --sources image --out image
    python -m benchmarks.media train --rows rows.safetensors --sources image --control --out float
    python -m benchmarks.media mixed --rows rows.safetensors --steps 2000 --out mixed
    python -m benchmarks.media merge mixed-a.json mixed-b.json --out mixed.json
    python -m benchmarks.media sheets image audio video --out DIR

`train` writes OUT.json, and what it sampled and heard as OUT.npz; `--control` trains the same model
with float weights and AdamW, for its held-out losses. `mixed` trains all five sources, a slot of
each a step, and then each alone for as many slots; `--only` does one of these, for several
processes, whose files `merge` joins. `sheets` makes files to look at of OUT.npz. Needs neither
decoders nor Ray but for `prepare` and `sheets`.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from arbitor.encoder.image import PatchGrid
from arbitor.kernel.backend import set_backend
from arbitor.loss import FIGURES
from arbitor.main import ARBModel, ModelConfig
from arbitor.modality import BYTE_MODALITIES, MODALITIES
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.trainer import SlotRunner, evaluate, train_step
from benchmarks.float_baseline import FloatTrainer
from benchmarks.media_rows import Source, prepare, read_rows
from benchmarks.media_samples import judge_samples
from benchmarks.record import Record, out_path

EDGE = 50  # first and last losses of a source that are compared
ABOUT = ("command", "environment", "options", "load_average")  # what `Record` says of a run
WORSE = 1.1  # what a mixed run's loss may be of that of its own run


def main() -> None:
    options = parse()
    record = Record(options)
    if options.command == "prepare":
        prepare(options.out, options.overrides, options.storage)
    elif options.command == "merge":
        told = record.write(options.out, **merge(options.runs))
        print(json.dumps(told["verdicts"], indent=1))
    elif options.command == "sheets":
        from benchmarks.media_sheets import write_sheets  # needs the encoders of sound and film

        write_sheets([path.with_suffix("") for path in options.runs], options.rows, options.out)
    else:
        set_backend(options.backend)
        torch.set_num_threads(options.threads)
        sources, grids = read_rows(options.rows)
        run = run_mixed if options.command == "mixed" else run_train
        result, samples = run(sources, grids, options)
        record.write(options.out.with_suffix(".json"), **result)
        if samples:
            np.savez_compressed(options.out.with_suffix(".npz"), **samples)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare")
    making.add_argument("--out", type=out_path, required=True)
    making.add_argument("--storage", type=Path, default=Path("runs"))
    making.add_argument("overrides", nargs="*", metavar="data.key=value")
    showing = commands.add_parser("sheets")
    showing.add_argument("runs", nargs="+", type=Path, metavar="OUT")
    showing.add_argument("--rows", type=Path, required=True)
    showing.add_argument("--out", type=Path, required=True)
    merging = commands.add_parser("merge")
    merging.add_argument("runs", nargs="+", type=Path, metavar="FILE")
    merging.add_argument("--out", type=out_path, required=True)
    training, mixing = (commands.add_parser(name) for name in ("train", "mixed"))
    training.add_argument("--sources", nargs="+", choices=MODALITIES, required=True)
    training.add_argument("--control", action="store_true", help="float weights, AdamW; one source")
    training.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    mixing.add_argument("--only", nargs="+", choices=["all", *MODALITIES])
    for command in (training, mixing):
        _add_training(command)
        command.set_defaults(compile=False)  # PyTorch 2.11 cannot compile the heads of pictures
    return parser.parse_args()


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", type=Path, required=True, help="the file of `prepare`")
    add("--out", type=out_path, required=True, help="without a suffix")
    add("--width", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--head-layers", type=int, default=4, help="of the video head")
    add("--sequences", type=int, default=64, help="of a slot")
    add("--slots", type=int, default=1, help="of each source a step")
    add("--steps", type=int, default=2000)
    add("--warmup", type=int, default=100)
    add("--latent-rate", type=float, default=3.0)
    add("--table-rate", type=float, default=1.0, help="0.3 is too low for codes of sound")
    add("--judged", type=int, default=64, help="samples of each kind")
    add("--euler-steps", type=int, default=32)
    add("--guidance", nargs="+", type=float, default=[1.0], help="of pictures and films, in turn")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", default="auto")


def model_config(
    names: list[str], grids: dict[str, PatchGrid], options: argparse.Namespace
) -> ModelConfig:
    """Attention and the router, and the encoders and heads of these sources."""
    pictures = {"image", "video"} & set(names)
    return ModelConfig(
        width=options.width,
        num_layers=options.layers,
        video_head_layers=options.head_layers,
        enable_attention=True,
        enable_output_router=not set(names) <= set(BYTE_MODALITIES),
        enable_image="image" in names,
        enable_audio="audio" in names,
        enable_video="video" in names,
        enable_talker_head="audio" in names,
        enable_video_head=bool(pictures),
        **grids,
    )


def update_config(options: argparse.Namespace) -> UpdateConfig:
    return UpdateConfig(
        latent_rate=options.latent_rate,
        table_rate=options.table_rate,
        warmup_steps=options.warmup,
    )


def run_train(
    sources: dict[str, Source], grids: dict[str, PatchGrid], options: argparse.Namespace
) -> tuple[dict, dict[str, np.ndarray]]:
    """Losses of one run and what is judged of its samples."""
    config, samples = model_config(options.sources, grids, options), {}
    started = time.perf_counter()
    if options.control:
        model, result = train_float(config, sources, options), {}
    else:
        model, result = train(config, options.sources, sources, options)
    result["seconds"] = round(time.perf_counter() - started, 1)
    result["held_out"] = held_out(model, options.sources, sources, options)
    print(json.dumps(result["held_out"]), flush=True)
    if not options.control:
        result["judged"], samples = judge_samples(model, options.sources, sources, grids, options)
        print(json.dumps(result["judged"], indent=1), flush=True)
    return result, samples


def run_mixed(
    sources: dict[str, Source], grids: dict[str, PatchGrid], options: argparse.Namespace
) -> tuple[dict, dict[str, np.ndarray]]:
    """All sources in one run, then each alone; `verdicts` of those that ran."""
    results = {}
    for name in options.only or ["all", *MODALITIES]:
        names = list(MODALITIES) if name == "all" else [name]
        model, results[name] = train(model_config(names, grids, options), names, sources, options)
        results[name]["held_out"] = held_out(model, names, sources, options)
        print(name, json.dumps(results[name]["held_out"]), flush=True)
    return {"runs": results, "verdicts": verdicts(results)}, {}


def merge(paths: list[Path]) -> dict:
    """The runs of several files of `mixed`, each with where and how it ran, and the verdicts that
    need more than one of them."""
    runs = {}
    for path in paths:
        record = json.loads(path.read_text())
        about = {key: record[key] for key in ABOUT if key in record}
        runs |= {name: about | run for name, run in record["runs"].items()}
    return {"runs": runs, "verdicts": verdicts(runs)}


def verdicts(results: dict[str, dict]) -> dict[str, dict]:
    """By source of the mixed run: falling, below its baseline, not much worse than alone.

    By the losses of the last slots trained on; the ratio of held-out losses stands beside.
    """
    found = {}
    for name, losses in results.get("all", {}).get("losses", {}).items():
        held_out = results["all"]["held_out"][name]
        found[name] = {
            "falls": losses["last"] < losses["first"],
            "below baseline": losses["last judged"] < held_out["baseline"],
        }
        if name in results:
            alone = results[name]["losses"][name]["last"]
            found[name]["of its own run"] = round(losses["last"] / alone, 4)
            found[name]["not worse"] = losses["last"] <= WORSE * alone
            alone = results[name]["held_out"][name]["loss"]
            found[name]["held out, of its own run"] = round(held_out["loss"] / alone, 4)
    return found


def train(
    config: ModelConfig, names: list[str], sources: dict[str, Source], options: argparse.Namespace
) -> tuple[ARBModel, dict]:
    """The product's model and optimizer; the means of each source's first and last losses, and of
    the figure that has a baseline: bytes of text, content of the others."""
    update = update_config(options)
    with torch.device(options.device):
        model = ARBModel(config, options.seed, update)
    optimizer = TernaryOptimizer(
        model,
        update,
        total_steps=options.steps,
        slots_per_step=len(names) * options.slots,
        seed=options.seed,
    )
    run_slot, losses = SlotRunner(model, optimizer), {name: [] for name in names}
    judged: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for step in range(options.steps):
        slots = training_slots(names, sources, step, options)
        report = train_step(run_slot, step, slots)
        for slot, loss, figures in zip(slots, report.losses, report.figures, strict=True):
            losses[slot.source].append(loss)
            figure = "bytes" if slot.modality in BYTE_MODALITIES else "content"
            judged[slot.source].append(figures[FIGURES.index(figure)])
        if (step + 1) % max(1, options.steps // 20) == 0:
            last = {name: round(mean(values[-EDGE:]), 4) for name, values in losses.items()}
            seconds = round(time.perf_counter() - started, 1)
            print(json.dumps({"step": step + 1, "seconds": seconds, **last}), flush=True)
    edges = {
        name: {
            "first": round(mean(losses[name][:EDGE]), 4),
            "last": round(mean(losses[name][-EDGE:]), 4),
            "last judged": round(mean(judged[name][-EDGE:]), 4),
        }
        for name in names
    }
    return model, {"weights": num_weights(model), "losses": edges}


def train_float(
    config: ModelConfig, sources: dict[str, Source], options: argparse.Namespace
) -> ARBModel:
    trainer = FloatTrainer(config, "adamw", update_config(options), options)
    return trainer.train(
        options.lr,
        options.seed,
        lambda step: training_slots(options.sources, sources, step, options),
    )


def training_slots(names: list[str], sources: dict[str, Source], step: int, options) -> list:
    """The slots of a step: `options.slots` of each source."""
    shape = (options.sequences, options.seed, options.device)
    return [
        sources[name].train.slot(
            step * options.slots + turn, step, place * options.slots + turn, *shape
        )
        for place, name in enumerate(names)
        for turn in range(options.slots)
    ]


def held_out(
    model: ARBModel, names: list[str], sources: dict[str, Source], options
) -> dict[str, dict[str, float]]:
    """Loss and figures of each source's held-out rows, and its baseline."""
    found = {}
    for name in names:
        rows = sources[name].held_out
        size = min(options.sequences, len(rows.symbols))
        figures = evaluate(model, iter(rows.batches(size, options.device)))
        found[name] = figures | {"baseline": sources[name].baseline()}
    return {name: {k: round(v, 5) for k, v in figures.items()} for name, figures in found.items()}


def num_weights(model: ARBModel) -> int:
    return sum(weight.num_weights for _, weight in model.ternary_weights())


if __name__ == "__main__":
    main()
