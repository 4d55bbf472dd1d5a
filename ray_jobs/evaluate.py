"""Held-out losses of a run, source by source: `python -m ray_jobs.evaluate RUN`.

RUN is a run's folder, for its newest checkpoint, or the folder of one of its checkpoints. The
sequences are those of the run's own evaluations.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from arbitor.export import open_model
from arbitor.kernel.backend import BACKENDS, set_backend
from arbitor.modality import BYTE_MODALITIES
from arbitor.trainer import evaluate
from data_pipeline.run_data import held_out_slots
from ray_jobs.conditions import set_conditions
from ray_jobs.config import read_run_config
from ray_jobs.run import exit_with_message
from ray_jobs.slots import to_batch
from ray_jobs.worker import open_run_data


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    options = parser.parse_args(arguments)
    config = read_run_config(options.run)
    set_conditions(config)
    set_backend(options.backend)
    opened = open_model(options.run)
    print(f"{opened.path}: step {opened.step}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, data = opened.model.to(device), open_run_data(config)
    for source in data.manifests:
        batches = [to_batch(slot, device) for slot in held_out_slots(data, source)]
        if not batches:
            print(f"{source}: no held-out rows")
            continue
        means = evaluate(model, iter(batches))
        line = f"{source}: {means.pop('loss'):.4f}"
        if config.data.sources[source].modality in BYTE_MODALITIES:
            line += f" nats per symbol, {means['bytes'] / math.log(2):.4f} bits per byte"
        else:
            line += "".join(f", {name} {mean:.4f}" for name, mean in means.items())
        print(f"{line}, over {len(batches)} slots")


if __name__ == "__main__":
    exit_with_message(lambda: main(sys.argv[1:]))
