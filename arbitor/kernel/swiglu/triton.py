"""SwiGLU on a block that a kernel has loaded. Oracle: `reference.py`."""

import triton
import triton.language as tl


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up of float32 blocks."""
    return gate * _sigmoid(gate) * up


@triton.jit
def swiglu_gradient(grad, gate, up):
    """Gradients with respect to gate and up."""
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu


@triton.jit
def _sigmoid(x):
    """Without the exponential of a large number, which would overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1 + small)
