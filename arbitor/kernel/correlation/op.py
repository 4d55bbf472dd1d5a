"""Correlation of a slot's gradient with the trits, on the backend in use.

Shape letters: N rows (outputs), K columns (inputs), G groups = ceil(K / group_size). Triton is
imported where it runs: a CPU needs none.
"""

from torch import Tensor

from arbitor.kernel.backend import count_path, runs_triton
from arbitor.kernel.correlation import reference


def accumulate_correlation(
    grad_NK: Tensor, trits_NK: Tensor, corr_step_NG: Tensor, group_size: int, counters: Tensor
) -> None:
    """Adds one slot's sums of sign(gradient) * trit to int32 `corr_step_NG`.

    Adds the number of non-finite entries to `counters[0]`, int64; nothing waits for the device.
    """
    counters[0] += grad_NK.numel() - grad_NK.isfinite().sum()
    if runs_triton(grad_NK):
        from arbitor.kernel.correlation import triton

        count_path("correlation", "triton")
        triton.accumulate_correlation(grad_NK.contiguous(), trits_NK, corr_step_NG, group_size)
        return
    count_path("correlation", "torch")
    reference.accumulate_correlation(grad_NK, trits_NK, corr_step_NG, group_size)
