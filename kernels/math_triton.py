"""Pointwise functions that the Triton kernels share, accurate to float32 for every argument."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), with one exponential and one reciprocal."""
    return tl.fdiv(1.0, 1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def softplus(x):
    """log(1 + exp(x)). The usual log(1 + u) loses small u, that is small step sizes; 2 atanh(u / (2 + u)) does not."""
    u = tl.exp2(-tl.abs(x) * LOG2E)
    s = u / (2.0 + u)  # at most 1/3: seven terms of the series reach float32
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def step_size(dt, bias, SOFTPLUS: tl.constexpr, low, high):
    """dt as the scans use it, from its raw value: plus bias, through softplus, clamped (discretize.step_size)."""
    dt += bias
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.minimum(tl.maximum(dt, low), high)


@triton.jit
def step_size_gradient(ddt, dt, bias, SOFTPLUS: tl.constexpr, low, high):
    """The gradient of the raw dt (and of the bias) from that of the step size."""
    dt += bias
    value = dt
    if SOFTPLUS:
        value = softplus(dt)
        ddt *= sigmoid(dt)
    return tl.where((value >= low) & (value <= high), ddt, 0.0)
