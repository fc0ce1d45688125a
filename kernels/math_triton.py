"""What the Triton kernels share: pointwise functions, accurate to float32 for every argument, and a prefetch."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x):
    """2^x in float32: of a float32 exponent the GPU's approximation, 2e-7 off; of a float64 one to a rounding."""
    return rounded_exp2(x) if x.dtype == tl.float64 else tl.exp2(x)


@triton.jit
def rounded_exp2(x):
    """2^x in float32, to a rounding."""
    x = tl.maximum(x, -200.0)  # float32 has nothing above 0 there; and not infinite, whose rest would be NaN
    whole = tl.floor(x + 0.5)
    v = (x - whole).to(tl.float32) * 0.69314718056
    p = v * 1.984126984e-4 + 1.388888889e-3  # exp(v)'s series
    p = p * v + 8.333333333e-3
    p = p * v + 4.166666667e-2
    p = p * v + 0.1666666667
    p = p * v + 0.5
    return (p * v * v + v + 1.0) * tl.exp2(whole.to(tl.float32))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), with one exponential and one reciprocal."""
    return tl.fdiv(1.0, 1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to float32's relative precision: log(1 + u) = u p(u), with p fitted on [0, 1] to 5e-9."""
    u = tl.exp2(-tl.abs(x) * LOG2E)
    p = u * -0.003244021118 + 0.01985144407
    p = p * u - 0.05695949988
    p = p * u + 0.106036514
    p = p * u - 0.1530559051
    p = p * u + 0.1967593854
    p = p * u - 0.2495413352
    p = p * u + 0.333299624
    p = p * u - 0.4999990242
    p = p * u + 0.9999999953
    return tl.maximum(x, 0.0) + u * p


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


@triton.jit
def prefetch(pointers):
    """Asks for these addresses in the L2 cache. (The interpreter does not know it.)"""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    addresses = pointers.to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(asm, "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)
