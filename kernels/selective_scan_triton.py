"""The selective scan on NVIDIA GPUs, in Triton: three kernels forward, three backward, no atomics.

Time is cut into segments. Forward, `_walk` first finds for every segment the state at its end when it starts from zero,
and the sum of dt over it; since the decay over a segment is exp(A sum dt), `_chain` turns these into the state before
every segment; a second `_walk` starts from there and writes y. A warp holds the states of 32 channels in registers, all
n of a channel in one thread, so that the sum over n needs no other thread.

Backward, `_walk_back` and `_chain` do the same for the adjoint, and `_gradients` takes a segment from its end to its
start, PIECE steps at a time. It knows the state before (stored forward every STEPS steps) and the adjoint after. It
walks the piece forward and notes the state before every TURN steps in a scratch that stays in cache; then, from the
last to the first, it recomputes TURN states and decays into registers and walks them backwards. Here a warp is laid
out as 8 channels by 4 n, several of both per thread: dB and dC are sums over channels, y, dx and ddt sums over n.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.kernels.math_triton import LOG2E, sigmoid, softplus

STEPS = 64  # as in selective_scan.py
# Measured on an H200 at l = 1,048,576, e = 256, n = 16 in bfloat16, each beside two to five alternatives.
WARPS, STAGES, REGISTERS = 4, 4, 112  # a walk's warps, steps under way, registers per thread: 16 warps a processor
LONGEST, LONGEST_BACK = 16, 4  # chunks of STEPS steps per segment, at most
WIDE = 1 << 19  # from so many elements on, B and C are made float32 once instead of by every program
GRADIENT_WARPS, TURN, PIECE = 8, 4, 32  # of _gradients
ROWS = 16  # steps that _gradients takes at once beside its walks
TILE, RESIDENT = 16, 8  # states per thread, and warps per processor, that 255 registers allow


@triton.jit
def _step_size(raw, low, high, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr):
    dt = softplus(raw) if SOFTPLUS else raw
    if LIMITED:
        dt = tl.minimum(tl.maximum(dt, low), high)
    return dt


@triton.jit
def _load(p, mask):
    return tl.load(p) if mask is None else tl.load(p, mask, 0.0)


@triton.jit(do_not_specialize=["l", "one", "segments", "per_segment", "chunks"])
def _walk(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, resets_ptr,
    starts_ptr, total_ptr, y_ptr, final_ptr,
    l, e, n, one, per_group, blocks, all_blocks, segments, per_segment, chunks, low, high,
    x_b, x_l, dt_b, dt_l, z_b, z_l, B_b, B_l, B_g, C_b, C_l, C_g,
    N: tl.constexpr, E: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, OUTPUT: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, EVEN_N: tl.constexpr, EVEN_E: tl.constexpr,
):  # fmt: skip
    """Walks a segment forward. Without OUTPUT: from zero, to its end state and sum of dt; with it: from the true start.

    A tile of states is [e / 2, 2, n]: a thread has two neighbouring channels (4 bytes is the least that can be fetched
    ahead) and all their n. `one` is 1, but the compiler must not know, or it would spread n over lanes for wider loads.
    """
    pid = tl.program_id(0)
    walked = segments if OUTPUT else segments - 1
    segment = (pid // all_blocks) % walked
    i_b = (pid // all_blocks // walked).to(tl.int64)
    group = pid % all_blocks // blocks
    within = pid % all_blocks % blocks * E + (tl.arange(0, E // 2) * 2 * one)[:, None] + tl.arange(0, 2)[None, :]
    o_e, m_e = group * per_group + within, within < per_group
    o_n = tl.arange(0, N)
    m_n = o_n < n
    m_h = m_e[:, :, None] & m_n[None, None, :]
    e_h, n_h = o_e[:, :, None] * one, o_n[None, None, :] * one  # of no known order: threads are laid along channels
    A = tl.load(A_ptr + e_h * n + n_h, m_h, 0.0).to(tl.float32) * LOG2E
    bias = tl.zeros([E // 2, 2], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o_e, m_e, 0.0).to(tl.float32)
    first = segment.to(tl.int64) * per_segment * STEPS
    x_ptr += i_b * x_b + first * x_l
    dt_ptr += i_b * dt_b + first * dt_l
    B_ptr += i_b * B_b + first * B_l + group * B_g
    starts_ptr += (i_b * chunks + segment * per_segment) * n * e
    h = tl.zeros([E // 2, 2, N], tl.float32)
    total = tl.zeros([E // 2, 2], tl.float32)
    D = tl.zeros([E // 2, 2], tl.float32)
    if OUTPUT:
        C_ptr += i_b * C_b + first * C_l + group * C_g
        y_ptr += (i_b * l + first) * e
        if z_ptr is not None:
            z_ptr += i_b * z_b + first * z_l
        if D_ptr is not None:
            D = tl.load(D_ptr + o_e, m_e, 0.0).to(tl.float32)
        if segment > 0:
            h = tl.load(starts_ptr + n_h * e + e_h, m_h, 0.0)
        elif initial_ptr is not None:
            h = tl.load(initial_ptr + (i_b * e + e_h) * n + n_h, m_h, 0.0).to(tl.float32)
    if resets_ptr is not None:
        resets_ptr += i_b * l + first
    here = None if EVEN_E else m_e
    row = None if EVEN_N else m_n
    steps = tl.minimum(per_segment * STEPS, l - first).to(tl.int32)
    for chunk in range(0, steps, STEPS):
        if OUTPUT:
            tl.store(starts_ptr + chunk // STEPS * n * e + n_h * e + e_h, h, m_h)
        for t in tl.range(chunk, tl.minimum(chunk + STEPS, steps), num_stages=STAGES):
            x = _load(x_ptr + t * x_l + o_e, here).to(tl.float32)
            dt = _load(dt_ptr + t * dt_l + o_e, here).to(tl.float32)
            dt = _step_size(dt + bias, low, high, SOFTPLUS, LIMITED)
            B = _load(B_ptr + t * B_l + o_n, row).to(tl.float32)
            if resets_ptr is not None:
                h = tl.where(tl.load(resets_ptr + t) != 0, 0.0, h)
            h = h * tl.exp2(dt[:, :, None] * A) + (dt * x)[:, :, None] * B[None, None, :]
            if OUTPUT:
                C = _load(C_ptr + t * C_l + o_n, row).to(tl.float32)
                y = tl.sum(h * C[None, None, :], 2)
                if D_ptr is not None:
                    y += D * x
                if z_ptr is not None:
                    z = _load(z_ptr + t * z_l + o_e, here).to(tl.float32)
                    y = y * z * sigmoid(z)
                tl.store(y_ptr + t * e + o_e, y.to(y_ptr.dtype.element_ty), here)
            else:
                total += dt
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
        decay = tl.exp2(total * A[None, :])
        if broken_ptr is not None:
            broken = tl.load(broken_ptr + i_b * segments + before, base + o_r < segments, 0)
            decay = tl.where((broken != 0)[:, None], 0.0, decay)
            value += tl.where((o_r == 0)[:, None] & (broken == 0)[:, None], decay * state[None, :], 0.0)
        else:
            value += tl.where((o_r == 0)[:, None], decay * state[None, :], 0.0)
        _, value = tl.associative_scan((decay, value), 0, _combine)
        tl.store(pointers, value, here)
        state = tl.sum(tl.where((o_r == ROWS - 1)[:, None], value, 0.0), 0)


@triton.jit(do_not_specialize=["l", "one", "segments", "per_segment"])
def _walk_back(
    dy_ptr, dt_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, resets_ptr, carries_ptr, total_ptr,
    l, e, n, one, per_group, blocks, all_blocks, segments, per_segment, low, high,
    dy_b, dy_l, dt_b, dt_l, z_b, z_l, C_b, C_l, C_g,
    N: tl.constexpr, E: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, EVEN_N: tl.constexpr, EVEN_E: tl.constexpr,
):  # fmt: skip
    """Walks segments 1, 2, ... backwards from adjoint zero, to what leaves their first step, and their sums of dt."""
    pid = tl.program_id(0)
    segment = (pid // all_blocks) % (segments - 1) + 1
    i_b = (pid // all_blocks // (segments - 1)).to(tl.int64)
    group = pid % all_blocks // blocks
    within = pid % all_blocks % blocks * E + (tl.arange(0, E // 2) * 2 * one)[:, None] + tl.arange(0, 2)[None, :]
    o_e, m_e = group * per_group + within, within < per_group
    o_n = tl.arange(0, N)
    m_n = o_n < n
    m_h = m_e[:, :, None] & m_n[None, None, :]
    e_h, n_h = o_e[:, :, None] * one, o_n[None, None, :] * one
    A = tl.load(A_ptr + e_h * n + n_h, m_h, 0.0).to(tl.float32) * LOG2E
    bias = tl.zeros([E // 2, 2], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o_e, m_e, 0.0).to(tl.float32)
    first = segment.to(tl.int64) * per_segment * STEPS
    dy_ptr += i_b * dy_b + first * dy_l
    dt_ptr += i_b * dt_b + first * dt_l
    C_ptr += i_b * C_b + first * C_l + group * C_g
    if z_ptr is not None:
        z_ptr += i_b * z_b + first * z_l
    if resets_ptr is not None:
        resets_ptr += i_b * l + first
    here = None if EVEN_E else m_e
    row = None if EVEN_N else m_n
    carry = tl.zeros([E // 2, 2, N], tl.float32)
    total = tl.zeros([E // 2, 2], tl.float32)
    steps = tl.minimum(per_segment * STEPS, l - first).to(tl.int32)
    for back in tl.range(0, steps, num_stages=STAGES):
        t = steps - 1 - back
        dy = _load(dy_ptr + t * dy_l + o_e, here).to(tl.float32)
        if z_ptr is not None:
            z = _load(z_ptr + t * z_l + o_e, here).to(tl.float32)
            dy = dy * z * sigmoid(z)
        dt = _load(dt_ptr + t * dt_l + o_e, here).to(tl.float32)
        dt = _step_size(dt + bias, low, high, SOFTPLUS, LIMITED)
        C = _load(C_ptr + t * C_l + o_n, row).to(tl.float32)
        total += dt
        carry = (carry + dy[:, :, None] * C[None, None, :]) * tl.exp2(dt[:, :, None] * A)
        if resets_ptr is not None:
            carry = tl.where(tl.load(resets_ptr + t) != 0, 0.0, carry)
    tl.store(carries_ptr + (i_b * segments + segment - 1) * n * e + n_h * e + e_h, carry, m_h)
    tl.store(total_ptr + (i_b * segments + segment) * e + o_e, total, m_e)


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
                            h = h * tl.exp2(dts[k][:, :, :, :, None] * A)
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
                        decays += (tl.exp2(dts[k][:, :, :, :, None] * A),)
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


def _rows(t: Tensor | None) -> Tensor | None:
    """The tensor, with its last dimension contiguous as the kernels ask."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _per_segment(l: int, runs: int, most: int) -> int:
    """Chunks per segment: a power of two up to `most` that leaves some 8192 runs of 32 channels."""
    chunks = triton.cdiv(l, STEPS)
    size = 1
    while size < most and chunks * runs >= 2 * 8192 * size:
        size *= 2
    return size


