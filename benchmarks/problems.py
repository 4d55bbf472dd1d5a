"""Operands of the kernel benchmarks, spread as training leaves them, and the float baselines."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from arbitor.kernel.latent_update.moments import step_rates, update_words
from arbitor.kernel.latent_update.slots import slot_format_of
from arbitor.kernel.latent_update.state import TernaryState, init_state
from arbitor.kernel.latent_update.triton import quantize_slot_, update_
from arbitor.kernel.matmul import op as matmul
from arbitor.kernel.matmul import triton as triton_matmul
from arbitor.kernel.rms_norm.op import normalize
from benchmarks.timing import num_buffers

SLOTS = slot_format_of(16)


class BackwardProblem:
    """Operands of the backward pass and the update of one linear."""

    def __init__(self, problem: dict[str, torch.Tensor], state: TernaryState):
        self.update = UpdateProblem(state, with_gradient=False)
        self.grad_MN, self.latent_NK = problem["grad"], state.latent
        self.scale_N = matmul.row_scale(state.log2_scale)
        self.x_forward, self.x, _ = normalize(problem["x"], "fp8", True)
        self.for_x, self.for_weight = self.quantize()

    def quantize(self) -> tuple:
        return triton_matmul.quantize_gradient(self.grad_MN, self.scale_N, self.x.scale)

    def grad_x(self) -> None:
        for_x, _ = self.quantize()
        triton_matmul.matmul_backward_x(for_x, self.latent_NK)

    def grad_w(self) -> torch.Tensor:
        return triton_matmul.matmul_backward_weight(self.for_weight, self.x)[0]

    def grad_w_and_update(self) -> None:
        self.update.convert(self.grad_w())
        self.update.update()

    def everything(self) -> None:
        self.grad_x()
        self.grad_w_and_update()


class UpdateProblem:
    """State, gradient sum and arguments of one latent update; also a stored gradient of a slot."""

    def __init__(self, state: TernaryState, with_gradient: bool = True):
        shape = state.latent.shape
        self.state = state
        self.sum_NK = torch.randint(-200, 200, shape, device="cuda", dtype=SLOTS.sum_dtype)
        self.grad_NK = torch.randn(shape, device="cuda") if with_gradient else None
        self.counters = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.update_counters = torch.zeros(3, dtype=torch.int64, device="cuda")
        words = update_words(step_rates(3 << 16, 168), key=1, updates=100)
        self.words = torch.tensor(words, dtype=torch.int32, device="cuda")

    def convert(self, grad_NK: torch.Tensor | None = None) -> None:
        grad_NK = self.grad_NK if grad_NK is None else grad_NK
        key = self.words[:1]
        quantize_slot_(grad_NK, self.state.row_moment, SLOTS, key, self.sum_NK, self.counters)

    def update(self) -> None:
        update_(self.state, self.sum_NK, SLOTS, self.words, self.update_counters)


def rotate(make: Callable[[], Any], bytes_of_one: int) -> list[Any]:
    return [make() for _ in range(num_buffers(bytes_of_one))]


def float_problem(M: int, N: int, K: int) -> dict[str, torch.Tensor]:
    sizes = {"x": (M, K), "w": (N, K), "grad": (M, N)}
    return {n: torch.randn(s, device="cuda", dtype=torch.bfloat16) for n, s in sizes.items()}


def random_state(N: int, K: int) -> TernaryState:
    """A state of the right shape with latents spread as training leaves them."""
    small = vars(init_state(N, 64, 1.0, seed=0, name="benchmark"))
    state = {name: tensor.cuda() for name, tensor in small.items()}
    state["latent"] = (52.5 * torch.randn(N, K, device="cuda")).clamp_(-127, 127).to(torch.int8)
    state["momentum"] = torch.randint(-127, 128, (N, K), device="cuda", dtype=torch.int8)
    groups = -(-K // 64)
    state["momentum_exponent"] = torch.zeros(N, groups, dtype=torch.int8, device="cuda")
    state["col_moment"] = torch.zeros(K, dtype=torch.int16, device="cuda")
    return TernaryState(**state)


def random_plane(N: int, K: int) -> torch.Tensor:
    """Trits of uniform probability: the pattern 10, which no trit has, becomes 00."""
    plane = torch.randint(0, 256, (N, K // 4), device="cuda", dtype=torch.uint8)
    high, low = plane & 0xAA, plane & 0x55
    return (high & (low << 1)) | low


def adamw_problem(weight: torch.Tensor) -> torch.optim.AdamW:
    """Fused AdamW with float32 weight, gradient and moments."""
    parameter = torch.nn.Parameter(weight.detach().float())
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True, capturable=True)
    optimizer.step()
    return optimizer


def norm_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(norm(x), w)


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)
