"""Strong scaling: the same steps on 1, 2, .. workers of one host, and the same bits on all of them.

    python -m benchmarks.scaling --out benchmarks/results/FILE.json

A step has as many slots however many workers share it, so N workers should need 1/N of the time.
No Ray: a process for each GPU (NCCL), or on a CPU a process of one thread each (gloo). The share of
the exchange is what a step takes longer than with all exchanges left out, measured after the
digests of the state were taken. Exit code 1 if the digests differ.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from arbitor.batch import SlotBatch
from arbitor.gradient_sums import Work
from arbitor.kernel.backend import set_backend
from arbitor.main import ARBModel, ModelConfig
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.trainer import SlotRunner, train_step
from benchmarks.record import Record, out_path

WARMUP_STEPS = 3  # compile, record the slots, record the updates


def main() -> None:
    options = parse()
    record = Record(options)
    rows = []
    for world in options.workers:
        rows.append(measure(world, options))
        first = rows[0]
        speedup = first["step_ms"] / rows[-1]["step_ms"]
        rows[-1]["efficiency"] = round(speedup * first["workers"] / world, 3)
        print(json.dumps(rows[-1]), flush=True)
    same = len({row["state_sha256"] for row in rows}) == 1
    print("the final state has the same bits for all" if same else "FINAL STATES DIFFER")
    record.write(
        options.out,
        nccl=nccl_version(),
        model=asdict(model_config(options)),
        same_bits=same,
        rows=rows,
    )
    sys.exit(0 if same else 1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpus = torch.cuda.device_count()
    workers = [n for n in (1, 2, 4, 8) if n <= gpus] or [1, 2]
    parser.add_argument("--workers", nargs="+", type=int, default=workers)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048, help="positions of a sequence")
    parser.add_argument("--positions", type=int, default=16384, help="a slot's")
    parser.add_argument("--slots", type=int, default=8, help="a step's")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=out_path)
    return parser.parse_args(arguments)


def model_config(options: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        width=options.width,
        num_layers=options.layers,
        enable_attention=True,
        head_width=options.head_width,
    )


def nccl_version() -> str:
    if not torch.cuda.is_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))


def measure(world: int, options: argparse.Namespace) -> dict[str, Any]:
    """Starts `world` processes; what the first of them measured."""
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # multicast over NVLink, which not every host can do
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_worker, (world, Path(folder), options), nprocs=world)
        return json.loads((Path(folder) / "row.json").read_text())


def run_worker(rank: int, world: int, folder: Path, options: argparse.Namespace) -> None:
    """One process: trains its slots of every step with the others, then without them."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    set_conditions(device)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        device_id=device if gpu else None,
    )
    exchange = Exchange()
    with device:
        model = ARBModel(model_config(options), seed=0)
    optimizer = TernaryOptimizer(
        model,
        UpdateConfig(),
        total_steps=1000,
        slots_per_step=options.slots,
        seed=0,
        all_reduce=exchange if world > 1 else None,
    )
    run_slot = SlotRunner(model, optimizer)
    steps = make_steps(rank, world, options, device)
    for step in range(WARMUP_STEPS):
        train_step(run_slot, step, steps[step])
    exchange.bytes = exchange.calls = 0
    seconds = time_steps(run_slot, steps, WARMUP_STEPS, options.steps)
    row = {
        "workers": world,
        "step_ms": round(1e3 * seconds, 2),
        "positions_per_s": round(options.slots * options.positions / seconds),
        "exchanged_mib_a_step": round(exchange.bytes / options.steps / 2**20, 1),
        "exchanges_a_step": exchange.calls / options.steps,
    }
    digests: list[str] = [""] * world
    dist.all_gather_object(digests, state_digest(model))
    assert len(set(digests)) == 1, f"workers hold different states: {digests}"
    exchange.is_on = False
    alone = time_steps(run_slot, steps, WARMUP_STEPS + options.steps, options.steps)
    row["step_ms_without_exchange"] = round(1e3 * alone, 2)
    row["exchange_share"] = round(max(0.0, 1 - alone / seconds), 4)
    row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None
    row["state_sha256"] = digests[0]
    if rank == 0:
        (folder / "row.json").write_text(json.dumps(row))
    dist.destroy_process_group()


def set_conditions(device: torch.device) -> None:
    """Those under which a slot's gradient has the same bits in every process."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
        set_backend("triton")
    else:
        torch.set_num_threads(1)
        set_backend("torch")


class Exchange:
    """Sums over the processes, counted; switched off it leaves a tensor as it is."""

    def __init__(self) -> None:
        self.is_on, self.bytes, self.calls = True, 0, 0

    def __call__(self, integers: Tensor) -> Work:
        if not self.is_on:
            return NothingToWaitFor()
        self.bytes += integers.numel() * integers.element_size()
        self.calls += 1
        return dist.all_reduce(integers, async_op=True)


class NothingToWaitFor:
    def wait(self) -> None:
        pass


def make_steps(
    rank: int, world: int, options: argparse.Namespace, device: torch.device
) -> list[list[SlotBatch]]:
    """This worker's slots of every step that is going to run."""
    shape = (options.positions // options.length, options.length + 1)
    steps = []
    for step in range(WARMUP_STEPS + 2 * options.steps):
        slots = []
        for slot in range(rank, options.slots, world):
            random = np.random.default_rng([step, slot])
            symbols = random.integers(0, 256, shape, dtype=np.uint16)
            where = {"step": step, "slot": slot, "source": "made-up", "modality": "text"}
            slots.append(SlotBatch.from_symbols(symbols, device=device, **where))
        steps.append(slots)
    return steps


def time_steps(run_slot: SlotRunner, steps: list[list[SlotBatch]], first: int, count: int) -> float:
    """Seconds of a step, those of the slowest worker."""
    wait_for_all()
    started = time.perf_counter()
    for step in range(first, first + count):
        train_step(run_slot, step, steps[step])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = torch.tensor([(time.perf_counter() - started) / count], dtype=torch.float64)
    seconds = seconds.to(run_slot.optimizer.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def wait_for_all() -> None:
    dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def state_digest(model: ARBModel) -> str:
    digest = sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    # The module's own functions travel to the processes by name, those of __main__ do not.
    from benchmarks import scaling

    scaling.main()
