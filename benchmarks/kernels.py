"""Times of the ternary kernels against cuBLAS bf16, torch.compile and fused AdamW in the same run.

    python -m benchmarks.kernels --out benchmarks/results/FILE.json
    python -m benchmarks.kernels --ops linear decode --shapes 4096x4096x4096

Runs each op's tests first and refuses to time an op whose test is red. Prints for every row the
time, the rate, the share of the ceiling measured in this run and the ratio to each baseline; a row
beyond the ceiling is marked, because then the ceiling is none. Shapes are tokens x outputs x
inputs. What a row contains is the docstring of its function below.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from arbitor.kernel.backend import set_backend
from arbitor.kernel.embedding import op as embedding
from arbitor.kernel.matmul import op as matmul
from arbitor.kernel.matmul.decode_gemv import plane_matmul
from arbitor.kernel.matmul.decode_triton import decode_weight
from arbitor.kernel.rms_norm.op import normalize, normalize_backward
from benchmarks.problems import (
    BackwardProblem,
    UpdateProblem,
    adamw_problem,
    float_problem,
    norm,
    norm_linear,
    random_plane,
    random_state,
    rotate,
)
from benchmarks.record import Record, out_path
from benchmarks.timing import (
    ROTATED_BYTES,
    Ceilings,
    compiled,
    measure_ceilings,
    num_buffers,
    seconds,
)

TRAINING_SHAPES = ("16384x4096x4096", "16384x8192x8192", "4096x4096x4096")
DECODE_SHAPES = ((8192, 8192), (28672, 8192))
DECODE_BATCHES = (1, 4, 16, 64)
UPDATE_SHAPES = ((4096, 4096), (8192, 8192))
ABOVE_CEILING = 1.05  # a share of it that noise does not explain

Calls = list[Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One op on one shape; each baseline is a set of calls that does the same work in floats."""

    name: str
    ours: Calls
    baselines: dict[str, Calls]
    num_bytes: int = 0  # the least that must move
    operations: int = 0
    peak: str = "fp8"  # of `Ceilings`
    num_weights: int = 0  # of an update


def main() -> None:
    options = parse()
    record = Record(options)
    assert torch.cuda.is_available(), "kernels are timed on a GPU"
    set_backend("triton")
    refused = ops_with_red_tests(options.ops)
    for op in refused:
        print(f"{op}: a test is red, not timed")
    ceilings = measure_ceilings()
    print(
        f"ceilings: {ceilings.bandwidth / 1e9:.0f} GB/s, bf16 {ceilings.bfloat16 / 1e12:.0f},"
        f" fp8 {ceilings.fp8 / 1e12:.0f}, int8 {ceilings.int8 / 1e12:.0f} TFLOP/s"
    )
    results = []
    for op in options.ops:
        if op in refused:
            continue
        for row in OPS[op][0](options):
            results.append(time_row(row, ceilings))
            print(line_of(results[-1]), flush=True)
            torch.cuda.empty_cache()
    record.write(
        options.out,
        ceilings=asdict(ceilings),
        rotated_bytes=ROTATED_BYTES,
        rows=results,
        refused=refused,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--shapes", nargs="+", default=TRAINING_SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["fp8", "int8"], choices=["fp8", "int8"])
    parser.add_argument("--out", type=out_path)
    return parser.parse_args()


def ops_with_red_tests(ops: list[str]) -> list[str]:
    """Runs the tests of these ops compiled, on this GPU, all files at a time."""
    files = sorted({file for op in ops for file in OPS[op][1]})
    with ThreadPoolExecutor(len(files)) as pool:
        green = dict(zip(files, pool.map(is_green, files), strict=True))
    return [op for op in ops if not all(green[file] for file in OPS[op][1])]


def is_green(test_file: str) -> bool:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", test_file]
    return subprocess.run(command, env=variables, check=False).returncode == 0


def time_row(row: Row, ceilings: Ceilings) -> dict[str, Any]:
    """The row's times in microseconds, rates and ratios."""
    ours = seconds(row.ours)
    others = {name: seconds(calls) for name, calls in row.baselines.items()}
    share = ceilings.floor(row.num_bytes, row.operations, row.peak) / ours
    return {
        "op": row.name,
        "us": ours * 1e6,
        "GB/s": row.num_bytes / ours / 1e9,
        "TFLOP/s": row.operations / ours / 1e12,
        "ps_per_weight": ours * 1e12 / row.num_weights if row.num_weights else None,
        "share_of_ceiling": share,
        "above_ceiling": share > ABOVE_CEILING,
        "baseline_us": {name: t * 1e6 for name, t in others.items()},
        "ratio": {name: t / ours for name, t in others.items()},
    }


def line_of(result: dict[str, Any]) -> str:
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in result["ratio"].items())
    rate = (
        f"{result['TFLOP/s']:7.0f} TFLOP/s" if result["TFLOP/s"] else f"{result['GB/s']:7.0f} GB/s"
    )
    share = f"{100 * result['share_of_ceiling']:3.0f} % of ceiling"
    if result["above_ceiling"]:
        share += " (ABOVE)"
    if result["ps_per_weight"]:
        share += f", {result['ps_per_weight']:.2f} ps a weight"
    return f"{result['op']:<44} {result['us']:9.1f} us {rate} {share}  {ratios}"


