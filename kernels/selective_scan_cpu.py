"""The selective scan on a CPU, compiled with numba: imported by the first call that needs it.

A thread owns a run of channels and walks through time with their states in its first-level cache, laid out (n, channel)
so that the innermost loop over channels vectorises. Nothing of size (b, l, e, n) exists: the backward pass takes up the
states stored every STEPS steps, recomputes one such stretch, and walks it backwards. Threads add up dB and dC in
buffers of their own, summed in a fixed order: results repeat exactly for a given number of threads.
"""

import math

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

STEPS = 64  # steps between stored states
_BLOCK = 64  # channels that a thread handles together: with n = 16 a stretch's states and decays take 512 KiB
# Multiplications and additions may fuse; sums over channels may be reordered. NaN and inf keep their meaning.
_FLAGS, _SUM_FLAGS = {"contract"}, {"contract", "reassoc"}


def _compiled(flags: set[str] = _FLAGS, **options):
    def decorate(function):
        try:
            return numba.njit(fastmath=flags, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written: compile every time
            return numba.njit(fastmath=flags, **options)(function)

    return decorate


# exp(x) = 2^k exp(r), r = x - k ln 2 (Cody and Waite: ln 2 in two parts), exp(r) by the polynomial of Cephes' expf.
# Adding 1.5 * 2^23 rounds x / ln 2 to the integer k and leaves k in the low bits, from where a shift makes it an
# exponent. Results stay within the normal numbers; the relative error is below 1e-7.
_LOW, _HIGH = np.float32(-87.33654), np.float32(88.37626)
_ROUND, _INVERSE_LN2 = np.float32(1.5 * 2**23), np.float32(1 / math.log(2))
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _EXPONENT_BITS, _ONE_BITS = np.float32(1), np.int32(23), np.int32(0x3F800000)


@intrinsic
def _bits(typing_context, value):
    """The bits of a float32 as an int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@intrinsic
def _from_bits(typing_context, value):
    """The float32 with the bits of an int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@_compiled()
def _exp_float32(x):
    x = _LOW if x < _LOW else x  # in this form a NaN passes
    x = _HIGH if x > _HIGH else x
    rounded = x * _INVERSE_LN2 + _ROUND
    k = rounded - _ROUND
    r = x - k * _LN2_HIGH
    r = r - k * _LN2_LOW
    p = _P0 * r + _P1
    p = p * r + _P2
    p = p * r + _P3
    p = p * r + _P4
    p = p * r + _P5
    p = p * (r * r) + r + _ONE
    return p * _from_bits((_bits(rounded) << _EXPONENT_BITS) + _ONE_BITS)


def _exp(x):
    """The vectorisable exponential for float32, the C library's for float64."""
    raise NotImplementedError("inside compiled code only")


@overload(_exp)
def _overload_exp(x):
    if x == types.float32:
        return lambda x: _exp_float32(x)
    return lambda x: math.exp(x)


# Rows of channels. Each loop writes at most two arrays: LLVM gives up on vectorising when it would have to check more
# than eight pairs of arrays for overlap.


@_compiled()
def _advance(h, A, dt, u, b, c, y):
    """h <- exp(dt A) h + u b and y += h c."""
    for i in range(h.shape[0]):
        state = _exp(dt[i] * A[i]) * h[i] + u[i] * b
        h[i] = state
        y[i] += state * c


@_compiled()
def _advance_keeping(before, A, dt, u, b, decay, after):
    """As _advance, keeping the decay and the new state."""
    for i in range(before.shape[0]):
        factor = _exp(dt[i] * A[i])
        decay[i] = factor
        after[i] = factor * before[i] + u[i] * b


@_compiled()
def _receive(g, dy, c, du, b):
    """Adds the output's gradient to the state's gradient g, and g's share to du."""
    for i in range(g.shape[0]):
        total = g[i] + dy[i] * c
        g[i] = total
        du[i] += total * b


@_compiled()
def _multiply(target, factor):
    for i in range(target.shape[0]):
        target[i] *= factor[i]


@_compiled()
def _add_product(target, a, b, c):
    """target += a b c."""
    for i in range(target.shape[0]):
        target[i] += a[i] * b[i] * c[i]


@_compiled()
def _copy_turned(target, source):
    """target <- source^T."""
    for i in range(target.shape[0]):
        for j in range(target.shape[1]):
            target[i, j] = source[j, i]


@_compiled(_SUM_FLAGS)
def _dot(a, b):
    total = a[0] * b[0]
    for i in range(1, a.shape[0]):
        total += a[i] * b[i]
    return total


@_compiled()
def _channels(task, parts, per_group, groups):
    """Of a thread's task: row of the batch, group, first and last channel, and its part of the group."""
    part, row_and_group = task % parts, task // parts
    row, group = row_and_group // groups, row_and_group % groups
    size = -(-per_group // parts)
    first = group * per_group + min(part * size, per_group)
    return row, group, first, min(first + size, (group + 1) * per_group), part


@_compiled()
def _forward_task(x, dt, A, B, C, initial_state, resets, y, final_state, starts, low, high):
    """Channels low to high of one row of the batch and one group; x (l, e), B (l, n), states (e, n)."""
    n, width = B.shape[1], high - low
    h, decay_rates = np.empty((n, width), x.dtype), np.empty((n, width), x.dtype)
    _copy_turned(h, initial_state[low:high])
    _copy_turned(decay_rates, A[low:high])
    u, out = np.empty(width, x.dtype), np.empty(width, x.dtype)
    for t in range(x.shape[0]):
        if t % STEPS == 0:
            _copy_turned(starts[t // STEPS, low:high], h)
        if resets.shape[0] > 0 and resets[t]:
            h[:] = 0
        dt_t = dt[t, low:high]
        for i in range(width):
            u[i] = x[t, low + i] * dt_t[i]
            out[i] = 0
        for j in range(n):
            _advance(h[j], decay_rates[j], dt_t, u, B[t, j], C[t, j], out)
        for i in range(width):
            y[t, low + i] = out[i]
    _copy_turned(final_state[low:high], h)


@_compiled(parallel=True)
def _forward(x, dt, A, B, C, initial_state, resets, parts, y, final_state, starts):
    b, groups, e = x.shape[0], B.shape[2], x.shape[2]
    for task in numba.prange(b * groups * parts):
        row, group, first, last, _ = _channels(task, parts, e // groups, groups)
        for low in range(first, last, _BLOCK):
            _forward_task(
                x[row], dt[row], A, B[row, :, group], C[row, :, group], initial_state[row], resets[row], y[row],
                final_state[row], starts[row], low, min(low + _BLOCK, last),
            )  # fmt: skip


@_compiled()
def _recompute(x, dt, decay_rates, B, resets, states, decays):
    """Fills states[1:] and decays[:-1] of a stretch from its start states[0], all (steps, n, channels)."""
    steps, width = x.shape
    u = np.empty(width, x.dtype)
    zero = np.zeros(width, x.dtype)
    for k in range(steps):
        reset = resets.shape[0] > 0 and resets[k]
        for i in range(width):
            u[i] = x[k, i] * dt[k, i]
        for j in range(B.shape[1]):
            before = zero if reset else states[k, j]
            _advance_keeping(before, decay_rates[j], dt[k], u, B[k, j], decays[k, j], states[k + 1, j])


@_compiled()
def _retreat(dy, x, dt, decay_rates, B, C, resets, states, decays, dx, ddt, dA, dB, dC):
    """Walks a stretch backwards. decays[k + 1] holds what flows back from step k + 1; decays[0] leaves the stretch."""
    steps, width = x.shape
    u, du, through_decay = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(width, x.dtype)
    for k in range(steps - 1, -1, -1):
        reset = resets.shape[0] > 0 and resets[k]
        for i in range(width):
            u[i] = x[k, i] * dt[k, i]
            du[i] = 0
            through_decay[i] = 0
        for j in range(B.shape[1]):
            g = decays[k + 1, j]
            _receive(g, dy[k], C[k, j], du, B[k, j])
            dC[k, j] += _dot(dy[k], states[k + 1, j])
            dB[k, j] += _dot(g, u)
            if reset:
                decays[k, j, :] = 0
            else:
                _multiply(decays[k, j], g)
                _add_product(through_decay, decays[k, j], states[k, j], decay_rates[j])
                _add_product(dA[j], decays[k, j], states[k, j], dt[k])
        for i in range(width):
            dx[k, i] = dt[k, i] * du[i]
            ddt[k, i] = through_decay[i] + x[k, i] * du[i]


@_compiled()
def _backward_task(dy, dfinal, x, dt, A, B, C, starts, resets, dx, ddt, dA, dB, dC, dinitial, low, high):
    """Channels low to high of one row of the batch and one group, as in _forward_task."""
    n, width = B.shape[1], high - low
    states, decays = np.empty((STEPS + 1, n, width), x.dtype), np.empty((STEPS + 1, n, width), x.dtype)
    decay_rates, carried = np.empty((n, width), x.dtype), np.empty((n, width), x.dtype)
    dA_total, dA_stretch = np.zeros((n, width), np.float64), np.empty((n, width), x.dtype)
    _copy_turned(decay_rates, A[low:high])
    _copy_turned(carried, dfinal[low:high])
    for stretch in range(starts.shape[0] - 1, -1, -1):
        t0 = stretch * STEPS
        t1 = min(t0 + STEPS, x.shape[0])
        x_part, dt_part, B_part, resets_part = x[t0:t1, low:high], dt[t0:t1, low:high], B[t0:t1], resets[t0:t1]
        _copy_turned(states[0], starts[stretch, low:high])
        _recompute(x_part, dt_part, decay_rates, B_part, resets_part, states, decays)
        for j in range(n):
            for i in range(width):
                decays[t1 - t0, j, i] = carried[j, i]
                dA_stretch[j, i] = 0
        _retreat(
            dy[t0:t1, low:high], x_part, dt_part, decay_rates, B_part, C[t0:t1], resets_part, states, decays,
            dx[t0:t1, low:high], ddt[t0:t1, low:high], dA_stretch, dB[t0:t1], dC[t0:t1],
        )  # fmt: skip
        for j in range(n):
            for i in range(width):
                carried[j, i] = decays[0, j, i]
                dA_total[j, i] += dA_stretch[j, i]
    _copy_turned(dA[low:high], dA_total)
    _copy_turned(dinitial[low:high], carried)


@_compiled(parallel=True)
def _backward(dy, dfinal, x, dt, A, B, C, starts, resets, parts, dx, ddt, dA, dB, dC, dinitial):
    b, groups, e = x.shape[0], B.shape[2], x.shape[2]
    for task in numba.prange(b * groups * parts):
        row, group, first, last, part = _channels(task, parts, e // groups, groups)
        for low in range(first, last, _BLOCK):
            _backward_task(
                dy[row], dfinal[row], x[row], dt[row], A, B[row, :, group], C[row, :, group], starts[row], resets[row],
                dx[row], ddt[row], dA[row], dB[part, row, :, group], dC[part, row, :, group], dinitial[row], low,
                min(low + _BLOCK, last),
            )  # fmt: skip


def _arrays(dtype: torch.dtype, *tensors: Tensor) -> list[np.ndarray]:
    return [t.detach().to(dtype).contiguous().numpy() for t in tensors]


def _resets(resets: Tensor | None, b: int) -> np.ndarray:
    return np.empty((b, 0), np.bool_) if resets is None else resets.contiguous().numpy()


def _parts(b: int, e: int, groups: int) -> int:
    """Into how many parts to cut a group's channels: equal work for torch's threads, at least 16 channels a part."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return min(threads // math.gcd(b * groups, threads), -(-e // groups // 16))


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, e), the final state (b, e, n) and the states before every STEPS-th step (b, c, e, n)."""
    dtype, (b, l, e) = initial_state.dtype, x.shape
    y = torch.empty(b, l, e, dtype=dtype)
    final_state = torch.empty(initial_state.shape, dtype=dtype)
    starts = torch.empty(b, -(-l // STEPS), *initial_state.shape[1:], dtype=dtype)
    inputs = _arrays(dtype, x, dt, A, B, C, initial_state)
    outputs = [t.numpy() for t in (y, final_state, starts)]
    _forward(*inputs, _resets(resets, b), _parts(b, e, B.shape[2]), *outputs)
    return y, final_state, starts


def backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C and the initial state, in the states' dtype."""
    dtype, (b, l, e) = starts.dtype, x.shape
    parts = _parts(b, e, B.shape[2])
    dx, ddt = torch.empty(b, l, e, dtype=dtype), torch.empty(b, l, e, dtype=dtype)
    dA = torch.empty(b, *A.shape, dtype=dtype)
    dB, dC = torch.zeros(parts, *B.shape, dtype=dtype), torch.zeros(parts, *B.shape, dtype=dtype)
    dinitial = torch.empty(dfinal.shape, dtype=dtype)
    inputs = _arrays(dtype, dy, dfinal, x, dt, A, B, C, starts)
    outputs = [t.numpy() for t in (dx, ddt, dA, dB, dC, dinitial)]
    _backward(*inputs, _resets(resets, b), parts, *outputs)
    dB, dC = (t[0] if parts == 1 else t.sum(0) for t in (dB, dC))
    return dx, ddt, dA.sum(0), dB, dC, dinitial
