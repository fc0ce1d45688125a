"""The selective scan on NVIDIA GPUs, in Triton: walks along time with the state in registers, no atomics.

Time is cut into segments. Forward, `_walk` first finds for every segment the state at its end when it starts from zero,
and the sum of dt over it; since the decay over a segment is exp(A sum dt), `_chain` turns these into the state before
every segment; a second `_walk` starts from there and writes y. `_walk_back` and `_chain` do the same for the adjoint.

For inputs of 16 bits, two more walks then give all gradients: one forward with the states (`_walk_gradients`), one back
with the adjoints (`_walk_back_gradients`). With w[t] = G[t] a[t] h[t-1], what ddt and dA need of both is

    w[t] - w[t+1] = dy[t] C[t] h[t] - dt[t] x[t] B[t] G[t]                      (dy before the gate)

so each walk sums its own term, over n for ddt and over time for dA (weighted by the sum of dt until t), and w itself
is formed only where a state is stored. Numbers nearly cancel: ddt and dA are off by 1e-6 to 1e-5, which 16 bits hide.

For float32, `_gradients` takes a segment from its end to its start, PIECE steps at a time. It knows the state before
(stored forward every STEPS steps) and the adjoint after. It walks the piece forward and notes the state before every
TURN steps in a scratch that stays in cache; then, from the last to the first, it recomputes TURN states and decays into
registers and walks them backwards. Here a warp is laid out as 8 channels by 4 n, several of both per thread.
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.kernels.launch import Launch, planned
from seqmodels.kernels.math_triton import LOG2E, rounded_exp2, sigmoid, softplus

STEPS = 64  # as in selective_scan.py
# Measured on an H200 at l = 1,048,576, e = 256, n = 16 in bfloat16, each beside two to five alternatives.
WARPS, UNROLL, STAGES = 2, 4, 3  # a walk's warps, steps at once, such blocks of steps under way
REGISTERS, MOST_REGISTERS = 168, 255  # per thread, of walks and of walks with gradients: 12 and 8 warps a processor
LONGEST, LONGEST_EXACT = 16, 4  # chunks of STEPS steps per segment, at most
GRADIENT_WARPS, TURN, PIECE = 8, 4, 32  # of _gradients
ROWS = 16  # steps that _gradients takes at once beside its walks
TILE, RESIDENT = 16, 8  # states per thread, and warps per processor, that 255 registers allow


@triton.jit
def _load(p, mask):
    return tl.load(p) if mask is None else tl.load(p, mask, 0.0)


@triton.jit(do_not_specialize=["rows", "l", "B_b", "C_b"])
def _widen(
    B_ptr, C_ptr, wide_ptr, rows, l, B_b, C_b,
    B_l: tl.constexpr, B_g: tl.constexpr, C_l: tl.constexpr, C_g: tl.constexpr, GROUPS: tl.constexpr, n: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """B and then C in float32, (2, b, l, g, n)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i_b, t, col = row // l, row % l, tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (col < GROUPS * n)
    B = tl.load(B_ptr + (i_b * B_b + t) * B_l + col // n * B_g + col % n, inside)
    C = tl.load(C_ptr + (i_b * C_b + t) * C_l + col // n * C_g + col % n, inside)
    wide_ptr += row * (GROUPS * n) + col
    tl.store(wide_ptr, B.to(tl.float32), inside)
    tl.store(wide_ptr + rows.to(tl.int64) * (GROUPS * n), C.to(tl.float32), inside)


@triton.jit
def _sigmoid_16(x):
    """1 / (1 + exp(-x)) to 3e-7, for inputs of 16 bits: cheaper than a division, with its care for subnormals."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def _silu(z, dtype: tl.constexpr):
    return z * (sigmoid(z) if dtype == tl.float32 else _sigmoid_16(z))


@triton.jit(do_not_specialize=["rows"])
def _add(parts_ptr, sum_ptr, rows, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Adds PARTS arrays of rows of WIDTH numbers."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = rows.to(tl.int64) * WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(PARTS):
        total += tl.load(parts_ptr + i * size + o, o < size, 0.0)
    tl.store(sum_ptr + o, total.to(sum_ptr.dtype.element_ty), o < size)


@triton.jit
def _step_size(raw, low, high, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr):
    dt = softplus(raw) if SOFTPLUS else raw
    if LIMITED:
        dt = tl.minimum(tl.maximum(dt, low), high)
    return dt


@triton.jit
def _step_size_16(raw, low, high, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr):
    """`_step_size` to 1.4e-6, for inputs of 16 bits."""
    dt = raw
    if SOFTPLUS:
        u = tl.exp2(tl.abs(raw) * -LOG2E)
        p = u * 0.014588099745 - 0.067850549596
        p = p * u + 0.151026964312
        p = p * u - 0.236113063367
        p = p * u + 0.331404181335
        p = p * u - 0.499907462530
        p = p * u + 1.0
        dt = tl.maximum(raw, 0.0) + u * p
    if LIMITED:
        dt = tl.minimum(tl.maximum(dt, low), high)
    return dt


@triton.jit
def _decay(x, EXACT: tl.constexpr):
    """2^x; over a thousand steps the approximation's error shows in float32's gradients."""
    return rounded_exp2(x) if EXACT else tl.exp2(x)


@triton.jit
def _program(segments, GROUPS: tl.constexpr, BLOCKS: tl.constexpr):
    """What a program of a walk takes: segment, batch entry, group and block of its channels."""
    pid = tl.program_id(0)
    i = pid // (GROUPS * BLOCKS)
    return i % segments, (i // segments).to(tl.int64), pid % (GROUPS * BLOCKS) // BLOCKS, pid % BLOCKS


@triton.jit
def _place(
    A_ptr, bias_ptr, one, group, block,
    e: tl.constexpr, n: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Where a program's channels and states are: [e / 2, 2], [n], [e / 2, 2, n], with masks where needed; A, bias.

    A thread has two neighbouring channels (4 bytes is the least that can be fetched ahead) with all their n, so that
    sums over n stay in it. `one` is 1, but the compiler must not know, or it would spread n over threads.
    """
    PER: tl.constexpr = e // GROUPS
    within = block * E + tl.arange(0, E) // 2 * 2 * one + tl.arange(0, E) % 2
    o_e, o_n = group * PER + within, tl.arange(0, N)
    m_e = within < PER
    m_h = m_e[:, None] & (o_n < n)[None, :]
    e_h, n_h = o_e[:, None], o_n[None, :] * one
    A = tl.load(A_ptr + n_h * e + e_h, m_h, 0.0).to(tl.float32) * LOG2E
    bias = tl.zeros([E], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o_e, m_e, 0.0).to(tl.float32)
    return o_e, m_e, o_n, e_h, n_h, m_h, A, bias


@triton.jit
def _forth(
    h, total, t0, x_ptr, dt_ptr, z_ptr, p_B, p_C, y_ptr, resets_ptr, A, D, bias, o_e, here, row, low, high,
    x_l: tl.constexpr, dt_l: tl.constexpr, z_l: tl.constexpr, B_l: tl.constexpr, C_l: tl.constexpr, e: tl.constexpr,
    T: tl.constexpr, OUTPUT: tl.constexpr, SKIP: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """T steps of `_walk`."""
    p_x, p_dt = x_ptr + t0 * x_l + o_e, dt_ptr + t0 * dt_l + o_e
    if OUTPUT:
        p_y = y_ptr + t0 * e + o_e
        if z_ptr is not None:
            p_z = z_ptr + t0 * z_l + o_e
    for k in tl.static_range(T):
        x = _load(p_x + k * x_l, here).to(tl.float32)
        dt = _step_size(_load(p_dt + k * dt_l, here).to(tl.float32) + bias, low, high, SOFTPLUS, LIMITED)
        B = _load(p_B + k * B_l, row).to(tl.float32)
        if resets_ptr is not None:
            h = tl.where(tl.load(resets_ptr + t0 + k) != 0, 0.0, h)
        h = h * _decay(dt[:, None] * A, x_ptr.dtype.element_ty == tl.float32) + (dt * x)[:, None] * B[None, :]
        if OUTPUT:
            C = _load(p_C + k * C_l, row).to(tl.float32)
            y = tl.sum(h * C[None, :], 1)
            if SKIP:
                y += D * x
            if z_ptr is not None:
                z = _load(p_z + k * z_l, here).to(tl.float32)
                y *= _silu(z, z_ptr.dtype.element_ty)
            tl.store(p_y + k * e, y.to(y_ptr.dtype.element_ty), here)
        else:
            total += dt
    return h, total


@triton.jit(do_not_specialize=["l", "one", "segments", "per_segment", "chunks", "x_b", "dt_b", "z_b", "B_b", "C_b"])
def _walk(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, resets_ptr,
    starts_ptr, total_ptr, y_ptr, final_ptr,
    l, one, segments, per_segment, chunks, low, high, x_b, dt_b, z_b, B_b, C_b,
    e: tl.constexpr, n: tl.constexpr, x_l: tl.constexpr, dt_l: tl.constexpr, z_l: tl.constexpr,
    B_l: tl.constexpr, B_g: tl.constexpr, C_l: tl.constexpr, C_g: tl.constexpr, GROUPS: tl.constexpr,
    N: tl.constexpr, E: tl.constexpr, T: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, OUTPUT: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """Walks a segment forward. Without OUTPUT: from zero, to its end state and sum of dt; with it: from the true start.

    x_b etc. are the rows (of x_l numbers) from one batch entry to the next. Strides of rows and all that concerns
    channels are constants: an address then costs nothing but a constant offset.
    """
    BLOCKS: tl.constexpr = (e // GROUPS + E - 1) // E
    segment, i_b, group, block = _program(segments if OUTPUT else segments - 1, GROUPS, BLOCKS)
    o_e, m_e, o_n, e_h, n_h, m_h, A, bias = _place(A_ptr, bias_ptr, one, group, block, e, n, GROUPS, N, E)
    here, row = None if (e // GROUPS) % E == 0 else m_e, None if n == N else o_n < n
    first = segment.to(tl.int64) * per_segment * STEPS
    x_ptr += (i_b * x_b + first) * x_l
    dt_ptr += (i_b * dt_b + first) * dt_l
    B_ptr += (i_b * B_b + first) * B_l + group * B_g
    starts_ptr += (i_b * chunks + segment * per_segment) * n * e
    h = tl.zeros([E, N], tl.float32)
    total = tl.zeros([E], tl.float32)
    D = tl.zeros([E], tl.float32)
    if OUTPUT:
        C_ptr += (i_b * C_b + first) * C_l + group * C_g
        y_ptr += (i_b * l + first) * e
        if z_ptr is not None:
            z_ptr += (i_b * z_b + first) * z_l
        if D_ptr is not None:
            D = tl.load(D_ptr + o_e, m_e, 0.0).to(tl.float32)
        if segment > 0:
            h = tl.load(starts_ptr + n_h * e + e_h, m_h, 0.0)
        elif initial_ptr is not None:
            h = tl.load(initial_ptr + (i_b * e + e_h) * n + n_h, m_h, 0.0).to(tl.float32)
    if resets_ptr is not None:
        resets_ptr += i_b * l + first
    steps = tl.minimum(per_segment * STEPS, l - first).to(tl.int32)
    p_B, p_C = B_ptr + o_n, C_ptr + o_n
    for chunk in range(0, steps, STEPS):
        if OUTPUT:
            tl.store(starts_ptr + chunk // STEPS * n * e + n_h * e + e_h, h, m_h)
        end = tl.minimum(chunk + STEPS, steps)
        whole = end // T * T
        for t in tl.range(chunk, whole, T, num_stages=STAGES):
            h, total = _forth(
                h, total, t, x_ptr, dt_ptr, z_ptr, p_B, p_C, y_ptr, resets_ptr, A, D, bias, o_e, here, row, low, high,
                x_l, dt_l, z_l, B_l, C_l, e, T, OUTPUT, D_ptr is not None, SOFTPLUS, LIMITED,
            )  # fmt: skip
            p_B += T * B_l
            p_C += T * C_l
        for t in tl.range(whole, end, num_stages=1):
            h, total = _forth(
                h, total, t, x_ptr, dt_ptr, z_ptr, B_ptr + t * B_l + o_n, C_ptr + t * C_l + o_n, y_ptr, resets_ptr,
                A, D, bias, o_e, here, row, low, high,
                x_l, dt_l, z_l, B_l, C_l, e, 1, OUTPUT, D_ptr is not None, SOFTPLUS, LIMITED,
            )  # fmt: skip
    if OUTPUT:
        if segment == segments - 1:
            tl.store(final_ptr + (i_b * e + e_h) * n + n_h, h, m_h)
    else:
        tl.store(starts_ptr + per_segment * n * e + n_h * e + e_h, h, m_h)
        tl.store(total_ptr + (i_b * segments + segment) * e + o_e, total, m_e)


@triton.jit
def _combine(decay_1, value_1, decay_2, value_2):
    return decay_1 * decay_2, decay_2 * value_1 + value_2


@triton.jit(do_not_specialize=["segments", "row", "one"])
def _chain(
    values_ptr, total_ptr, A_ptr, initial_ptr, broken_ptr,
    e, n, segments, row, column_blocks, batch_stride,
    REVERSE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Turns what each segment adds to the state into the state that enters each segment, in place.

    Segment s holds its row at s * row. Forward, row s comes to hold the state before segment s: it finds there what
    segment s - 1 adds, and that segment's decay is exp(A total). In reverse, s counts from the last segment.
    """
    i_b = (tl.program_id(0) // column_blocks).to(tl.int64)
    j = (tl.program_id(0) % column_blocks) * COLS + tl.arange(0, COLS)
    inside = j < n * e
    o_n, o_e = j // e, j % e
    A = tl.load(A_ptr + o_e * n + o_n, inside, 0.0).to(tl.float32) * LOG2E
    state = tl.zeros([COLS], tl.float32)
    if initial_ptr is not None:
        state = tl.load(initial_ptr + (i_b * e + o_e) * n + o_n, inside, 0.0).to(tl.float32)
    values_ptr += i_b * batch_stride
    first = segments - 1 if REVERSE else 0
    tl.store(values_ptr + (first * row).to(tl.int64) * n * e + j, state, inside)
    o_r = tl.arange(0, ROWS)
    for base in range(1, segments, ROWS):
        s = base + o_r
        here = (s < segments)[:, None] & inside[None, :]
        before = s - 1
        if REVERSE:
            before = segments - s
            s = segments - 1 - s
        pointers = values_ptr + (s * row).to(tl.int64)[:, None] * n * e + j[None, :]
        value = tl.load(pointers, here, 0.0)
        total = tl.load(total_ptr + (i_b * segments + before)[:, None] * e + o_e[None, :], here, 0.0)
        decay = rounded_exp2(total * A[None, :])
        if broken_ptr is not None:
            broken = tl.load(broken_ptr + i_b * segments + before, base + o_r < segments, 0)
            decay = tl.where((broken != 0)[:, None], 0.0, decay)
            value += tl.where((o_r == 0)[:, None] & (broken == 0)[:, None], decay * state[None, :], 0.0)
        else:
            value += tl.where((o_r == 0)[:, None], decay * state[None, :], 0.0)
        _, value = tl.associative_scan((decay, value), 0, _combine)
        tl.store(pointers, value, here)
        state = tl.sum(tl.where((o_r == ROWS - 1)[:, None], value, 0.0), 0)


@triton.jit
def _back(
    carry, total, t0, dy_ptr, dt_ptr, z_ptr, p_C, resets_ptr, A, bias, o_e, here, row, low, high,
    dy_l: tl.constexpr, dt_l: tl.constexpr, z_l: tl.constexpr, C_l: tl.constexpr,
    T: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """T steps of `_walk_back`."""
    p_dy, p_dt = dy_ptr + t0 * dy_l + o_e, dt_ptr + t0 * dt_l + o_e
    if z_ptr is not None:
        p_z = z_ptr + t0 * z_l + o_e
    for back in tl.static_range(T):
        k = T - 1 - back
        dy = _load(p_dy + k * dy_l, here).to(tl.float32)
        if z_ptr is not None:
            z = _load(p_z + k * z_l, here).to(tl.float32)
            dy *= _silu(z, z_ptr.dtype.element_ty)
        dt = _step_size(_load(p_dt + k * dt_l, here).to(tl.float32) + bias, low, high, SOFTPLUS, LIMITED)
        C = _load(p_C + k * C_l, row).to(tl.float32)
        total += dt
        decay = _decay(dt[:, None] * A, dy_ptr.dtype.element_ty == tl.float32)
        carry = (carry + dy[:, None] * C[None, :]) * decay
        if resets_ptr is not None:
            carry = tl.where(tl.load(resets_ptr + t0 + k) != 0, 0.0, carry)
    return carry, total


@triton.jit(do_not_specialize=["l", "one", "segments", "per_segment", "dy_b", "dt_b", "z_b", "C_b"])
def _walk_back(
    dy_ptr, dt_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, resets_ptr, carries_ptr, total_ptr,
    l, one, segments, per_segment, low, high, dy_b, dt_b, z_b, C_b,
    e: tl.constexpr, n: tl.constexpr, dy_l: tl.constexpr, dt_l: tl.constexpr, z_l: tl.constexpr,
    C_l: tl.constexpr, C_g: tl.constexpr, GROUPS: tl.constexpr,
    N: tl.constexpr, E: tl.constexpr, T: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, EMPTY: tl.constexpr,
):  # fmt: skip
    """Walks segments 1, 2, ... backwards from adjoint zero, to what leaves their first step, and their sums of dt.

    The first EMPTY segments have no steps.
    """
    BLOCKS: tl.constexpr = (e // GROUPS + E - 1) // E
    segment, i_b, group, block = _program(segments - 1, GROUPS, BLOCKS)
    segment += 1
    o_e, m_e, o_n, e_h, n_h, m_h, A, bias = _place(A_ptr, bias_ptr, one, group, block, e, n, GROUPS, N, E)
    here, row = None if (e // GROUPS) % E == 0 else m_e, None if n == N else o_n < n
    first = (segment - EMPTY).to(tl.int64) * per_segment * STEPS
    dy_ptr += (i_b * dy_b + first) * dy_l
    dt_ptr += (i_b * dt_b + first) * dt_l
    C_ptr += (i_b * C_b + first) * C_l + group * C_g
    if z_ptr is not None:
        z_ptr += (i_b * z_b + first) * z_l
    if resets_ptr is not None:
        resets_ptr += i_b * l + first
    carry = tl.zeros([E, N], tl.float32)
    total = tl.zeros([E], tl.float32)
    steps = tl.minimum(per_segment * STEPS, l - first).to(tl.int32)
    whole = steps // T * T
    for back in tl.range(0, steps - whole, num_stages=1):
        t = steps - 1 - back
        carry, total = _back(
            carry, total, t, dy_ptr, dt_ptr, z_ptr, C_ptr + t * C_l + o_n, resets_ptr, A, bias, o_e, here, row,
            low, high, dy_l, dt_l, z_l, C_l, 1, SOFTPLUS, LIMITED,
        )  # fmt: skip
    p_C = C_ptr + (whole - T) * C_l + o_n
    for _ in range(one):  # within another loop, C is fetched by all threads together
        for back in tl.range(T, whole + T, T, num_stages=STAGES):
            carry, total = _back(
                carry, total, whole - back, dy_ptr, dt_ptr, z_ptr, p_C, resets_ptr, A, bias, o_e, here, row,
                low, high, dy_l, dt_l, z_l, C_l, T, SOFTPLUS, LIMITED,
            )  # fmt: skip
            p_C -= T * C_l
    tl.store(carries_ptr + (i_b * segments + segment - 1) * n * e + n_h * e + e_h, carry, m_h)
    tl.store(total_ptr + (i_b * segments + segment) * e + o_e, total, m_e)


# Gradients for inputs of 16 bits.


@triton.jit
def _pair_place(one, group, block, PER: tl.constexpr, E: tl.constexpr):
    """Where a program's pairs of channels are, [e / 2], and their mask."""
    within = block * (E // 2) + tl.arange(0, E // 2) * one
    return group * (PER // 2) + within, within < PER // 2


@triton.jit
def _pairs(v):
    """Sums of neighbouring channels, which are in one thread."""
    return tl.sum(tl.reshape(v, [v.shape[0] // 2, 2, v.shape[1]]), 1)


@triton.jit
def _joined(ps, T: tl.constexpr, ROUND: tl.constexpr):
    """T tiles (e / 2, n) as one, (e / 2, n T); rounded to tf32 if asked, since the product only cuts."""
    K: tl.constexpr = ps[0].shape[0]
    N: tl.constexpr = ps[0].shape[1]
    if T == 1:
        p = ps[0]
    elif T == 2:
        p = tl.join(ps[0], ps[1])
    else:
        p = tl.join(tl.join(ps[0], ps[2]), tl.join(ps[1], ps[3]))
    if ROUND:
        p = ((p.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return tl.reshape(p, [K, N * T])


@triton.jit
def _store_sums(p, sums_ptr, row_stride: tl.constexpr, n: tl.constexpr, N: tl.constexpr, T: tl.constexpr):
    """Sums T tiles of `_joined` over channels, by a product with ones, to T rows from sums_ptr on."""
    p = tl.dot(tl.trans(p), tl.full([p.shape[0], 8], 1.0, tl.float32), input_precision="tf32")
    i, column = tl.arange(0, N * T)[:, None], tl.arange(0, 8)[None, :]
    pointers = sums_ptr + (i % T) * row_stride + i // T + column * 0
    tl.store(pointers, p.to(sums_ptr.dtype.element_ty), (i // T < n) & (column == 0))


@triton.jit
def _forth_gradients(
    h, dA, cum, t0, dy_ptr, x_ptr, dt_ptr, z_ptr, p_B, p_C, resets_ptr, even_ptr, odd_ptr, dz_ptr,
    A, D, bias, o_e, here, o_pair, pair, row, low, high,
    dy_l: tl.constexpr, x_l: tl.constexpr, dt_l: tl.constexpr, z_l: tl.constexpr, B_l: tl.constexpr, C_l: tl.constexpr,
    e: tl.constexpr, T: tl.constexpr, SKIP: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """T steps of `_walk_gradients`; and what is to be summed over channels for dC."""
    p_x, p_dt = x_ptr + t0 * x_l + o_e, dt_ptr + t0 * dt_l + o_e
    p_dy = dy_ptr + t0 * dy_l + o_e
    p_even, p_odd = even_ptr + t0 * (e // 2) + o_pair, odd_ptr + t0 * (e // 2) + o_pair
    if z_ptr is not None:
        p_z = z_ptr + t0 * z_l + o_e
        p_dz = dz_ptr + t0 * e + o_e
    ps = ()
    for k in tl.static_range(T):
        x = _load(p_x + k * x_l, here).to(tl.float32)
        dy = _load(p_dy + k * dy_l, here).to(tl.float32)
        dt = _step_size_16(_load(p_dt + k * dt_l, here).to(tl.float32) + bias, low, high, SOFTPLUS, LIMITED)
        B, C = _load(p_B + k * B_l, row).to(tl.float32), _load(p_C + k * C_l, row).to(tl.float32)
        if resets_ptr is not None:
            h = tl.where(tl.load(resets_ptr + t0 + k) != 0, 0.0, h)
        h = h * tl.exp2(dt[:, None] * A) + (dt * x)[:, None] * B[None, :]
        v = h * C[None, :]
        cum += dt
        if z_ptr is not None:
            y = tl.sum(v, 1)
            if SKIP:
                y += D * x
            z = _load(p_z + k * z_l, here).to(tl.float32)
            gate = _sigmoid_16(z)
            dy *= gate
            dz = dy * y * (1.0 + z * (1.0 - gate))
            tl.store(p_dz + k * e, dz.to(dz_ptr.dtype.element_ty), here)
            dy *= z
        dA += (cum * dy)[:, None] * v
        even, odd = tl.split(tl.reshape(dy * tl.sum(v * A, 1), [dy.shape[0] // 2, 2]))
        tl.store(p_even + k * (e // 2), even.to(tl.int32, bitcast=True), pair)
        tl.store(p_odd + k * (e // 2), odd.to(tl.int32, bitcast=True), pair)
        ps += (_pairs(dy[:, None] * h),)
    return h, dA, cum, _joined(ps, T, x_ptr.dtype.element_ty == tl.float16)


@triton.jit(
    do_not_specialize=[
        "b", "l", "one", "segments", "per_segment", "chunks", "dy_b", "x_b", "dt_b", "z_b", "B_b", "C_b"
    ]
)  # fmt: skip
def _walk_gradients(
    dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, resets_ptr, starts_ptr,
    even_ptr, odd_ptr, dz_ptr, dC_ptr, dA_ptr, cum_ptr, final_ptr,
    b, l, one, segments, per_segment, chunks, low, high, dy_b, x_b, dt_b, z_b, B_b, C_b,
    e: tl.constexpr, n: tl.constexpr, dy_l: tl.constexpr, x_l: tl.constexpr, dt_l: tl.constexpr, z_l: tl.constexpr,
    B_l: tl.constexpr, B_g: tl.constexpr, C_l: tl.constexpr, C_g: tl.constexpr, GROUPS: tl.constexpr,
    N: tl.constexpr, E: tl.constexpr, T: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """Walks a segment forward for all gradients that need states: dz, dC, and the states' parts of ddt and dA.

    Step t's part of ddt, dy sum_n A C h, is float32, one channel where ddt of a pair will be and one where dx will be.
    cum is the sum of dt since the last stored state; dA's part is weighted by it. final is the last state.
    """
    PER: tl.constexpr = e // GROUPS
    BLOCKS: tl.constexpr = (PER + E - 1) // E
    segment, i_b, group, block = _program(segments, GROUPS, BLOCKS)
    o_e, m_e, o_n, e_h, n_h, m_h, A, bias = _place(A_ptr, bias_ptr, one, group, block, e, n, GROUPS, N, E)
    here, row = None if PER % E == 0 else m_e, None if n == N else o_n < n
    o_pair, m_pair = _pair_place(one, group, block, PER, E)
    pair = None if PER % E == 0 else m_pair
    first = segment.to(tl.int64) * per_segment * STEPS
    dy_ptr += (i_b * dy_b + first) * dy_l
    x_ptr += (i_b * x_b + first) * x_l
    dt_ptr += (i_b * dt_b + first) * dt_l
    B_ptr += (i_b * B_b + first) * B_l + group * B_g
    C_ptr += (i_b * C_b + first) * C_l + group * C_g
    starts_ptr += (i_b * chunks + segment * per_segment) * n * e
    cum_ptr += (i_b * chunks + segment * per_segment) * e
    even_ptr += (i_b * l + first) * (e // 2)
    odd_ptr += (i_b * l + first) * (e // 2)
    if z_ptr is not None:
        z_ptr += (i_b * z_b + first) * z_l
        dz_ptr += (i_b * l + first) * e
    if resets_ptr is not None:
        resets_ptr += i_b * l + first
    D = tl.zeros([E], tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + o_e, m_e, 0.0).to(tl.float32)
    dC_ptr += ((block * b + i_b) * l + first) * (GROUPS * n) + group * n
    steps = tl.minimum(per_segment * STEPS, l - first).to(tl.int32)
    whole = steps // T * T
    h = tl.load(starts_ptr + n_h * e + e_h, m_h, 0.0)
    dA = tl.zeros([E, N], tl.float32)
    p_B, p_C = B_ptr + o_n, C_ptr + o_n
    # A block's p is summed during the next block's arithmetic; before the first, zeros go where its sums will be.
    p = tl.zeros([E // 2, N * T], tl.float32)
    for chunk in range(0, steps, STEPS):
        cum = tl.zeros([E], tl.float32)
        end = tl.minimum(chunk + STEPS, steps)
        for t in tl.range(chunk, end // T * T, T, num_stages=STAGES):
            _store_sums(p, dC_ptr + tl.maximum(t - T, 0) * (GROUPS * n), GROUPS * n, n, N, T)
            h, dA, cum, p = _forth_gradients(
                h, dA, cum, t, dy_ptr, x_ptr, dt_ptr, z_ptr, p_B, p_C, resets_ptr, even_ptr, odd_ptr, dz_ptr,
                A, D, bias, o_e, here, o_pair, pair, row, low, high, dy_l, x_l, dt_l, z_l, B_l, C_l, e, T,
                D_ptr is not None, SOFTPLUS, LIMITED,
            )  # fmt: skip
            p_B += T * B_l
            p_C += T * C_l
        for t in tl.range(end // T * T, end, num_stages=1):
            h, dA, cum, p_1 = _forth_gradients(
                h, dA, cum, t, dy_ptr, x_ptr, dt_ptr, z_ptr, B_ptr + t * B_l + o_n, C_ptr + t * C_l + o_n, resets_ptr,
                even_ptr, odd_ptr, dz_ptr,
                A, D, bias, o_e, here, o_pair, pair, row, low, high, dy_l, x_l, dt_l, z_l, B_l, C_l, e, 1,
                D_ptr is not None, SOFTPLUS, LIMITED,
            )  # fmt: skip
            _store_sums(p_1, dC_ptr + t * (GROUPS * n), GROUPS * n, n, N, 1)
        tl.store(cum_ptr + chunk // STEPS * e + o_e, cum, m_e)
    if whole > 0:
        _store_sums(p, dC_ptr + (whole - T) * (GROUPS * n), GROUPS * n, n, N, T)
    tl.store(dA_ptr + (i_b * segments + segment) * n * e + n_h * e + e_h, dA, m_h)
    if segment == segments - 1:
        tl.store(final_ptr + i_b * n * e + n_h * e + e_h, h, m_h)


@triton.jit
def _back_gradients(
    carry, dA, cum, Aw, dD, dbias, t0, dy_ptr, x_ptr, dt_ptr, z_ptr, p_B, p_C, resets_ptr, even_ptr, odd_ptr,
    dx_ptr, ddt_ptr, A, D, bias, o_e, here, o_pair, pair, row, low, high,
    dy_l: tl.constexpr, x_l: tl.constexpr, dt_l: tl.constexpr, z_l: tl.constexpr, B_l: tl.constexpr, C_l: tl.constexpr,
    e: tl.constexpr, T: tl.constexpr, SKIP: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """T steps of `_walk_back_gradients`; and what is to be summed over channels for dB."""
    p_x, p_dt = x_ptr + t0 * x_l + o_e, dt_ptr + t0 * dt_l + o_e
    p_dy = dy_ptr + t0 * dy_l + o_e
    p_even, p_odd = even_ptr + t0 * (e // 2) + o_pair, odd_ptr + t0 * (e // 2) + o_pair
    p_dx, p_ddt = dx_ptr + t0 * e + o_e, ddt_ptr + t0 * e + o_e
    if z_ptr is not None:
        p_z = z_ptr + t0 * z_l + o_e
    ps = ()
    for back in tl.static_range(T):
        k = T - 1 - back
        x = _load(p_x + k * x_l, here).to(tl.float32)
        dy = _load(p_dy + k * dy_l, here).to(tl.float32)
        raw = _load(p_dt + k * dt_l, here).to(tl.float32) + bias
        dt = _step_size_16(raw, low, high, SOFTPLUS, LIMITED)
        if z_ptr is not None:
            z = _load(p_z + k * z_l, here).to(tl.float32)
            dy *= _silu(z, z_ptr.dtype.element_ty)
        B, C = _load(p_B + k * B_l, row).to(tl.float32), _load(p_C + k * C_l, row).to(tl.float32)
        even = _load(p_even + k * (e // 2), pair).to(tl.float32, bitcast=True)
        odd = _load(p_odd + k * (e // 2), pair).to(tl.float32, bitcast=True)
        u = dt * x
        g = carry + dy[:, None] * C[None, :]
        v = g * B[None, :]
        du = tl.sum(v, 1)
        Aw += tl.reshape(tl.join(even, odd), [u.shape[0]]) - u * tl.sum(v * A, 1)
        dA -= (cum * u)[:, None] * v
        ps = (_pairs(u[:, None] * g),) + ps  # noqa: RUF005 (Triton knows no starred tuples)
        carry = g * tl.exp2(dt[:, None] * A)
        if resets_ptr is not None:
            cut = tl.load(resets_ptr + t0 + k) != 0
            carry = tl.where(cut, 0.0, carry)
            Aw = tl.where(cut, 0.0, Aw)
        cum -= dt
        dx = dt * du
        if SKIP:
            dx += D * dy
            dD += dy * x
        ddt = x * du + Aw * (1.0 / LOG2E)
        if LIMITED:
            free = _step_size_16(raw, low, high, SOFTPLUS, False)
            ddt = tl.where((free >= low) & (free <= high), ddt, 0.0)
        if SOFTPLUS:
            ddt *= _sigmoid_16(raw)
        dbias += ddt
        tl.store(p_dx + k * e, dx.to(dx_ptr.dtype.element_ty), here)
        tl.store(p_ddt + k * e, ddt.to(ddt_ptr.dtype.element_ty), here)
    return carry, dA, cum, Aw, dD, dbias, _joined(ps, T, x_ptr.dtype.element_ty == tl.float16)


@triton.jit(
    do_not_specialize=[
        "b", "l", "one", "segments", "per_segment", "chunks", "dy_b", "x_b", "dt_b", "z_b", "B_b", "C_b"
    ]
)  # fmt: skip
def _walk_back_gradients(
    dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, resets_ptr, starts_ptr,
    even_ptr, odd_ptr, dA_ptr, cum_ptr, final_ptr, carries_ptr, dx_ptr, ddt_ptr, dB_ptr, dD_ptr, dbias_ptr,
    dinitial_ptr,
    b, l, one, segments, per_segment, chunks, low, high, dy_b, x_b, dt_b, z_b, B_b, C_b,
    e: tl.constexpr, n: tl.constexpr, dy_l: tl.constexpr, x_l: tl.constexpr, dt_l: tl.constexpr, z_l: tl.constexpr,
    B_l: tl.constexpr, B_g: tl.constexpr, C_l: tl.constexpr, C_g: tl.constexpr, GROUPS: tl.constexpr,
    N: tl.constexpr, E: tl.constexpr, T: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """Walks a segment back for all other gradients, with what `_walk_gradients` left.

    Aw is sum_n A w, as a running sum that begins anew wherever a state is stored. A segment's dA goes where its
    incoming adjoint was.
    """
    PER: tl.constexpr = e // GROUPS
    BLOCKS: tl.constexpr = (PER + E - 1) // E
    segment, i_b, group, block = _program(segments, GROUPS, BLOCKS)
    o_e, m_e, o_n, e_h, n_h, m_h, A, bias = _place(A_ptr, bias_ptr, one, group, block, e, n, GROUPS, N, E)
    here, row = None if PER % E == 0 else m_e, None if n == N else o_n < n
    o_pair, m_pair = _pair_place(one, group, block, PER, E)
    pair = None if PER % E == 0 else m_pair
    first = segment.to(tl.int64) * per_segment * STEPS
    dy_ptr += (i_b * dy_b + first) * dy_l
    x_ptr += (i_b * x_b + first) * x_l
    dt_ptr += (i_b * dt_b + first) * dt_l
    B_ptr += (i_b * B_b + first) * B_l + group * B_g
    C_ptr += (i_b * C_b + first) * C_l + group * C_g
    starts_ptr += (i_b * chunks + segment * per_segment) * n * e
    cum_ptr += (i_b * chunks + segment * per_segment) * e
    even_ptr += (i_b * l + first) * (e // 2)
    odd_ptr += (i_b * l + first) * (e // 2)
    dx_ptr += (i_b * l + first) * e
    ddt_ptr += (i_b * l + first) * e
    if z_ptr is not None:
        z_ptr += (i_b * z_b + first) * z_l
    if resets_ptr is not None:
        resets_ptr += i_b * l + first
    D = tl.zeros([E], tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + o_e, m_e, 0.0).to(tl.float32)
    dB_ptr += ((block * b + i_b) * l + first) * (GROUPS * n) + group * n
    steps = tl.minimum(per_segment * STEPS, l - first).to(tl.int32)
    whole = steps // T * T
    p_state = (i_b * segments + segment) * n * e + n_h * e + e_h
    carry = tl.load(carries_ptr + p_state, m_h, 0.0)
    dA = tl.load(dA_ptr + p_state, m_h, 0.0)
    dD, dbias = tl.zeros([E], tl.float32), tl.zeros([E], tl.float32)
    p_B, p_C = B_ptr + (whole - T) * B_l + o_n, C_ptr + (whole - T) * C_l + o_n
    p = tl.zeros([E // 2, N * T], tl.float32)
    rounds = tl.cdiv(steps, STEPS)
    for i in range(rounds):
        chunk = (rounds - 1 - i) * STEPS
        end = tl.minimum(chunk + STEPS, steps)
        # w after the last step, from the adjoint that comes in and the state that goes out there
        cum = tl.load(cum_ptr + chunk // STEPS * e + o_e, m_e, 0.0)
        if (end == steps) & (segment == segments - 1):
            w = tl.load(final_ptr + i_b * n * e + n_h * e + e_h, m_h, 0.0) * carry
        else:
            w = tl.load(starts_ptr + (chunk // STEPS + 1) * n * e + n_h * e + e_h, m_h, 0.0) * carry
        Aw = tl.sum(w * A, 1)
        dA += cum[:, None] * w
        for back in tl.range(0, end % T, num_stages=1):
            t = end - 1 - back
            carry, dA, cum, Aw, dD, dbias, p_1 = _back_gradients(
                carry, dA, cum, Aw, dD, dbias, t, dy_ptr, x_ptr, dt_ptr, z_ptr, B_ptr + t * B_l + o_n,
                C_ptr + t * C_l + o_n, resets_ptr, even_ptr, odd_ptr, dx_ptr, ddt_ptr,
                A, D, bias, o_e, here, o_pair, pair, row, low, high, dy_l, x_l, dt_l, z_l, B_l, C_l, e, 1,
                D_ptr is not None, SOFTPLUS, LIMITED,
            )  # fmt: skip
            _store_sums(p_1, dB_ptr + t * (GROUPS * n), GROUPS * n, n, N, 1)
        for back in tl.range(T, end // T * T - chunk + T, T, num_stages=STAGES):
            t = end // T * T - back
            _store_sums(p, dB_ptr + tl.minimum(t + T, whole - T) * (GROUPS * n), GROUPS * n, n, N, T)
            carry, dA, cum, Aw, dD, dbias, p = _back_gradients(
                carry, dA, cum, Aw, dD, dbias, t, dy_ptr, x_ptr, dt_ptr, z_ptr, p_B, p_C, resets_ptr,
                even_ptr, odd_ptr, dx_ptr, ddt_ptr, A, D, bias, o_e, here, o_pair, pair, row, low, high,
                dy_l, x_l, dt_l, z_l, B_l, C_l, e, T, D_ptr is not None, SOFTPLUS, LIMITED,
            )  # fmt: skip
            p_B -= T * B_l
            p_C -= T * C_l
    if whole > 0:
        _store_sums(p, dB_ptr, GROUPS * n, n, N, T)
    tl.store(carries_ptr + p_state, dA, m_h)
    if segment == 0:
        tl.store(dinitial_ptr + (i_b * e + e_h) * n + n_h, carry, m_h)
    o_sums = (i_b * segments + segment) * e + o_e
    if D_ptr is not None:
        tl.store(dD_ptr + o_sums, dD, m_e)
    if bias_ptr is not None:
        tl.store(dbias_ptr + o_sums, dbias, m_e)


# Gradients for float32, and for many n.


@triton.jit
def _operands(s_dt, s_u, p_B, B_l, e_row, n_row, m_row, t0, left, T: tl.constexpr, E: tl.constexpr):
    """What the state of steps t0 to t0 + T needs."""
    dts, us, Bs = (), (), ()
    for k in tl.static_range(T):
        dts += (tl.load(s_dt + (t0 + k) * E + e_row),)
        us += (tl.load(s_u + (t0 + k) * E + e_row),)
        Bs += (tl.load(p_B + (t0 + k) * B_l + n_row, m_row & (t0 + k < left), 0.0),)
    return dts, us, Bs


@triton.jit
def _operands_back(s_dt, s_u, s_dy, p_B, p_C, B_l, C_l, e_row, n_row, m_row, t, left, E: tl.constexpr):
    """What the adjoint of step t needs."""
    m_t = m_row & (t < left)
    dt, u, dy = tl.load(s_dt + t * E + e_row), tl.load(s_u + t * E + e_row), tl.load(s_dy + t * E + e_row)
    return dt, u, dy, tl.load(p_B + t * B_l + n_row, m_t, 0.0), tl.load(p_C + t * C_l + n_row, m_t, 0.0)


@triton.jit
def _over_channels(v):
    """Sum of a tile over a warp's channels, as a tensor of n."""
    total = tl.sum(tl.sum(v, 3), 0, keep_dims=True)
    return tl.broadcast_to(total, [v.shape[0], v.shape[1], v.shape[2], v.shape[4]])


@triton.jit
def _over_n(v):
    """Sum of a tile over n, as a tensor of channels."""
    total = tl.sum(tl.sum(v, 4), 1, keep_dims=True)
    return tl.broadcast_to(total, [v.shape[0], v.shape[1], v.shape[2], v.shape[3]])


@triton.jit(do_not_specialize=["l", "one", "segments", "per_segment", "chunks", "tasks", "parts", "blocks_per_part"])
def _gradients(
    dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, resets_ptr, starts_ptr, carries_ptr,
    scratch_ptr, dx_ptr, ddt_ptr, dz_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, dinitial_ptr,
    b, l, e, n, one, per_group, blocks, groups, segments, per_segment, chunks, tasks, parts, blocks_per_part, low, high,
    dy_b, dy_l, x_b, x_l, dt_b, dt_l, z_b, z_l, B_b, B_l, B_g, C_b, C_l, C_g,
    NH: tl.constexpr, NL: tl.constexpr, EH: tl.constexpr, EL: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, PIECE: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """All gradients of a segment of time and a part of a group's channels, one channel block after the other.

    Segments' dA goes where their incoming adjoint was. The scratch of a program: the states before every T steps, and
    arrays over a piece's steps, (PIECE, E): dt, u = dt x, dy silu(z), y, of which the walk back replaces the second and
    third by the gradients of u and of dt through the decay; (PIECE, W, N): dB, dC of each warp.
    """
    E: tl.constexpr = W * EH * EL
    N: tl.constexpr = NH * NL
    BLOCKS: tl.constexpr = PIECE // T
    program = tl.program_id(0)
    notes_ptr = scratch_ptr + program.to(tl.int64) * (BLOCKS * N * E + 4 * PIECE * E + 2 * PIECE * W * N)
    s_dt = notes_ptr + BLOCKS * N * E
    s_u = s_dt + PIECE * E
    s_dy = s_u + PIECE * E
    s_y = s_dy + PIECE * E
    s_dB = s_y + PIECE * E
    s_dC = s_dB + PIECE * W * N
    # A tile of states is [e_low, n_low, warp, e_high, n_high]: lanes 8 channels by 4 n, the last two within a thread.
    # Tensors of channels are loaded as [e_low, n_low, warp, e_high] and tensors of n as [e_low, n_low, warp, n_high],
    # partly in vain, so that they come as the tile needs them; 64 bits, so that constant offsets become part of
    # instructions.
    e_low, n_low = tl.arange(0, EL).to(tl.int64) * EH * one, tl.arange(0, NL).to(tl.int64) * NH * one
    e_high, n_high = tl.arange(0, EH).to(tl.int64), tl.arange(0, NH).to(tl.int64)
    warp = tl.arange(0, W).to(tl.int64) * one
    e_row = (e_low[:, None, None, None] + e_high[None, None, None, :]) + (warp * (EH * EL))[None, None, :, None]
    e_row += tl.zeros([1, NL, 1, 1], tl.int64)
    n_row = n_low[None, :, None, None] + n_high[None, None, None, :] + tl.zeros([EL, 1, W, 1], tl.int64)
    m_row = n_row < n
    n_out = n_row + (warp * N)[None, None, :, None]
    e_tile = e_low[:, None, None, None, None] + e_high[None, None, None, :, None]
    e_tile += (warp * (EH * EL))[None, None, :, None, None]
    n_tile = n_low[None, :, None, None, None] + n_high[None, None, None, None, :]
    o_tile = n_tile * E + e_tile
    # Beside the walks, R steps at a time are a tile [e / 4, step, 4].
    c_e = (
        (tl.arange(0, E // 4) * 4 * one)[:, None, None] + tl.arange(0, 4)[None, None, :] + tl.zeros([1, R, 1], tl.int32)
    )
    c_r = tl.arange(0, R)[None, :, None]
    for task in range(program, tasks, tl.num_programs(0)):
        part = task % parts
        group = part // (parts // groups)
        segment = (task // parts) % segments
        i_b = (task // parts // segments).to(tl.int64)
        low_block = (part % (parts // groups)) * blocks_per_part
        high_block = tl.minimum(low_block + blocks_per_part, blocks)
        first = segment.to(tl.int64) * per_segment * STEPS
        steps = tl.minimum(per_segment * STEPS, l - first).to(tl.int32)
        sums = (((part % (parts // groups)) * b + i_b) * l + first) * groups * n + group * n
        for block in range(low_block, high_block):
            first_e = group * per_group + block * E
            c_in = block * E + c_e < per_group
            e_all = first_e + e_tile
            m_tile = (block * E + e_tile < per_group) & (n_tile < n)
            A = tl.load(A_ptr + e_all * n + n_tile, m_tile, 0.0).to(tl.float32) * LOG2E
            o_state = n_tile * e + e_all
            p_carry = carries_ptr + (i_b * segments + segment) * n * e + o_state
            carry = tl.load(p_carry, m_tile, 0.0)
            dA = tl.zeros([EL, NL, W, EH, NH], tl.float32)
            dbias = tl.zeros([E // 4, 4], tl.float32)
            dD = tl.zeros([E // 4, 4], tl.float32)
            for back in range(0, steps, PIECE):
                chunk = (tl.cdiv(steps, PIECE) - 1) * PIECE - back
                # From the stored state before it, through the pieces before this one, to this piece's states.
                from_ = chunk // STEPS * STEPS
                o_start = (i_b * chunks + segment * per_segment + chunk // STEPS) * n * e
                h = tl.load(starts_ptr + o_start + o_state, m_tile, 0.0)
                for piece in range(from_, chunk + 1, PIECE):
                    for r in range(0, PIECE, R):
                        row = first + piece + r
                        m_s = c_in & (piece + r + c_r < steps)
                        raw = tl.load(dt_ptr + i_b * dt_b + row * dt_l + first_e + (c_e + c_r * dt_l), m_s, 0.0)
                        raw = raw.to(tl.float32)
                        x = tl.load(x_ptr + i_b * x_b + row * x_l + first_e + (c_e + c_r * x_l), m_s, 0.0)
                        if piece == chunk:
                            p_dy = dy_ptr + i_b * dy_b + row * dy_l + first_e
                            dy = tl.load(p_dy + (c_e + c_r * dy_l), m_s, 0.0).to(tl.float32)
                            if z_ptr is not None:
                                p_z = z_ptr + i_b * z_b + row * z_l + first_e
                                z = tl.load(p_z + (c_e + c_r * z_l), m_s, 0.0).to(tl.float32)
                                dy = dy * z * sigmoid(z)
                            tl.store(s_dy + r * E + (c_e + c_r * E), dy)
                        if bias_ptr is not None:
                            raw += tl.load(bias_ptr + first_e + c_e, c_in, 0.0).to(tl.float32)
                        dt = tl.where(m_s, _step_size(raw, low, high, SOFTPLUS, LIMITED), 0.0)
                        tl.store(s_dt + r * E + (c_e + c_r * E), dt)
                        tl.store(s_u + r * E + (c_e + c_r * E), dt * x.to(tl.float32))
                    tl.debug_barrier()

                    p_B = B_ptr + i_b * B_b + (first + piece) * B_l + group * B_g
                    if resets_ptr is not None:
                        p_cut = resets_ptr + i_b * l + first + piece
                    dts, us, Bs = _operands(s_dt, s_u, p_B, B_l, e_row, n_row, m_row, 0, steps - piece, T, E)
                    last = BLOCKS - (piece == chunk).to(tl.int32)
                    for i in range(last):
                        t0 = i * T
                        tl.store(notes_ptr + i * N * E + o_tile, h)
                        dts_next, us_next, Bs_next = _operands(
                            s_dt, s_u, p_B, B_l, e_row, n_row, m_row, t0 + T, steps - piece, T, E
                        )
                        for k in tl.static_range(T):
                            if resets_ptr is not None:
                                h = tl.where(tl.load(p_cut + t0 + k, piece + t0 + k < steps, 0) != 0, 0.0, h)
                            h = h * _decay(dts[k][:, :, :, :, None] * A, x_ptr.dtype.element_ty == tl.float32)
                            h += us[k][:, :, :, :, None] * Bs[k].to(tl.float32)[:, :, :, None, :]
                        dts, us, Bs = dts_next, us_next, Bs_next
                    if piece < chunk:
                        tl.debug_barrier()
                tl.store(notes_ptr + (BLOCKS - 1) * N * E + o_tile, h)

                p_B = B_ptr + i_b * B_b + (first + chunk) * B_l + group * B_g
                p_C = C_ptr + i_b * C_b + (first + chunk) * C_l + group * C_g
                if resets_ptr is not None:
                    p_cut = resets_ptr + i_b * l + first + chunk
                for i in range(BLOCKS):
                    t0 = (BLOCKS - 1 - i) * T
                    h = tl.load(notes_ptr + (BLOCKS - 1 - i) * N * E + o_tile)
                    dts, us, Bs = _operands(s_dt, s_u, p_B, B_l, e_row, n_row, m_row, t0, steps - chunk, T, E)
                    dt_t, u_t, dy_t, B_t, C_t = _operands_back(
                        s_dt, s_u, s_dy, p_B, p_C, B_l, C_l, e_row, n_row, m_row, t0 + T - 1, steps - chunk, E
                    )
                    states, before, decays, cuts = (), (), (), ()
                    for k in tl.static_range(T):
                        states += (h,)
                        if resets_ptr is not None:
                            cut = tl.load(p_cut + t0 + k, chunk + t0 + k < steps, 0) != 0
                            h = tl.where(cut, 0.0, h)
                            cuts += (cut,)
                        before += (h,)
                        decays += (_decay(dts[k][:, :, :, :, None] * A, x_ptr.dtype.element_ty == tl.float32),)
                        h = h * decays[k] + us[k][:, :, :, :, None] * Bs[k].to(tl.float32)[:, :, :, None, :]
                    for k in tl.static_range(T - 1, -1, -1):
                        t = t0 + k
                        dt_k, u_k, dy_k = dt_t[:, :, :, :, None], u_t[:, :, :, :, None], dy_t[:, :, :, :, None]
                        B_k, C_k = B_t.to(tl.float32)[:, :, :, None, :], C_t.to(tl.float32)[:, :, :, None, :]
                        if k > 0:
                            dt_t, u_t, dy_t, B_t, C_t = _operands_back(
                                s_dt, s_u, s_dy, p_B, p_C, B_l, C_l, e_row, n_row, m_row, t - 1, steps - chunk, E
                            )
                        tl.store(s_dC + t * (W * N) + n_out, _over_channels(dy_k * h))
                        if z_ptr is not None:
                            tl.store(s_y + t * E + e_row, _over_n(h * C_k))
                        g = carry + dy_k * C_k
                        tl.store(s_dB + t * (W * N) + n_out, _over_channels(u_k * g))
                        tl.store(s_u + t * E + e_row, _over_n(g * B_k))
                        carry = g * decays[k]
                        if resets_ptr is not None:
                            carry = tl.where(cuts[k], 0.0, carry)
                        w = carry * before[k]
                        dA += w * dt_k
                        tl.store(s_dy + t * E + e_row, _over_n(w * A))
                        h = states[k]
                tl.debug_barrier()

                dD_chunk = tl.zeros([E // 4, R, 4], tl.float32)
                dbias_chunk = tl.zeros([E // 4, R, 4], tl.float32)
                for r in range(0, PIECE, R):
                    row = first + chunk + r
                    m_s = c_in & (chunk + r + c_r < steps)
                    x = tl.load(x_ptr + i_b * x_b + row * x_l + first_e + (c_e + c_r * x_l), m_s, 0.0).to(tl.float32)
                    dy = tl.load(dy_ptr + i_b * dy_b + row * dy_l + first_e + (c_e + c_r * dy_l), m_s, 0.0)
                    dy = dy.to(tl.float32)
                    ddt = tl.load(s_dy + r * E + (c_e + c_r * E)) * (1.0 / LOG2E)
                    du = tl.load(s_u + r * E + (c_e + c_r * E))
                    dx = tl.load(s_dt + r * E + (c_e + c_r * E)) * du
                    ddt += x * du
                    if SOFTPLUS or LIMITED:
                        raw = tl.load(dt_ptr + i_b * dt_b + row * dt_l + first_e + (c_e + c_r * dt_l), m_s, 0.0)
                        raw = raw.to(tl.float32)
                        if bias_ptr is not None:
                            raw += tl.load(bias_ptr + first_e + c_e, c_in, 0.0).to(tl.float32)
                    if z_ptr is not None:
                        y = tl.load(s_y + r * E + (c_e + c_r * E))
                    if D_ptr is not None:
                        D = tl.load(D_ptr + first_e + c_e, c_in, 0.0).to(tl.float32)
                        if z_ptr is not None:
                            y += D * x
                    out = (i_b * l + row) * e + first_e
                    if z_ptr is not None:
                        z = tl.load(z_ptr + i_b * z_b + row * z_l + first_e + (c_e + c_r * z_l), m_s, 0.0)
                        z = z.to(tl.float32)
                        gate = sigmoid(z)
                        dz = dy * y * gate * (1.0 + z * (1.0 - gate))
                        tl.store(dz_ptr + out + (c_e + c_r * e), dz.to(dz_ptr.dtype.element_ty), m_s)
                        dy = dy * z * gate
                    if D_ptr is not None:
                        dx += D * dy
                        dD_chunk += dy * x
                    tl.store(dx_ptr + out + (c_e + c_r * e), dx.to(dx_ptr.dtype.element_ty), m_s)
                    if LIMITED:
                        free = _step_size(raw, low, high, SOFTPLUS, False)
                        ddt = tl.where((free >= low) & (free <= high), ddt, 0.0)
                    if SOFTPLUS:
                        ddt *= sigmoid(raw)
                    tl.store(ddt_ptr + out + (c_e + c_r * e), ddt.to(ddt_ptr.dtype.element_ty), m_s)
                    if bias_ptr is not None:
                        dbias_chunk += tl.where(m_s, ddt, 0.0)
                if D_ptr is not None:
                    dD += tl.sum(dD_chunk, 1)
                if bias_ptr is not None:
                    dbias += tl.sum(dbias_chunk, 1)
                # dB, dC: the warps' sums; the first channel block stores them, the others add to what is there
                o_t = tl.arange(0, PIECE)
                o_n = tl.arange(0, N)
                o_out = sums + (chunk + o_t).to(tl.int64)[:, None] * groups * n + o_n[None, :]
                m_out = (chunk + o_t < steps)[:, None] & (o_n < n)[None, :]
                o_sums = o_t[:, None] * (W * N) + o_n[None, :]
                dB = tl.zeros([PIECE, N], tl.float32)
                dC = tl.zeros([PIECE, N], tl.float32)
                if block > low_block:
                    dB += tl.load(dB_ptr + o_out, m_out, 0.0)
                    dC += tl.load(dC_ptr + o_out, m_out, 0.0)
                for i in tl.static_range(W):
                    dB += tl.load(s_dB + i * N + o_sums)
                    dC += tl.load(s_dC + i * N + o_sums)
                tl.store(dB_ptr + o_out, dB.to(dB_ptr.dtype.element_ty), m_out)
                tl.store(dC_ptr + o_out, dC.to(dC_ptr.dtype.element_ty), m_out)
                tl.debug_barrier()
            tl.store(p_carry, dA, m_tile)
            if segment == 0:
                tl.store(dinitial_ptr + (i_b * e + e_all) * n + n_tile, carry, m_tile)
            o_e = tl.arange(0, E // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
            m_e = block * E + o_e < per_group
            if D_ptr is not None:
                tl.store(dD_ptr + (i_b * segments + segment) * e + first_e + o_e, dD, m_e)
            if bias_ptr is not None:
                tl.store(dbias_ptr + (i_b * segments + segment) * e + first_e + o_e, dbias, m_e)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@planned
def _launch(kernel, grid, numbers, options, *_) -> Launch:
    return Launch(kernel, grid, *numbers, **dict(options))


def _run(kernel, programs: int, tensors: tuple[Tensor | None, ...], *numbers, **options) -> None:
    """kernel[programs](*tensors, *numbers, **options)."""
    kinds = [t if t is None else t.dtype for t in tensors]
    _launch(kernel, (programs,), numbers, tuple(options.items()), tensors[0].device, *kinds)(*tensors)


def _rows(t: Tensor | None) -> Tensor | None:
    """The tensor (b, l, ...) as the kernels ask: last dimension contiguous, batch entries whole rows apart."""
    if t is None:
        return None
    whole = t.shape[0] == 1 or (t.stride(1) > 0 and t.stride(0) % t.stride(1) == 0)
    return t if whole and (t.stride(-1) == 1 or t.shape[-1] == 1) else t.contiguous()


def _strides(**tensors: Tensor | None) -> tuple[list[int], dict[str, int]]:
    """Rows from one batch entry to the next; strides of rows, and of groups where there are any."""
    batch, rows = [], {}
    for name, t in tensors.items():
        batch.append(0 if t is None or t.shape[0] == 1 else t.stride(0) // t.stride(1))
        rows[f"{name}_l"] = 0 if t is None else t.stride(1)
        if t is not None and t.dim() == 4:
            rows[f"{name}_g"] = t.stride(2)
    return batch, rows


def _per_segment(pieces: int, longest: int, warps: int, registers: int, device: torch.device) -> int:
    """Chunks per segment, at most `longest`, such that all programs together take whole rounds of the processors.

    pieces: chunks times the programs that one chunk takes. A processor has 2,048 registers for each of a warp's lanes.
    """
    together = _processors(device) * max(1, 2048 // registers // warps)
    return triton.cdiv(pieces, together * triton.cdiv(pieces, together * longest))


def _wide(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C in float32: 4 bytes are the least that can be fetched ahead, and programs need not convert them."""
    B, C = _rows(B), _rows(C)
    if B.dtype == C.dtype == torch.float32:
        return B, C
    (b, l, groups, n), wide = B.shape, torch.empty(2, *B.shape, dtype=torch.float32, device=B.device)
    batch, strides = _strides(B=B, C=C)
    cols = triton.next_power_of_2(groups * n)
    rows = max(1, 4096 // cols)
    _run(
        _widen, triton.cdiv(b * l, rows), (B, C, wide), b * l, l, *batch, **strides, GROUPS=groups, n=n, ROWS=rows,
        COLS=cols, num_warps=4,
    )  # fmt: skip
    return wide[0], wide[1]


def _width(per_group: int, N: int) -> tuple[int, int, int]:
    """Channels, warps and registers of a walk: 64 channels a warp, or 64 in all where a thread cannot hold all n."""
    warps = min(WARPS, triton.next_power_of_2(triton.cdiv(per_group, 64))) if N <= 16 else N // 16
    return 64 * warps if N <= 16 else 64, warps, min(REGISTERS, 2048 // warps // 8 * 8)


def _broken(resets: Tensor | None, segments: int, steps: int) -> Tensor | None:
    """Whether a sequence starts within each segment, (b, segments)."""
    if resets is None:
        return None
    padded = torch.nn.functional.pad(resets, (0, segments * steps - resets.shape[1]))
    return padded.view(resets.shape[0], segments, steps).any(-1).to(torch.uint8)


def _run_chain(values, total, A, initial, broken, segments, row, reverse):
    b, (e, n) = values.shape[0], A.shape
    column_blocks = triton.cdiv(n * e, 8)
    _run(
        _chain, b * column_blocks, (values, total, A, initial, broken),
        e, n, segments, row, column_blocks, values.stride(0), REVERSE=reverse, ROWS=128, COLS=8, num_warps=4,
    )  # fmt: skip


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, resets: Tensor | None, softplus: bool, low: float, high: float,
    enter: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (b, l, e), the final state (b, e, n) and the states before every STEPS-th step (b, c, n, e).

    With `enter` (across.py) enter(end state from zero, decay) is the initial state.
    """
    (b, l, e), n, groups = x.shape, A.shape[1], B.shape[2]
    x, dt, z, A, A_t = _rows(x), _rows(dt), _rows(z), A.contiguous(), A.t().contiguous()
    D, dt_bias, initial_state = (None if t is None else t.contiguous() for t in (D, dt_bias, initial_state))
    resets = None if resets is None else resets.contiguous().view(torch.uint8)
    N = max(triton.next_power_of_2(n), 4)
    E, warps, registers = _width(e // groups, N)
    programs = groups * triton.cdiv(e // groups, E)  # of one segment
    chunks = triton.cdiv(l, STEPS)
    per_segment = _per_segment(b * chunks * programs, LONGEST, warps, registers, x.device)
    segments = triton.cdiv(chunks, per_segment)
    chained = segments
    if enter is not None:  # one more segment, without steps, beyond the end
        chained, chunks = segments + 1, segments * per_segment + 1
    y = torch.empty(b, l, e, dtype=x.dtype, device=x.device)
    final = torch.empty(b, e, n, dtype=torch.float32, device=x.device)
    starts = torch.empty(b, chunks, n, e, dtype=torch.float32, device=x.device)
    total = torch.empty(b, chained, e, dtype=torch.float32, device=x.device)
    limited = not (softplus and (low, high) == (0.0, math.inf))
    B, C = _wide(B, C)
    batch, rows = _strides(x=x, dt=dt, z=z, B=B, C=C)
    for output in (False, True):
        if chained == 1 and not output:
            continue
        _run(
            _walk, b * (segments if output else chained - 1) * programs,
            (x, dt, A_t, B, C, D, z, dt_bias, initial_state, resets, starts, total, y, final),
            l, 1, segments if output else chained, per_segment, chunks, low, high, *batch, e=e, n=n, **rows,
            GROUPS=groups, N=N, E=E, T=UNROLL, STEPS=STEPS, STAGES=STAGES, OUTPUT=output, SOFTPLUS=softplus,
            LIMITED=limited, num_warps=warps, maxnreg=registers,
        )  # fmt: skip
        if not output:
            broken = _broken(resets, chained, per_segment * STEPS)
            if enter is not None:
                edges = starts[:, ::per_segment].clone()
                _run_chain(edges, total, A, None, broken, chained, 1, False)
                decay = (total[:, :segments].sum(1)[..., None] * A.float()).exp()
                if resets is not None:
                    decay = decay.masked_fill((resets != 0).any(1)[:, None, None], 0.0)
                initial_state = enter(edges[:, -1].mT, decay).contiguous()
            _run_chain(starts, total, A, initial_state, broken, chained, per_segment, False)
    return y, final, starts


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, starts: Tensor, resets: Tensor | None, softplus: bool, low: float,
    high: float, enter: Callable | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, of D, z, dt_bias where given, and of the initial state.

    With `enter` the gradient of the final state is enter(that of the initial state by y alone).
    """
    (b, l, e), n, groups = x.shape, A.shape[1], B.shape[2]
    x, dt, z, dy, A, A_t = _rows(x), _rows(dt), _rows(z), _rows(dy), A.contiguous(), A.t().contiguous()
    dtypes = B.dtype, C.dtype
    D, dt_bias, dfinal = (None if t is None else t.contiguous() for t in (D, dt_bias, dfinal))
    resets = None if resets is None else resets.contiguous().view(torch.uint8)
    N = max(triton.next_power_of_2(n), 4)
    E, warps, registers = _width(e // groups, N)
    programs = groups * triton.cdiv(e // groups, E)
    chunks, stored = triton.cdiv(l, STEPS), starts.shape[1]
    narrow = x.element_size() == dt.element_size() == 2 and N <= 16 and e // groups % 2 == 0
    longest, most = (LONGEST, MOST_REGISTERS) if narrow else (LONGEST_EXACT, registers)
    per_segment = _per_segment(b * chunks * programs, longest, warps, most, x.device)
    segments = triton.cdiv(chunks, per_segment)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=x.device)

    beyond = int(enter is not None)  # one more segment, without steps, before the start
    chained = segments + beyond
    total, carries, dinitial = new(b, chained, e), new(b, chained, n, e), new(b, e, n)
    dx, ddt = new(b, l, e, dtype=x.dtype), new(b, l, e, dtype=dt.dtype)
    dz = None if z is None else new(b, l, e, dtype=z.dtype)
    dD, dbias = (None if t is None else new(b * segments, e) for t in (D, dt_bias))
    limited = not (softplus and (low, high) == (0.0, math.inf))
    options = {"STEPS": STEPS, "SOFTPLUS": softplus, "LIMITED": limited}
    walk = {"e": e, "n": n, "GROUPS": groups, "N": N, "E": E, "T": UNROLL, "STAGES": STAGES, "num_warps": warps}
    B, C = _wide(B, C)
    if chained > 1:
        batch, rows = _strides(dy=dy, dt=dt, z=z, C=C)
        _run(
            _walk_back, b * (chained - 1) * programs, (dy, dt, A_t, C, z, dt_bias, resets, carries, total),
            l, 1, chained, per_segment, low, high, *batch, **rows, **walk, **options, EMPTY=beyond, maxnreg=registers,
        )  # fmt: skip
    broken = _broken(resets, segments, per_segment * STEPS)
    if enter is not None:
        broken = None if broken is None else torch.nn.functional.pad(broken, (1, 0))
        edges = carries.clone()
        _run_chain(edges, total, A, None, broken, chained, 1, True)
        dfinal = enter(edges[:, 0].mT).contiguous()
    _run_chain(carries, total, A, dfinal, broken, chained, 1, True)
    carries = carries[:, beyond:].contiguous()
    if narrow:
        parts = triton.cdiv(e // groups, E)  # of a group's channels, each with its own sums for dB and dC
        even, odd = ddt.view(torch.int32), dx.view(torch.int32)
        dA, cum, final = new(b, segments, n, e), new(b, stored, e), new(b, n, e)
        batch, rows = _strides(dy=dy, x=x, dt=dt, z=z, B=B, C=C)
        numbers = (b, l, 1, segments, per_segment, stored, low, high, *batch)
        given = (dy, x, dt, A_t, B, C, D, z, dt_bias, resets, starts, even, odd)
        walk |= rows | options | {"maxnreg": MOST_REGISTERS}
        sums = new(parts, *C.shape, dtype=torch.float32 if parts > 1 else dtypes[1])
        every = b * segments * programs
        _run(_walk_gradients, every, (*given, dz, sums, dA, cum, final), *numbers, **walk)
        dC = _added(sums, dtypes[1])
        del sums  # before there are others
        sums = new(parts, *B.shape, dtype=torch.float32 if parts > 1 else dtypes[0])
        given = (*given, dA, cum, final, carries, dx, ddt, sums, dD, dbias, dinitial)
        _run(_walk_back_gradients, every, given, *numbers, **walk)
        dB = _added(sums, dtypes[0])
    else:
        dB, dC = _exact_gradients(
            dy, x, dt, A, B, C, D, z, dt_bias, resets, starts, carries, dx, ddt, dz, dtypes, dD, dbias, dinitial,
            segments, per_segment, low, high, options,
        )  # fmt: skip
    dA = carries.view(b * segments, n * e).sum(0).view(n, e).t().to(A.dtype).contiguous()
    dD, dbias = (None if t is None else t.sum(0).to(s.dtype) for t, s in ((dD, D), (dbias, dt_bias)))
    return [d for d in (dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial) if d is not None]


def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    if parts.shape[0] == 1:
        return parts[0].to(dtype)
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    width = parts.shape[3] * parts.shape[4]
    _run(
        _add, triton.cdiv(out.numel(), 2048), (parts, out), out.numel() // width, PARTS=parts.shape[0], WIDTH=width,
        BLOCK=2048, num_warps=4,
    )  # fmt: skip
    return out


def _exact_gradients(
    dy, x, dt, A, B, C, D, z, dt_bias, resets, starts, carries, dx, ddt, dz, dtypes, dD, dbias, dinitial,
    segments, per_segment, low, high, options,
):  # fmt: skip
    """Runs `_gradients`: dB and dC."""
    (b, l, e), n, groups = x.shape, A.shape[1], B.shape[2]
    chunks, per_group = starts.shape[1], e // groups
    NL, EL = 4, 8
    NH = max(triton.next_power_of_2(n), 4) // NL
    EH = max(1, TILE // NH)
    piece = min(PIECE, STEPS)
    W = min(max(1, GRADIENT_WARPS * 16 // max(16, NH)), triton.next_power_of_2(triton.cdiv(per_group, EH * EL)))
    warps = W * max(1, NH // 16)
    blocks = triton.cdiv(per_group, W * EH * EL)
    programs = _processors(x.device) * max(1, RESIDENT // warps)
    parts = 1  # of a group's channels, each with its own dB and dC, until there is enough to do
    while parts < blocks and b * segments * groups * parts < programs:
        parts *= 2
    blocks_per_part = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, blocks_per_part)
    tasks = b * segments * groups * parts
    programs = min(tasks, programs)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=x.device)

    scratch = new(programs, W * (piece // TURN * NH * NL * EH * EL + 4 * piece * EH * EL + 2 * piece * NH * NL))
    sums = dtypes if blocks == 1 else (torch.float32, torch.float32)
    dB, dC = new(parts, *B.shape, dtype=sums[0]), new(parts, *C.shape, dtype=sums[1])
    strides = [s for t in (dy, x, dt, z) for s in ((0, 0) if t is None else t.stride()[:2])]
    tensors = (dy, x, dt, A, B, C, D, z, dt_bias, resets, starts, carries, scratch)
    _run(
        _gradients, programs, (*tensors, dx, ddt, dz, dB, dC, dD, dbias, dinitial),
        b, l, e, n, 1, per_group, blocks, groups, segments, per_segment, chunks, tasks, groups * parts,
        blocks_per_part, low, high, *strides, *B.stride()[:3], *C.stride()[:3],
        NH=NH, NL=NL, EH=EH, EL=EL, W=W, T=TURN, R=min(ROWS, piece), PIECE=piece, **options, num_warps=warps,
    )  # fmt: skip
    return _added(dB, dtypes[0]), _added(dC, dtypes[1])