# ---- ops ----------------------------------------------------------------------------------------


def linear_rows(options: argparse.Namespace) -> Iterator[Row]:
    """RMSNorm + quantization (both layouts) + decode + matmul, as one training forward does them;
    then the norm alone, forward and backward.
    """
    for M, N, K in shapes_of(options):
        for dtype in options.dtypes:
            problems = rotate(lambda M=M, N=N, K=K: float_problem(M, N, K), 2 * M * (K + N) + N * K)
            weights = [random_state(N, K) for _ in problems]

            def forward(p, state, dtype=dtype):
                x, _, _ = normalize(p["x"], dtype, True)
                return matmul.forward(x, state.latent, matmul.row_scale(state.log2_scale))

            pairs = list(zip(problems, weights, strict=True))
            yield Row(
                f"norm + linear {dtype} {M}x{N}x{K}",
                [lambda p=p, w=w: forward(p, w) for p, w in pairs],
                {
                    "norm + cuBLAS bf16": [
                        lambda p=p: norm_linear(p["x"], p["w"]) for p in problems
                    ],
                    "torch.compile": [
                        lambda p=p: compiled(norm_linear)(p["x"], p["w"]) for p in problems
                    ],
                },
                num_bytes=4 * M * K + 3 * N * K,
                operations=2 * M * N * K,
                peak=dtype,
            )
            saved = [normalize(p["x"], dtype, True) for p in problems]
            yield Row(
                f"norm + quantize {dtype} {M}x{K}",
                [lambda p=p, dtype=dtype: normalize(p["x"], dtype, True) for p in problems],
                {"torch.compile norm": [lambda p=p: compiled(norm)(p["x"]) for p in problems]},
                num_bytes=4 * M * K,
            )
            yield Row(
                f"norm backward {dtype} {M}x{K}",
                [
                    lambda p=p, s=s: normalize_backward(p["x"], s[1], s[2], torch.bfloat16)
                    for p, s in zip(problems, saved, strict=True)
                ],
                {},
                num_bytes=5 * M * K,
            )


def backward_rows(options: argparse.Namespace) -> Iterator[Row]:
    """grad_x: both quantizations of grad_y + decode + matmul. grad_w + update: matmul + slot
    integers + latent update, once through the stored gradient and once with the conversion in the
    matmul. Backward + update: all of it.
    """
    for M, N, K in shapes_of(options):
        problems = rotate(lambda M=M, N=N, K=K: float_problem(M, N, K), 2 * M * (K + N) + N * K)
        ours = [BackwardProblem(p, random_state(N, K)) for p in problems]
        adamw = [adamw_problem(p["w"]) for p in problems]
        shape, flops = f"{M}x{N}x{K}", 2 * M * N * K
        grad_x = {"cuBLAS bf16": [lambda p=p: p["grad"] @ p["w"] for p in problems]}
        grad_w = {
            "cuBLAS bf16 + fused AdamW": [
                lambda p=p, a=a: (p["grad"].T @ p["x"], a.step())
                for p, a in zip(problems, adamw, strict=True)
            ]
        }
        both = {
            "cuBLAS bf16 + fused AdamW": [
                lambda p=p, a=a: (p["grad"] @ p["w"], p["grad"].T @ p["x"], a.step())
                for p, a in zip(problems, adamw, strict=True)
            ]
        }
        plain_w = {"cuBLAS bf16": [lambda p=p: p["grad"].T @ p["x"] for p in problems]}
        yield Row(f"quantize grad_y {M}x{N}", [b.quantize for b in ours], {}, 6 * M * N)
        yield Row(f"grad_x fp8 {shape}", [b.grad_x for b in ours], grad_x, 6 * M * N, flops)
        yield Row(f"grad_w alone {shape}", [b.grad_w for b in ours], plain_w, 0, flops)
        yield Row(
            f"grad_w + update {shape}",
            [b.grad_w_and_update for b in ours],
            grad_w,
            11 * N * K,
            flops,
        )
        yield Row(
            f"backward + update {shape}",
            [b.everything for b in ours],
            both,
            6 * M * N + 11 * N * K,
            2 * flops,
        )


