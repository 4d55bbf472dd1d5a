"""Times the candidate tiles of the matmul kernels: the source of the tables in `configs.py`.

    python -m benchmarks.tune --shapes 16384x4096x4096

Prints the library and the best tiles of each op and shape, fastest first. Shapes are tokens x
outputs x inputs. Triton's cache is filled by --processes first, each compiling its share.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from triton.runtime.errors import OutOfResources

from arbitor.attention.mla import rotation_table
from arbitor.kernel.attention import triton as triton_attention
from arbitor.kernel.attention_heads import triton as triton_heads
from arbitor.kernel.backend import set_backend
from arbitor.kernel.latent_update import triton as triton_update
from arbitor.kernel.matmul import decode_gemv
from arbitor.kernel.matmul import triton as triton_matmul
from arbitor.kernel.matmul.configs import LIBRARY, Choice, GemmConfig
from arbitor.kernel.rms_norm import triton as triton_norm
from benchmarks import attention
from benchmarks.kernels import DECODE_BATCHES, DECODE_SHAPES, TRAINING_SHAPES, UPDATE_SHAPES
from benchmarks.problems import (
    BackwardProblem,
    UpdateProblem,
    float_problem,
    random_plane,
    random_state,
)
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
HEADS_BLOCKS = [(r, w) for r in (8, 16, 32, 64, 128) for w in (1, 2, 4, 8)]
PLANE_TILES = [(n, q, w, 5) for n in (16, 32, 64, 128) for q in (128, 256, 512) for w in (2, 4)]
PLANE_TILES += [(n, q, w, 3) for n in (32, 64) for q in (256, 512, 1024) for w in (2, 4, 8)]
# Rows, warps, registers and steps of the update's tiles.
UPDATE_TILES = [(8, 1, r, s) for r in (128, 168, 255) for s in (4, 8, 16, 32)]
UPDATE_TILES += [(n, w, r, 8) for n, w in ((4, 1), (16, 2), (16, 4), (32, 4)) for r in (128, 168)]
ATTENTION_SHAPES = [(8, 2048, 32, 64), (8, 2048, 16, 128)]
ATTENTION_TILES = [
    triton_attention.Tile(m, n, w, s)
    for m, n, w in ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (64, 128, 8))
    for s in (2, 3, 4)
]
ATTENTION_TILES += [triton_attention.Tile(m, n, 8, 2) for m, n in ((128, 128), (256, 64))]
ATTENTION_TILES += [triton_attention.Tile(32, 64, 4, s) for s in (2, 3, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--shapes", nargs="+", default=TRAINING_SHAPES)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--share", type=int, help="only compile every --processes-th, from this")
    options = parser.parse_args()
    set_backend("triton")
    if options.share is None:
        shares = [
            subprocess.Popen([sys.executable, "-m", "benchmarks.tune", *sys.argv[1:], *share])
            for share in (["--share", str(i)] for i in range(options.processes))
        ]
        for share in shares:
            share.wait()
    for op in options.ops:
        for title, variants in OPS[op](options):
            judge(title, list(variants), options)


def judge(title: str, variants: list[tuple[object, Callable[[], float]]], options) -> None:
    """Times all variants and prints the best; a share of them is only compiled."""
    if options.share is not None:
        for _, time in variants[options.share :: options.processes]:
            time()
        return
    results = [(time(), choice) for choice, time in variants]
    print(title)
    for time, choice in sorted(results, key=lambda result: result[0])[:6]:
        print(f"  {time * 1e6:9.1f} us  {choice}", flush=True)


def matmul_variants(options) -> Iterator[tuple]:
    """The matmuls through the functions that training calls, one choice after another."""
    for shape in options.shapes:
        M, N, K = (int(size) for size in shape.split("x"))
        problem = BackwardProblem(float_problem(M, N, K), random_state(N, K))
        calls = {
            "forward": lambda p=problem: triton_matmul.matmul_forward(
                p.x_forward, p.latent_NK, p.scale_N
            ),
            "backward_x": lambda p=problem: triton_matmul.matmul_backward_x(p.for_x, p.latent_NK),
            "backward_weight": problem.grad_w,
        }
        for op, call in calls.items():

            def timed(choice, call=call):
                triton_matmul.choose_gemm = lambda *_: choice
                return time_of([call])

            yield f"{op} {shape}", [(c, lambda c=c, t=timed: t(c)) for c in choices(op)]


def choices(op: str) -> Iterator[Choice]:
    exact = op == "backward_weight"
    yield LIBRARY
    for tile in TILES:
        for tma in (False, True):
            yield replace(tile, tma=tma, exact=exact)


def norm_variants(options) -> Iterator[tuple]:
    """Rows, columns and warps of the norm, forward and backward."""
    for shape in options.shapes:
        M, _, K = (int(size) for size in shape.split("x"))
        x_MK = float_problem(M, 16, K)["x"]
        _, saved, inverse_rms_M = triton_norm.rms_norm_quantize(x_MK, "fp8", True)
        backward = (x_MK, saved, inverse_rms_M, torch.bfloat16)
        gate_and_up_MX = torch.cat([x_MK, x_MK], dim=1)

        def timed(blocks, kernel, *arguments):
            triton_norm._FORWARD_BLOCKS = triton_norm._BACKWARD_BLOCKS = blocks
            triton_norm._GATED_FORWARD_BLOCKS = triton_norm._GATED_BACKWARD_BLOCKS = blocks
            return time_of([lambda: kernel(*arguments)])

        for name, kernel, arguments in (
            ("forward", triton_norm.rms_norm_quantize, (x_MK, "fp8", True)),
            ("backward", triton_norm.rms_norm_backward_x, backward),
            ("gated forward", triton_norm.rms_norm_quantize, (gate_and_up_MX, "fp8", True, True)),
            ("gated backward", triton_norm.rms_norm_backward_x, (*backward, gate_and_up_MX)),
        ):
            yield (
                f"norm {name} {tuple(x_MK.shape)}",
                [(b, lambda b=b, k=kernel, a=arguments: timed(b, k, *a)) for b in NORM_BLOCKS],
            )


def heads_variants(options) -> Iterator[tuple]:
    """Rows or positions and warps of the heads, as a model of width K has them."""
    for shape in options.shapes:
        M, _, K = (int(size) for size in shape.split("x"))
        T, N = min(M, 2048), K // 64
        sizes = (K, N * 96, 32)
        inputs = [torch.randn(M // T, T, x, device="cuda", dtype=torch.bfloat16) for x in sizes]
        table = rotation_table(T, 16, inputs[0].device)
        *heads, inverse_rms_4R = triton_heads.heads_forward(*inputs, table, N)
        backward = (*map(torch.randn_like, heads), *heads[:2], table, inverse_rms_4R)

        def timed(blocks, kernel, *arguments):
            triton_heads._FORWARD_BLOCKS = triton_heads._BACKWARD_BLOCKS = blocks
            return time_of([lambda: kernel(*arguments)])

        for name, kernel, arguments in (
            ("forward", triton_heads.heads_forward, (*inputs, table, N)),
            ("backward", triton_heads.heads_backward, backward),
        ):
            yield (
                f"heads {name} {M}x{N}x64",
                [(b, lambda b=b, k=kernel, a=arguments: timed(b, k, *a)) for b in HEADS_BLOCKS],
            )


def plane_variants(options) -> Iterator[tuple]:
    """Tiles of the matmul on the 2-bit plane, by batch."""
    for N, K in DECODE_SHAPES:
        planes = [random_plane(N, K) for _ in range(20)]
        scale_N = torch.rand(N, device="cuda")
        for batch in DECODE_BATCHES:
            x_MK = torch.randn(batch, K, device="cuda", dtype=torch.bfloat16)
            x, _, _ = triton_norm.rms_norm_quantize(x_MK, "fp8", False)

            def timed(tile, batch=batch, x=x, planes=planes, scale_N=scale_N):
                decode_gemv._TILES = ((64, 0, tile),)
                return time_of(
                    [lambda p=p: decode_gemv.plane_matmul(x, p, scale_N) for p in planes]
                )

            yield f"plane batch {batch} {N}x{K}", [(t, lambda t=t: timed(t)) for t in PLANE_TILES]


def update_variants(options) -> Iterator[tuple]:
    """Tiles of the update."""
    for N, K in UPDATE_SHAPES:
        problems = [UpdateProblem(random_state(N, K), with_gradient=False) for _ in range(4)]

        def timed(tile, problems=problems):
            rows, warps, registers, steps = tile
            triton_update.TILE = {"BLOCK_N": rows, "num_warps": warps}
            triton_update.REGISTERS = dict.fromkeys((True, False), registers)
            triton_update.STEPS = steps
            return time_of([p.update for p in problems])

        yield f"update {N}x{K}", [(t, lambda t=t: timed(t)) for t in UPDATE_TILES]


def attention_variants(options) -> Iterator[tuple]:
    """Tiles of the three kernels of causal attention."""
    for B, T, N, H in ATTENTION_SHAPES:
        problems = [attention.random_problem(B, T, N, H) for _ in range(2)]
        visible = triton_attention.Visible()
        forward = [(*p[:3], (), visible) for p in problems]
        saved = [triton_attention.attention_forward(*f) for f in forward]
        for_query = [(p[3], *f, *s) for p, f, s in zip(problems, forward, saved, strict=True)]
        delta = [triton_attention.attention_backward_query(*q)[1] for q in for_query]
        for_key = [
            (p[3], *p[:3], False, visible, s[1], d)
            for p, s, d in zip(problems, saved, delta, strict=True)
        ]
        for table, kernel, arguments in (
            ("FORWARD", triton_attention.attention_forward, forward),
            ("BACKWARD_QUERY", triton_attention.attention_backward_query, for_query),
            ("BACKWARD_KEY", triton_attention.attention_backward_key, for_key),
        ):

            def timed(tile, table=table, kernel=kernel, arguments=arguments):
                chosen = getattr(triton_attention, table)
                setattr(triton_attention, table, {128: tile})
                try:
                    return time_of([lambda a=a: kernel(*a) for a in arguments])
                finally:
                    setattr(triton_attention, table, chosen)

            yield (
                f"attention {table} {B}x{T}x{N}x{H}",
                [(t, lambda t=t, timed=timed: timed(t)) for t in ATTENTION_TILES],
            )


OPS = {
    "attention": attention_variants,
    "matmul": matmul_variants,
    "norm": norm_variants,
    "heads": heads_variants,
    "plane": plane_variants,
    "update": update_variants,
}


def time_of(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of a call, infinite for a tile that does not fit."""
    try:
        return seconds(list(calls) if len(calls) > 1 else list(calls) * 4)
    except OutOfResources:
        return float("inf")


if __name__ == "__main__":
    main()
