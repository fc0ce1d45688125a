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

STEPS = 64  # as in selective_scan.py; a constant of this file, since the compiled code is cached by this file
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
    """exp; in compiled code the vectorisable one for float32 and the C library's for float64."""
    return math.exp(x)


@overload(_exp)
def _overload_exp(x):
    if x == types.float32:
        return lambda x: _exp_float32(x)
    return lambda x: math.exp(x)


# Loops index whole arrays, because numba counts references to every slice of one, atomically; and each innermost loop
# writes at most two arrays, because LLVM vectorises only where few pairs of arrays need checking for overlap.


@_compiled()
def _copy_turned(target, source):
    """target <- source^T."""
    for i in range(target.shape[0]):
        for j in range(target.shape[1]):
            target[i, j] = source[j, i]


@_compiled()
def _flush(rows, tiny):
    """Zeroes what has decayed to nothing: below the normal numbers each operation takes some 100 times longer."""
    for j in range(rows.shape[0]):
        for i in range(rows.shape[1]):
            if abs(rows[j, i]) < tiny:
                rows[j, i] = 0


@_compiled(_SUM_FLAGS)
def _dot(a, k, b, m, j):
    """sum_i a[k, i] b[m, j, i]."""
    total = a[k, 0] * b[m, j, 0]
    for i in range(1, a.shape[1]):
        total += a[k, i] * b[m, j, i]
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
def _forward_task(x, dt, A, B, C, initial_state, resets, tiny, y, final_state, starts, row, group, low, high):
    """Channels low to high of one row of the batch and one group."""
    n, width = B.shape[3], high - low
    h, rates = np.empty((n, width), x.dtype), np.empty((n, width), x.dtype)
    _copy_turned(h, initial_state[row, low:high])
    _copy_turned(rates, A[low:high])
    dt_t, u, out = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(width, x.dtype)
    for t in range(x.shape[1]):
        if t % STEPS == 0:
            _flush(h, tiny)
            starts[row, t // STEPS, :, low:high] = h
        if resets.shape[1] > 0 and resets[row, t]:
            h[:] = 0
        for i in range(width):
            dt_t[i] = dt[row, t, low + i]
            u[i] = x[row, t, low + i] * dt[row, t, low + i]
            out[i] = 0
        for j in range(n):
            b, c = B[row, t, group, j], C[row, t, group, j]
            for i in range(width):
                state = _exp(dt_t[i] * rates[j, i]) * h[j, i] + u[i] * b
                h[j, i] = state
                out[i] += state * c
        for i in range(width):
            y[row, t, low + i] = out[i]
    _copy_turned(final_state[row, low:high], h)


@_compiled(parallel=True)
def _forward(x, dt, A, B, C, initial_state, resets, tiny, parts, y, final_state, starts):
    groups, per_group = B.shape[2], x.shape[2] // B.shape[2]
    for task in numba.prange(x.shape[0] * groups * parts):
        row, group, first, last, _ = _channels(task, parts, per_group, groups)
        for low in range(first, last, _BLOCK):
            high = min(low + _BLOCK, last)
            _forward_task(
                x, dt, A, B, C, initial_state, resets, tiny, y, final_state, starts, row, group, low, high
            )  # fmt: skip


@_compiled()
def _recompute(u, dt, rates, B, resets, states, decays, row, group, t0):
    """Fills states[1:] and decays[:-1], (steps, n, channels), of the stretch from t0, from its start states[0]."""
    n, width = rates.shape
    for k in range(u.shape[0]):
        reset = resets.shape[1] > 0 and resets[row, t0 + k]
        for j in range(n):
            b = B[row, t0 + k, group, j]
            for i in range(width):
                decays[k, j, i] = _exp(dt[k, i] * rates[j, i])
            if reset:
                for i in range(width):
                    states[k + 1, j, i] = u[k, i] * b
            else:
                for i in range(width):
                    states[k + 1, j, i] = decays[k, j, i] * states[k, j, i] + u[k, i] * b


@_compiled()
def _retreat(dy, u, dt, rates, B, C, resets, states, decays, du, through_decay, y, dA, dB, dC, row, group, part, t0):
    """Walks a stretch backwards. decays[k + 1] holds what flows back from step k + 1; decays[0] leaves the stretch.

    du is the gradient of u = dt x, through_decay that of dt through the decay; y is the output once more, if it has
    room; dA, dB and dC are added to.
    """
    n, width = rates.shape
    for k in range(u.shape[0] - 1, -1, -1):
        reset = resets.shape[1] > 0 and resets[row, t0 + k]
        for i in range(width):
            du[k, i] = 0
            through_decay[k, i] = 0
        if y.shape[0] > 0:
            for i in range(width):
                y[k, i] = 0
            for j in range(n):
                c = C[row, t0 + k, group, j]
                for i in range(width):
                    y[k, i] += states[k + 1, j, i] * c
        for j in range(n):
            b, c = B[row, t0 + k, group, j], C[row, t0 + k, group, j]
            for i in range(width):
                g = decays[k + 1, j, i] + dy[k, i] * c
                decays[k + 1, j, i] = g
                du[k, i] += g * b
            dC[part, row, t0 + k, group, j] += _dot(dy, k, states, k + 1, j)
            dB[part, row, t0 + k, group, j] += _dot(u, k, decays, k + 1, j)
            if reset:
                for i in range(width):
                    decays[k, j, i] = 0
                continue
            for i in range(width):
                decays[k, j, i] *= decays[k + 1, j, i]
            for i in range(width):
                through_decay[k, i] += decays[k, j, i] * states[k, j, i] * rates[j, i]
            for i in range(width):
                dA[j, i] += decays[k, j, i] * states[k, j, i] * dt[k, i]


@_compiled()
def _backward_task(
    dy, dfinal, x, dt, A, B, C, starts, resets, tiny, dx, ddt, y, dA, dB, dC, dinitial, row, group, part, low, high
):  # fmt: skip
    """Channels low to high of one row of the batch and one group."""
    l, n, width = x.shape[1], B.shape[3], high - low
    states, decays = np.empty((STEPS + 1, n, width), x.dtype), np.empty((STEPS + 1, n, width), x.dtype)
    rates, carried = np.empty((n, width), x.dtype), np.empty((n, width), x.dtype)
    dA_total, dA_stretch = np.zeros((n, width), np.float64), np.empty((n, width), x.dtype)
    dy_part, dt_part = np.empty((STEPS, width), x.dtype), np.empty((STEPS, width), x.dtype)
    u, du = np.empty((STEPS, width), x.dtype), np.empty((STEPS, width), x.dtype)
    through_decay = np.empty((STEPS, width), x.dtype)
    y_part = np.empty((STEPS if y.shape[0] > 0 else 0, width), x.dtype)
    _copy_turned(rates, A[low:high])
    _copy_turned(carried, dfinal[row, low:high])
    for stretch in range(starts.shape[1] - 1, -1, -1):
        t0 = stretch * STEPS
        steps = min(STEPS, l - t0)
        for k in range(steps):
            for i in range(width):
                dy_part[k, i] = dy[row, t0 + k, low + i]
                dt_part[k, i] = dt[row, t0 + k, low + i]
                u[k, i] = x[row, t0 + k, low + i] * dt[row, t0 + k, low + i]
        states[0] = starts[row, stretch, :, low:high]
        _recompute(u[:steps], dt_part, rates, B, resets, states, decays, row, group, t0)
        _flush(carried, tiny)
        for j in range(n):
            for i in range(width):
                decays[steps, j, i] = carried[j, i]
                dA_stretch[j, i] = 0
        _retreat(
            dy_part, u[:steps], dt_part, rates, B, C, resets, states, decays, du, through_decay, y_part, dA_stretch,
            dB, dC, row, group, part, t0,
        )  # fmt: skip
        for j in range(n):
            for i in range(width):
                carried[j, i] = decays[0, j, i]
                dA_total[j, i] += dA_stretch[j, i]
        for k in range(steps):
            for i in range(width):
                dx[row, t0 + k, low + i] = dt_part[k, i] * du[k, i]
                ddt[row, t0 + k, low + i] = through_decay[k, i] + x[row, t0 + k, low + i] * du[k, i]
        for k in range(min(steps, y_part.shape[0])):
            for i in range(width):
                y[row, t0 + k, low + i] = y_part[k, i]
    _copy_turned(dA[row, low:high], dA_total)
    _copy_turned(dinitial[row, low:high], carried)


@_compiled(parallel=True)
def _backward(dy, dfinal, x, dt, A, B, C, starts, resets, tiny, parts, dx, ddt, y, dA, dB, dC, dinitial):
    groups, per_group = B.shape[2], x.shape[2] // B.shape[2]
    for task in numba.prange(x.shape[0] * groups * parts):
        row, group, first, last, part = _channels(task, parts, per_group, groups)
        for low in range(first, last, _BLOCK):
            high = min(low + _BLOCK, last)
            _backward_task(
                dy, dfinal, x, dt, A, B, C, starts, resets, tiny, dx, ddt, y, dA, dB, dC, dinitial, row, group, part,
                low, high,
            )  # fmt: skip


@_compiled()
def _edge_task(v, dt, A, m, resets, nothing, at_end, state, decay, row, group, low, high):
    """Channels low to high of one row of the batch and one group, step by step away from the edge.

    STEPS steps are summed from zero and then added with the decay between them and the edge, so that few roundings add
    up. Ends at another sequence, and where no exponent reaches `nothing`.
    """
    l, n, width = v.shape[1], m.shape[3], high - low
    h, part, rates = np.zeros((n, width), v.dtype), np.empty((n, width), v.dtype), np.empty((n, width), v.dtype)
    _copy_turned(rates, A[low:high])
    total, outer = np.zeros(width, np.float64), np.zeros(width, v.dtype)  # the sum of dt from the edge to these steps
    reach, v_t = np.empty(width, v.dtype), np.empty(width, v.dtype)  # and from there to one of them
    broken = False
    for first in range(0, l, STEPS):
        part[:] = 0
        reach[:] = 0
        for k in range(first, min(first + STEPS, l)):
            t = l - 1 - k if at_end else k
            broken = resets.shape[1] > 0 and resets[row, t]
            if broken and not at_end:
                break
            for i in range(width):
                v_t[i] = v[row, t, low + i]
                if not at_end:
                    reach[i] += dt[row, t, low + i]
            for j in range(n):
                m_t = m[row, t, group, j]
                for i in range(width):
                    part[j, i] += _exp(reach[i] * rates[j, i]) * (v_t[i] * m_t)
            if broken:
                break
            if at_end:
                for i in range(width):
                    reach[i] += dt[row, t, low + i]
        for j in range(n):
            for i in range(width):
                h[j, i] += _exp(outer[i] * rates[j, i]) * part[j, i]
        for i in range(width):
            total[i] += reach[i]
            outer[i] = total[i]
        largest = nothing
        for j in range(n):
            for i in range(width):
                largest = max(largest, outer[i] * rates[j, i])
        if broken or largest == nothing:
            break
    _copy_turned(state[row, low:high], h)
    for j in range(n):
        for i in range(width):
            rates[j, i] = 0 if broken else _exp(outer[i] * rates[j, i])
    _copy_turned(decay[row, low:high], rates)


@_compiled(parallel=True)
def _at_edge(v, dt, A, m, resets, nothing, at_end, parts, state, decay):
    groups, per_group = m.shape[2], v.shape[2] // m.shape[2]
    for task in numba.prange(v.shape[0] * groups * parts):
        row, group, first, last, _ = _channels(task, parts, per_group, groups)
        for low in range(first, last, _BLOCK):
            high = min(low + _BLOCK, last)
            _edge_task(v, dt, A, m, resets, nothing, at_end, state, decay, row, group, low, high)


def _arrays(dtype: torch.dtype, *tensors: Tensor) -> list[np.ndarray]:
    return [t.detach().to(dtype).contiguous().numpy() for t in tensors]


def _resets(resets: Tensor | None, b: int) -> np.ndarray:
    return np.empty((b, 0), np.bool_) if resets is None else resets.contiguous().numpy()


def _tiny(dtype: torch.dtype) -> float:
    """A little above the smallest normal number."""
    return 1024 * torch.finfo(dtype).tiny


def _parts(b: int, e: int, groups: int) -> int:
    """Into how many parts to cut a group's channels: equal work for torch's threads, at least 16 channels a part."""
    allowed = torch.get_num_threads()
    threads = min(allowed, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    if torch.get_num_threads() != allowed:  # starting, numba tells OpenMP, which torch uses, too, how many it has
        torch.set_num_threads(allowed)
    return min(threads // math.gcd(b * groups, threads), -(-e // groups // 16))


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, e), the final state (b, e, n) and the states before every STEPS-th step (b, c, n, e)."""
    dtype, (b, l, e), n = initial_state.dtype, x.shape, A.shape[1]
    y = torch.empty(b, l, e, dtype=dtype)
    final_state = torch.empty(initial_state.shape, dtype=dtype)
    starts = torch.empty(b, -(-l // STEPS), n, e, dtype=dtype)
    inputs = _arrays(dtype, x, dt, A, B, C, initial_state)
    outputs = [t.numpy() for t in (y, final_state, starts)]
    _forward(*inputs, _resets(resets, b), _tiny(dtype), _parts(b, e, B.shape[2]), *outputs)
    return y, final_state, starts


def backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor,
    resets: Tensor | None, with_y: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C and the initial state, and y again (empty if not wanted), in the states' dtype."""
    dtype, (b, l, e) = starts.dtype, x.shape
    parts = _parts(b, e, B.shape[2])
    dx, ddt = torch.empty(b, l, e, dtype=dtype), torch.empty(b, l, e, dtype=dtype)
    y = torch.empty(b if with_y else 0, l, e, dtype=dtype)
    dA = torch.empty(b, *A.shape, dtype=dtype)
    dB, dC = torch.zeros(parts, *B.shape, dtype=dtype), torch.zeros(parts, *B.shape, dtype=dtype)
    dinitial = torch.empty(dfinal.shape, dtype=dtype)
    inputs = _arrays(dtype, dy, dfinal, x, dt, A, B, C, starts)
    outputs = [t.numpy() for t in (dx, ddt, y, dA, dB, dC, dinitial)]
    _backward(*inputs, _resets(resets, b), _tiny(dtype), parts, *outputs)
    dB, dC = (t[0] if parts == 1 else t.sum(0) for t in (dB, dC))
    return dx, ddt, dA.sum(0), dB, dC, dinitial, y


def at_edge(
    v: Tensor, dt: Tensor, A: Tensor, m: Tensor, resets: Tensor | None, at_end: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum of decayed v m at the end or the start, and the decay over all steps, (b, e, n): as in PyTorch."""
    state = torch.empty(v.shape[0], *A.shape, dtype=v.dtype)
    decay = torch.empty_like(state)
    nothing = math.log(torch.finfo(v.dtype).tiny)
    inputs, parts = _arrays(v.dtype, v, dt, A, m), _parts(v.shape[0], v.shape[2], m.shape[2])
    _at_edge(*inputs, _resets(resets, v.shape[0]), nothing, at_end, parts, state.numpy(), decay.numpy())
    return state, decay
