"""Times the candidate tiles of the matmul kernels: the source of the tables in `configs.py`.

    python -m benchmarks.tune --shapes 16384x4096x4096

Prints the library and the best tiles of each op and shape, fastest first. Shapes are tokens x
outputs x inputs.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from arbitor.kernel.backend import set_backend
from arbitor.kernel.matmul import decode_gemv
from arbitor.kernel.matmul import triton as triton_matmul
from arbitor.kernel.matmul.configs import LIBRARY, Choice, GemmConfig
from arbitor.kernel.rms_norm import triton as triton_norm
from benchmarks.kernels import DECODE_BATCHES, DECODE_SHAPES, TRAINING_SHAPES
from benchmarks.problems import BackwardProblem, float_problem, random_plane, random_state
from benchmarks.timing import seconds

TILES = [
    GemmConfig(128, 256, 128, num_warps=8, num_stages=3),
    GemmConfig(128, 256, 128, num_warps=8, num_stages=4),
    GemmConfig(128, 128, 128, num_warps=8, num_stages=4),
    GemmConfig(128, 128, 128, num_warps=4, num_stages=4),
    GemmConfig(256, 128, 128, num_warps=8, num_stages=3),
    GemmConfig(128, 128, 256, num_warps=8, num_stages=3),
]
NORM_BLOCKS = [(m, k, w) for m in (8, 16, 32, 64) for k in (128, 256, 512) for w in (4, 8)]
PLANE_TILES = [(n, q, 4, s) for n in (16, 32, 64, 128) for q in (128, 256, 512) for s in (3, 4, 6)]
PLANE_TILES += [(n, q, 2, s) for n in (16, 32) for q in (128, 256) for s in (4, 6)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", default=["matmul", "norm", "plane"])
    parser.add_argument("--shapes", nargs="+", default=TRAINING_SHAPES)
    options = parser.parse_args()
    set_backend("triton")
    for shape in options.shapes if "matmul" in options.ops else []:
        M, N, K = (int(size) for size in shape.split("x"))
        tune_matmul(shape, BackwardProblem(float_problem(M, N, K), random_state(N, K)))
    for shape in options.shapes if "norm" in options.ops else []:
        M, _, K = (int(size) for size in shape.split("x"))
        tune_norm(float_problem(M, 16, K)["x"])
    for N, K in DECODE_SHAPES if "plane" in options.ops else []:
        tune_plane(N, K)


def tune_matmul(shape: str, problem: BackwardProblem) -> None:
    """All four matmuls through the functions that training calls, one choice after another."""
    calls = {
        "forward": lambda: triton_matmul.matmul_forward(
            problem.x_forward, problem.latent_NK, problem.scale_N
        ),
        "backward_x": lambda: triton_matmul.matmul_backward_x(problem.for_x, problem.latent_NK),
        "backward_weight": problem.grad_w,
    }
    for op, call in calls.items():
        results = []
        for choice in choices(op):
            triton_matmul.choose_gemm = lambda *_, choice=choice: choice
            results.append((time_of(call), choice))
        report(f"{op} {shape}", results)


def choices(op: str) -> Iterator[Choice]:
    exact = op == "backward_weight"
    yield LIBRARY
    for tile in TILES:
        for tma in (False, True):
            yield replace(tile, tma=tma, exact=exact)


def tune_norm(x_MK: torch.Tensor) -> None:
    """Rows, columns and warps of the norm, forward and backward."""
    _, saved, inverse_rms_M = triton_norm.rms_norm_quantize(x_MK, "fp8", True)
    forward, backward = [], []
    for blocks in NORM_BLOCKS:
        triton_norm._FORWARD_BLOCKS = triton_norm._BACKWARD_BLOCKS = blocks
        forward.append((time_of(lambda: triton_norm.rms_norm_quantize(x_MK, "fp8", True)), blocks))
        args = (x_MK, saved, inverse_rms_M, torch.bfloat16)
        backward.append((time_of(lambda a=args: triton_norm.rms_norm_backward_x(*a)), blocks))
    report(f"norm forward {tuple(x_MK.shape)}", forward)
    report(f"norm backward {tuple(x_MK.shape)}", backward)


def tune_plane(N: int, K: int) -> None:
    """Tiles of the matmul on the 2-bit plane, by batch."""
    planes = [random_plane(N, K) for _ in range(20)]
    scale_N = torch.rand(N, device="cuda")
    for batch in DECODE_BATCHES:
        x_MK = torch.randn(batch, K, device="cuda", dtype=torch.bfloat16)
        x, _, _ = triton_norm.rms_norm_quantize(x_MK, "fp8", False)
        results = []
        for tile in PLANE_TILES:
            decode_gemv._TILES = ((64, (max(16, batch), *tile)),)
            calls = [lambda p=p, x=x: decode_gemv.plane_matmul(x, p, scale_N) for p in planes]
            results.append((time_of(*calls), tile))
        report(f"plane batch {batch} {N}x{K}", results)


def time_of(*calls: Any) -> float:
    """Seconds of a call, infinite for a tile that does not fit."""
    try:
        return seconds(calls if len(calls) > 1 else calls * 4)
    except OutOfResources:
        return float("inf")


def report(title: str, results: list[tuple[float, Any]]) -> None:
    print(title)
    for time, choice in sorted(results, key=lambda result: result[0])[:6]:
        print(f"  {time * 1e6:9.1f} us  {choice}", flush=True)


if __name__ == "__main__":
    main()