def _wide(*tensors: Tensor) -> list[Tensor]:
    """B and C in float32, unless that costs more than it saves: every channel block would convert them again."""
    return [t if t.numel() < WIDE else t.float() for t in tensors]


def _width(per_group: int, N: int) -> tuple[int, int]:
    """Channels and warps of a program of a walk: 64 channels a warp, or 64 in all where a thread cannot hold all n."""
    if N > 16:
        return 64, N // 16
    warps = min(WARPS, triton.next_power_of_2(triton.cdiv(per_group, 64)))
    return 64 * warps, warps


def _strides(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else t.stride()[:2]


def _broken(resets: Tensor | None, segments: int, steps: int) -> Tensor | None:
    """Whether a sequence starts within each segment, (b, segments)."""
    if resets is None:
        return None
    padded = torch.nn.functional.pad(resets, (0, segments * steps - resets.shape[1]))
    return padded.view(resets.shape[0], segments, steps).any(-1).to(torch.uint8)


def _run_chain(values, total, A, initial, broken, segments, row, reverse):
    b, (e, n) = values.shape[0], A.shape
    column_blocks = triton.cdiv(n * e, 8)
    _chain[(b * column_blocks,)](
        values, total, A, initial, broken, e, n, segments, row, column_blocks, values.stride(0),
        REVERSE=reverse, ROWS=128, COLS=8, num_warps=4,
    )  # fmt: skip


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, resets: Tensor | None, softplus: bool, low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (b, l, e), the final state (b, e, n) and the states before every STEPS-th step (b, c, n, e)."""
    (b, l, e), n, groups = x.shape, A.shape[1], B.shape[2]
    x, dt, B, C, z, A = _rows(x), _rows(dt), _rows(B), _rows(C), _rows(z), A.contiguous()
    B, C = _wide(B, C)
    D, dt_bias, initial_state = (None if t is None else t.contiguous() for t in (D, dt_bias, initial_state))
    resets = None if resets is None else resets.contiguous().view(torch.uint8)
    N = max(triton.next_power_of_2(n), 4)
    per_group = e // groups
    E, warps = _width(per_group, N)
    blocks = triton.cdiv(per_group, E)
    per_segment = _per_segment(l, b * groups * triton.cdiv(per_group, 32), LONGEST)
    chunks = triton.cdiv(l, STEPS)
    segments = triton.cdiv(chunks, per_segment)
    y = torch.empty(b, l, e, dtype=x.dtype, device=x.device)
    final = torch.empty(b, e, n, dtype=torch.float32, device=x.device)
    starts = torch.empty(b, chunks, n, e, dtype=torch.float32, device=x.device)
    total = torch.empty(b, segments, e, dtype=torch.float32, device=x.device)
    limited = not (softplus and (low, high) == (0.0, math.inf))
    with torch.cuda.device_of(x):
        for output in (False, True):
            if segments == 1 and not output:
                continue
            _walk[(b * (segments if output else segments - 1) * groups * blocks,)](
                x, dt, A, B, C, D, z, dt_bias, initial_state, resets, starts, total, y, final,
                l, e, n, 1, per_group, blocks, groups * blocks, segments, per_segment, chunks, low, high,
                *_strides(x), *_strides(dt), *_strides(z), *B.stride()[:3], *C.stride()[:3],
                N=N, E=E, STEPS=STEPS, STAGES=STAGES, OUTPUT=output, SOFTPLUS=softplus, LIMITED=limited,
                EVEN_N=n == N, EVEN_E=per_group % E == 0, num_warps=warps, maxnreg=REGISTERS,
            )  # fmt: skip
            if not output:
                broken = _broken(resets, segments, per_segment * STEPS)
                _run_chain(starts, total, A, initial_state, broken, segments, per_segment, False)
    return y, final, starts


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, starts: Tensor, resets: Tensor | None, softplus: bool, low: float,
    high: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, of D, z, dt_bias where given, and of the initial state."""
    (b, l, e), n, groups = x.shape, A.shape[1], B.shape[2]
    x, dt, z, dy, A = _rows(x), _rows(dt), _rows(z), _rows(dy), A.contiguous()
    dtypes, (B, C) = (B.dtype, C.dtype), _wide(_rows(B), _rows(C))
    D, dt_bias, dfinal = (None if t is None else t.contiguous() for t in (D, dt_bias, dfinal))
    resets = None if resets is None else resets.contiguous().view(torch.uint8)
    N = max(triton.next_power_of_2(n), 4)
    per_group = e // groups
    E, warps = _width(per_group, N)
    blocks = triton.cdiv(per_group, E)
    per_segment = _per_segment(l, b * groups * triton.cdiv(per_group, 32), LONGEST_BACK)
    chunks = triton.cdiv(l, STEPS)
    segments = triton.cdiv(chunks, per_segment)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=x.device)

    total, carries, dinitial = new(b, segments, e), new(b, segments, n, e), new(b, e, n)
    limited = not (softplus and (low, high) == (0.0, math.inf))
    options = {"SOFTPLUS": softplus, "LIMITED": limited}
    with torch.cuda.device_of(x):
        if segments > 1:
            _walk_back[(b * (segments - 1) * groups * blocks,)](
                dy, dt, A, C, z, dt_bias, resets, carries, total,
                l, e, n, 1, per_group, blocks, groups * blocks, segments, per_segment, low, high,
                *_strides(dy), *_strides(dt), *_strides(z), *C.stride()[:3],
                N=N, E=E, STEPS=STEPS, STAGES=STAGES, EVEN_N=n == N, EVEN_E=per_group % E == 0, **options,
                num_warps=warps, maxnreg=REGISTERS,
            )  # fmt: skip
        _run_chain(carries, total, A, dfinal, _broken(resets, segments, per_segment * STEPS), segments, 1, True)

        NL, EL = 4, 8
        NH = N // NL
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
        scratch = new(programs, W * (piece // TURN * N * EH * EL + 4 * piece * EH * EL + 2 * piece * N))
        dx, ddt = new(b, l, e, dtype=x.dtype), new(b, l, e, dtype=dt.dtype)
        dz = None if z is None else new(b, l, e, dtype=z.dtype)
        sums = dtypes if blocks == 1 else (torch.float32, torch.float32)
        dB, dC = new(parts, *B.shape, dtype=sums[0]), new(parts, *C.shape, dtype=sums[1])
        dD, dbias = (None if t is None else new(b * segments, e) for t in (D, dt_bias))
        _gradients[(programs,)](
            dy, x, dt, A, B, C, D, z, dt_bias, resets, starts, carries, scratch, dx, ddt, dz, dB, dC, dD, dbias,
            dinitial, b, l, e, n, 1, per_group, blocks, groups, segments, per_segment, chunks, tasks, groups * parts,
            blocks_per_part, low, high,
            *_strides(dy), *_strides(x), *_strides(dt), *_strides(z), *B.stride()[:3], *C.stride()[:3],
            NH=NH, NL=NL, EH=EH, EL=EL, W=W, T=TURN, R=min(ROWS, piece), PIECE=piece, STEPS=STEPS, **options,
            num_warps=warps,
        )  # fmt: skip
        dB, dC = ((t.sum(0) if parts > 1 else t[0]).to(dtype) for t, dtype in zip((dB, dC), dtypes, strict=True))
        dA = carries.view(b * segments, n * e).sum(0).view(n, e).t().to(A.dtype)
        dD, dbias = (None if t is None else t.sum(0).to(s.dtype) for t, s in ((dD, D), (dbias, dt_bias)))
    return [d for d in (dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial) if d is not None]