def update_rows(options: argparse.Namespace) -> Iterator[Row]:
    """The latent update alone, and the conversion of a stored float32 gradient to slot integers."""
    for N, K in UPDATE_SHAPES:
        count = num_buffers(6 * N * K)
        updates = [UpdateProblem(random_state(N, K)) for _ in range(count)]
        weights = [torch.randn(N, K, device="cuda") for _ in range(min(count, 4))]
        adamw = [adamw_problem(w) for w in weights]
        yield Row(
            f"update {N}x{K}",
            [u.update for u in updates],
            {"fused AdamW": [a.step for a in adamw]},
            6 * N * K,
            num_weights=N * K,
        )
        yield Row(f"slot integers {N}x{K}", [u.convert for u in updates], {}, 8 * N * K)


def decode_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Matmul of few positions on the 2-bit plane against bf16 weights; bytes are packed ones."""
    for N, K in DECODE_SHAPES:
        planes = rotate(lambda N=N, K=K: random_plane(N, K), N * K // 4)
        weights = rotate(
            lambda N=N, K=K: torch.randn(N, K, device="cuda", dtype=torch.bfloat16), 2 * N * K
        )
        scale_N = torch.rand(N, device="cuda") + 0.5
        for batch in DECODE_BATCHES:
            x_MK = torch.randn(batch, K, device="cuda", dtype=torch.bfloat16)
            for dtype in options.dtypes:
                x, _, _ = normalize(x_MK, dtype, False)
                yield Row(
                    f"decode {dtype} batch {batch} {N}x{K}",
                    [lambda x=x, p=p, s=scale_N: plane_matmul(x, p, s) for p in planes],
                    {"cuBLAS bf16": [lambda x=x_MK, w=w: F.linear(x, w) for w in weights]},
                    N * K // 4,
                )


def embedding_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Lookup and gradient of a byte table, symbols skewed as in text; the decode of a matrix."""
    M, V, D = 16384, 259, 2048
    indices = (torch.rand(M, device="cuda").square() * V).long()
    grads = rotate(lambda: torch.randn(M, D, device="cuda", dtype=torch.bfloat16), 2 * M * D)
    table, state = torch.randn(V, D, device="cuda", dtype=torch.bfloat16), random_state(V, D)
    scale = matmul.row_scale(state.log2_scale)
    size = 2 * M * D
    yield Row(
        f"embedding {M}x{D}",
        [lambda: embedding.lookup(indices, state.latent, scale, state.latent.shape[1])] * 8,
        {"torch bf16": [lambda: F.embedding(indices, table)] * 8},
        size,
    )
    yield Row(
        f"embedding backward {M}x{D}",
        [lambda g=g: embedding.lookup_backward(indices, g, V) for g in grads],
        {},
        size,
    )
    states = rotate(lambda: random_state(8192, 8192).latent, 8192 * 8192)
    decode = [lambda s=s: decode_weight(s, torch.float8_e4m3fn, transposed=True) for s in states]
    yield Row("decode of latents, both layouts 8192x8192", decode, {}, 3 * 8192 * 8192)


def shapes_of(options: argparse.Namespace) -> Iterator[tuple[int, ...]]:
    for shape in options.shapes:
        yield tuple(int(size) for size in shape.split("x"))


_TESTS = "tests/arbitor/test_"
OPS = {
    "linear": (linear_rows, [f"{_TESTS}triton_rms_norm.py", f"{_TESTS}triton_matmul.py"]),
    "backward": (
        backward_rows,
        [f"{_TESTS}triton_matmul.py", f"{_TESTS}triton_latent_update.py"],
    ),
    "update": (update_rows, [f"{_TESTS}triton_latent_update.py"]),
    "decode": (decode_rows, [f"{_TESTS}decode_gemv.py"]),
    "embedding": (embedding_rows, [f"{_TESTS}triton_embedding.py"]),
}

if __name__ == "__main__":
    main()
