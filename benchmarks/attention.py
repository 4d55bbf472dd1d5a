"""Times causal attention, forward and backward, against PyTorch's.

    python -m benchmarks.attention

Shapes are sequences x positions x heads x head width. `python -m benchmarks.tune --ops attention`
is the source of the kernels' tiles.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from arbitor.kernel.attention.op import attend
from arbitor.kernel.backend import set_backend
from benchmarks.record import environment
from benchmarks.timing import seconds

SHAPES = ["8x2048x32x64", "8x2048x16x128", "2x8192x32x64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    options = parser.parse_args()
    set_backend("triton")
    print(environment())
    for shape in options.shapes:
        B, T, N, H = (int(size) for size in shape.split("x"))
        problems = [random_problem(B, T, N, H) for _ in range(2)]
        # Two matmuls forward and five backward over half of the pairs, for the windowed one too.
        operations = 2 * B * N * T**2 * H
        print(f"{shape}: forward ms (TFLOP/s), backward ms (TFLOP/s)")
        for name, call, context in contenders():
            with context:
                forward = seconds([lambda p=p, c=call: c(*p[:3]) for p in problems])
                both = seconds([lambda p=p, c=call: gradients(c, *p) for p in problems])
            backward = both - forward
            print(
                f"  {name:22s} {forward * 1e3:7.3f} ({operations / forward / 1e12:4.0f})"
                f" {backward * 1e3:7.3f} ({2.5 * operations / backward / 1e12:4.0f})",
                flush=True,
            )


def contenders() -> Iterator[tuple[str, Callable, contextlib.AbstractContextManager]]:
    yield "ours", attend, contextlib.nullcontext()
    yield "ours, window 128", windowed, contextlib.nullcontext()
    yield "flash, deterministic", pytorch, backend(SDPBackend.FLASH_ATTENTION, True)
    yield "flash", pytorch, backend(SDPBackend.FLASH_ATTENTION, False)
    yield "cuDNN", pytorch, backend(SDPBackend.CUDNN_ATTENTION, False)


@contextlib.contextmanager
def backend(choice: SDPBackend, deterministic: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(deterministic)
    try:
        with sdpa_kernel(choice):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def windowed(query_BTNH: Tensor, key_BTNH: Tensor, value_BTNH: Tensor) -> Tensor:
    """A window of 128 exact keys and one compressed key for 16 positions before it."""
    compressed = tuple(x.detach()[:, 15::16] for x in (key_BTNH, value_BTNH))
    return attend(query_BTNH, key_BTNH, value_BTNH, compressed, window=128, stride=16)


def pytorch(query_BTNH: Tensor, key_BTNH: Tensor, value_BTNH: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (query_BTNH, key_BTNH, value_BTNH))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def gradients(call: Callable[..., Tensor], query, key, value, grad) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    return torch.autograd.grad(call(*leaves), leaves, grad)


def random_problem(B: int, T: int, N: int, H: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value as the model passes them, the value a slice; the output's gradient."""
    x = [torch.randn(B, T, N, H, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    query, key = (F.rms_norm(normal, (H,)) for normal in x[:2])
    expanded = torch.randn(B, T, N, 3 * H // 2, device="cuda", dtype=torch.bfloat16)
    return query, key, expanded[..., H // 2 :], x[2]


if __name__ == "__main__":
    main()
