"""SSD on NVIDIA GPUs, in Triton: the chunked form of ssd.py and its adjoint, walked with the state in registers.

The sequence is cut into tiles of q steps, and runs of tiles ("stretches") go to programs of their own. Forward: the
decays of every step (`_decays`), every stretch's end state from zero (`_ends`), the states chained over stretches
(`_chain`), and the outputs (`_outputs`), which walk each stretch again from its true start. The adjoint of the map
x -> y is the same map with time reversed and B and C exchanged, so dx comes from the same kernels. On the way they
leave, per step, the products that the gradient of dt needs (`_step_gradients`), and per tile the states from both
sides, from which `_map_gradients` forms dB and dC, one program per tile and group, summing over the group's heads in
registers. kernels/README.md has the equations and the counts.

Letters as in ssd.py. A state is kept as (n, p). A head whose p exceeds a block is split into several "rows" with a
state of their own (h' = h * blocks of p).
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.kernels.launch import Launch, Pieces, planned
from seqmodels.kernels.math_triton import LOG2E, exp2, prefetch, step_size, step_size_gradient

# The least step size that enters a product: what is linear in it can be divided by it again.
SMALLEST = tl.constexpr(1e-18)
# 2 to this power is 0 in float32, times any step size.
NOTHING = tl.constexpr(-200.0)
MOST_TILES = tl.constexpr(128)  # of a stretch


@triton.jit(do_not_specialize=["length", "padded"])
def _decays(
    dt_ptr, A_ptr, bias_ptr, m_ptr, w_ptr, shifted_ptr, sum_ptr, own_ptr,
    length, padded, low, high, dt_b, m_b, m_g, w_b, w_g,
    dt_l: tl.constexpr, m_l: tl.constexpr, w_l: tl.constexpr,
    HEADS: tl.constexpr, N: tl.constexpr, PER_GROUP: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Of a tile's steps and a block of heads: the log2 of the decay from the tile's start (sum_ptr), and that less the
    log2 of the step size (shifted_ptr). For m, w = B, C also C . B of every step and group (own_ptr).
    """
    BLOCKS_H: tl.constexpr = (PER_GROUP + BLOCK_H - 1) // BLOCK_H
    i_t, i_block, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_g = i_block // BLOCKS_H
    first = i_t.to(tl.int64) * Q
    o_q, o_n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    o_h = (i_block % BLOCKS_H) * BLOCK_H + tl.arange(0, BLOCK_H)
    i_h, m_h = i_g * PER_GROUP + o_h, o_h < PER_GROUP
    real = o_q < tl.minimum(length - first, Q).to(tl.int32)
    raw = tl.load(
        dt_ptr + i_b * dt_b + first * dt_l + (o_q[:, None] * dt_l + i_h[None, :]), mask=real[:, None] & m_h[None, :],
        other=0.0,
    )  # fmt: skip
    A = tl.load(A_ptr + i_h, mask=m_h, other=0.0).to(sum_ptr.dtype.element_ty) * LOG2E
    bias = tl.zeros([BLOCK_H], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + i_h, mask=m_h, other=0.0).to(tl.float32)
    dt = tl.where(real[:, None], step_size(raw.to(tl.float32), bias[None, :], SOFTPLUS, low, high), 0.0)
    sums = tl.cumsum(dt * A[None, :], 0)
    shifted = sums - tl.log2(tl.maximum(dt, SMALLEST).to(sums.dtype))
    o_steps = (i_b * HEADS + i_h)[None, :] * padded + first + o_q[:, None]
    tl.store(shifted_ptr + o_steps, shifted, mask=m_h[None, :])
    tl.store(sum_ptr + o_steps, sums, mask=m_h[None, :])
    if own_ptr is not None:  # noqa: SIM102 (known when this is compiled, what follows is not)
        if i_block % BLOCKS_H == 0:
            deep = real[:, None] & (o_n < N)[None, :]
            p_m = m_ptr + i_b * m_b + i_g * m_g + first * m_l
            p_w = w_ptr + i_b * w_b + i_g * w_g + first * w_l
            m = tl.load(p_m + (o_q[:, None] * m_l + o_n[None, :]), mask=deep, other=0.0).to(tl.float32)
            w = tl.load(p_w + (o_q[:, None] * w_l + o_n[None, :]), mask=deep, other=0.0).to(tl.float32)
            tl.store(own_ptr + (i_b * (HEADS // PER_GROUP) + i_g) * padded + first + o_q, tl.sum(m * w, 1))


@triton.jit(do_not_specialize=["length", "tiles", "per_stretch", "padded"])
def _ends(
    v_ptr, m_ptr, run_ptr, shifted_ptr, sum_ptr, edge_ptr, keep_ptr,
    length, tiles, per_stretch, padded,
    v_b, v_h, m_b, m_g,
    v_l: tl.constexpr, m_l: tl.constexpr,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PER_GROUP: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state that leaves a stretch which a zero state enters, and the decay over the stretch.

    Forward v, m = x, B; in reverse v, m = dy, C, and the state is the adjoint's. The walk begins at the edge that the
    state leaves by and ends where nothing of a tile is left there: where the decay is 0 in float32.
    """
    BLOCKS_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    SIZE: tl.constexpr = BLOCK_N * BLOCK_P
    i_v, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_h = i_v // BLOCKS_P
    o_q, o_n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    o_p = (i_v % BLOCKS_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_v, o_m = o_q[:, None] * v_l + o_p[None, :], o_q[:, None] * m_l + o_n[None, :]
    v_ptr += i_b * v_b + i_h * v_h
    m_ptr += i_b * m_b + (i_h // PER_GROUP) * m_g
    padded = tl.multiple_of(padded, Q)
    shifted_ptr += (i_b * HEADS + i_h) * padded
    sum_ptr += (i_b * HEADS + i_h) * padded
    tile_0 = i_s * per_stretch
    steps = tl.minimum(per_stretch, tiles - tile_0)
    # tiles from the edge on, and the decay between them and the edge
    o_t = tl.arange(0, MOST_TILES)
    p_total = sum_ptr + (tile_0 + (o_t if REVERSE else steps - 1 - o_t)).to(tl.int64) * Q + (Q - 1)
    totals = tl.load(p_total, mask=o_t < steps, other=0.0)
    outer = tl.cumsum(totals, 0) - totals
    walked = tl.max(tl.where((o_t < steps) & (outer > NOTHING), o_t + 1, 0), 0)
    keep = exp2(tl.sum(totals, 0))
    if PACKED:
        run_ptr += i_b * length
        before = tl.load(run_ptr + tl.maximum(tile_0.to(tl.int64) * Q - 1, 0))
        after = tl.load(run_ptr + tl.minimum((tile_0 + steps).to(tl.int64) * Q, length) - 1)
        keep = tl.where(before == after, keep, 0.0)
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    passed = tl.sum(tl.zeros_like(totals), 0)
    for i in tl.range(0, walked, num_stages=STAGES):
        first = (tile_0 + (i if REVERSE else steps - 1 - i)).to(tl.int64) * Q
        real = o_q < tl.minimum(length - first, Q).to(tl.int32)
        total = tl.load(sum_ptr + first + Q - 1)
        if REVERSE:
            weight = exp2(passed + tl.load(sum_ptr + first + o_q))
        else:
            weight = exp2(passed + total - tl.load(shifted_ptr + first + o_q))
        if PACKED:
            run = tl.load(run_ptr + first + o_q, mask=real, other=-1)
            weight = tl.where(run == (before if REVERSE else after), weight, 0.0)
        v = tl.load(v_ptr + first * v_l + o_v, mask=real[:, None] & (o_p < P)[None, :], other=0.0)
        m = tl.load(m_ptr + first * m_l + o_m, mask=real[:, None] & (o_n < N)[None, :], other=0.0)
        state = _next(state, m, v, weight, PRECISION)
        passed += total
    i_edge = (i_b * tl.num_programs(1) + i_s) * (HEADS * BLOCKS_P) + i_v
    o_state = tl.arange(0, BLOCK_N)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    tl.store(edge_ptr + i_edge * SIZE + o_state, state)
    tl.store(keep_ptr + i_edge, keep)


@triton.jit
def _next(state, m, v, weight, PRECISION: tl.constexpr):
    """state (n, p) + m^T diag(weight) v."""
    v = (v.to(tl.float32) * weight[:, None]).to(v.dtype)
    if PRECISION == "tf32x3":  # a tensor core cuts off what it adds to, tile after tile
        return state + _dot(tl.trans(m), v, None, PRECISION)
    return _dot(tl.trans(m), v, state, PRECISION)


@triton.jit
def _matrix(w, m, between, visible, PRECISION: tl.constexpr):
    """M of a tile in the inputs' dtype: scores w m^T times the decay, where it may be seen."""
    scores = _dot(w, tl.trans(m), None, PRECISION)
    return (scores * exp2(tl.where(visible, between, float("-inf")))).to(w.dtype)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. Float32 factors are cut into two rounded tf32 parts: three products."""
    if PRECISION == "tf32x3":
        a_high, b_high = _tf32(a), _tf32(b)
        acc = tl.dot(a - a_high, b_high, acc, input_precision="tf32")
        acc = tl.dot(a_high, b - b_high, acc, input_precision="tf32")
        return tl.dot(a_high, b_high, acc, input_precision="tf32")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tf32(x):
    """x rounded to the 10 bits of a tf32's mantissa. (Triton's own tf32x3 truncates, which is twice as far off.)"""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _runs(run_ptr, first, length, real, o_q, Q):
    """Packed sequences: numbers of the sequences before a tile, at its end, and at its steps."""
    before = tl.load(run_ptr + tl.maximum(first - 1, 0))
    after = tl.load(run_ptr + tl.minimum(first + Q, length) - 1)
    return before, after, tl.load(run_ptr + first + o_q, mask=real, other=-1)


@triton.jit(do_not_specialize=["stretches"])
def _chain(
    edge_ptr, keep_ptr, outer_ptr, end_ptr, stretches,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """In edge_ptr, in the place of each stretch's own end state, the state that enters it; from outer_ptr (or zero) to
    end_ptr.
    """
    BLOCKS_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    SIZE: tl.constexpr = BLOCK_N * BLOCK_P
    rows: tl.constexpr = HEADS * BLOCKS_P
    i_v, i_b = tl.program_id(0) // (SIZE // BLOCK), tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) % (SIZE // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    o_n, o_p = o // BLOCK_P, (i_v % BLOCKS_P) * BLOCK_P + o % BLOCK_P
    o_outer = ((i_b * HEADS + i_v // BLOCKS_P) * P + o_p) * N + o_n  # (b, h, p, n)
    real = (o_n < N) & (o_p < P)
    state = tl.zeros([BLOCK], tl.float32)
    if outer_ptr is not None:
        state = tl.load(outer_ptr + o_outer, mask=real, other=0.0).to(tl.float32)
    for i in tl.range(0, stretches, num_stages=6):
        s = i_b * stretches + (stretches - 1 - i if REVERSE else i)
        local = tl.load(edge_ptr + (s * rows + i_v) * SIZE + o)
        keep = tl.load(keep_ptr + s * rows + i_v)
        tl.store(edge_ptr + (s * rows + i_v) * SIZE + o, state)
        state = keep * state + local
    tl.store(end_ptr + o_outer, state, mask=real)


@triton.jit(do_not_specialize=["length", "tiles", "per_stretch", "stretch_0", "stored", "padded"])
def _outputs(
    v_ptr, m_ptr, w_ptr, D_ptr, run_ptr, edge_ptr, shifted_ptr, sum_ptr, own_ptr, out_ptr,
    other_ptr, tile_ptr, product_ptr, inter_ptr, dD_ptr,
    length, tiles, per_stretch, stretch_0, stored, padded,
    v_b, v_h, m_b, m_g, w_b, w_g, other_b, other_h,
    v_l: tl.constexpr, m_l: tl.constexpr, w_l: tl.constexpr, other_l: tl.constexpr, out_l: tl.constexpr,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PER_GROUP: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    REVERSE: tl.constexpr, GRADIENTS: tl.constexpr, SKIP: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What leaves the map over a stretch of tiles, from the state that enters the stretch.

    Forward v, m, w = x, B, C gives y; in reverse v, m, w = dy, C, B gives dx. For the GRADIENTS of dt, B and C it also
    stores the state that enters each tile, and per step what that state adds to the output, times `other` (dy forward,
    x in reverse: inter_ptr). In reverse also the whole output (less D v) times `other` (product_ptr); forward, instead
    of y itself, the gradient of D.
    """
    BLOCKS_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    SIZE: tl.constexpr = BLOCK_N * BLOCK_P
    rows: tl.constexpr = HEADS * BLOCKS_P
    MATRIX: tl.constexpr = REVERSE or not GRADIENTS
    i_v, i_s, i_b = tl.program_id(0), stretch_0 + tl.program_id(1), tl.program_id(2).to(tl.int64)
    stretches = (tiles + per_stretch - 1) // per_stretch
    i_h = i_v // BLOCKS_P
    o_q, o_n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    o_p = (i_v % BLOCKS_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_state = o_n[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    i_edge = (i_b * stretches + i_s) * rows + i_v
    state = tl.load(edge_ptr + i_edge * SIZE + o_state)
    v_ptr += i_b * v_b + i_h * v_h
    m_ptr += i_b * m_b + (i_h // PER_GROUP) * m_g
    w_ptr += i_b * w_b + (i_h // PER_GROUP) * w_g
    out_ptr += i_b * length * out_l + i_h * P
    padded = tl.multiple_of(padded, Q)
    shifted_ptr += (i_b * HEADS + i_h) * padded
    sum_ptr += (i_b * HEADS + i_h) * padded
    if PACKED:
        run_ptr += i_b * length
    if SKIP == 1:
        D = tl.load(D_ptr + i_h).to(tl.float32)
    if SKIP == 2:
        D = tl.load(D_ptr + i_h * P + o_p, mask=o_p < P, other=0.0).to(tl.float32)[None, :]
    o_v, o_out = o_q[:, None] * v_l + o_p[None, :], o_q[:, None] * out_l + o_p[None, :]
    o_m, o_w = o_q[:, None] * m_l + o_n[None, :], o_q[:, None] * w_l + o_n[None, :]
    if GRADIENTS:
        other_ptr += i_b * other_b + i_h * other_h
        o_other = o_q[:, None] * other_l + o_p[None, :]
        dD = tl.zeros([Q, BLOCK_P if SKIP == 2 else 1], tl.float32)
    steps = tl.minimum(per_stretch, tiles - i_s * per_stretch)
    for i in tl.range(0, steps, num_stages=STAGES):
        tile = i_s * per_stretch + (steps - 1 - i if REVERSE else i)
        first = tile.to(tl.int64) * Q
        real = o_q < tl.minimum(length - first, Q).to(tl.int32)
        wide = real[:, None] & (o_p < P)[None, :]
        deep = real[:, None] & (o_n < N)[None, :]
        if AHEAD:  # the rows of the next tile, of which only one is on its way to shared memory
            after = tl.minimum(tl.maximum(first - Q if REVERSE else first + Q, 0) + o_q, length - 1)
            prefetch(v_ptr + after * v_l)
            if GRADIENTS:
                prefetch(other_ptr + after * other_l)
        shifted = tl.load(shifted_ptr + first + o_q)
        sums = tl.load(sum_ptr + first + o_q)
        total = tl.load(sum_ptr + first + Q - 1)
        v = tl.load(v_ptr + first * v_l + o_v, mask=wide, other=0.0)
        m = tl.load(m_ptr + first * m_l + o_m, mask=deep, other=0.0)
        w = tl.load(w_ptr + first * w_l + o_w, mask=deep, other=0.0)
        if not REVERSE and not GRADIENTS:
            own = tl.load(own_ptr + (i_b * (HEADS // PER_GROUP) + i_h // PER_GROUP) * padded + first + o_q)
        if GRADIENTS:
            other = tl.load(other_ptr + first * other_l + o_other, mask=wide, other=0.0)
            o_tile = (i_b * stored + tile - stretch_0 * per_stretch) * rows + i_v
            tl.store(tile_ptr + o_tile * SIZE + o_state, state.to(tile_ptr.dtype.element_ty))
        # log2 of the decay (with the step size) from step j to step i; from and to the tile's edges
        if REVERSE:
            between = sums[None, :] - shifted[:, None]
            outer, inner = exp2(total - shifted), exp2(sums)
            visible = (o_q[None, :] - o_q[:, None]) >= 0
        else:
            between = sums[:, None] - shifted[None, :]
            outer, inner = exp2(sums), exp2(total - shifted)
            visible = (o_q[:, None] - o_q[None, :]) > 0
        factor = exp2(total)
        if PACKED:
            before, after, run = _runs(run_ptr, first, length, real, o_q, Q)
            outer = tl.where(run == (after if REVERSE else before), outer, 0.0)
            inner = tl.where(run == (before if REVERSE else after), inner, 0.0)
            factor = tl.where(before == after, factor, 0.0)
            visible = visible & (run[:, None] == run[None, :])
        # The order decides how many registers spill: 69 and 0 for n = 128 and 64 in reverse, the other way 147 and 18.
        if MATRIX and BLOCK_N > 64:
            matrix = _matrix(w, m, between, visible, PRECISION)
        out = _dot(w, state.to(w.dtype), None, PRECISION) * outer[:, None]
        o_product = (i_b * rows + i_v) * padded + first + o_q
        if GRADIENTS:
            tl.store(inter_ptr + o_product, tl.sum(out * other.to(tl.float32), 1))
        if GRADIENTS and not REVERSE and SKIP != 0:
            products = v.to(tl.float32) * other.to(tl.float32)
            dD += products if SKIP == 2 else tl.sum(products, 1)[:, None]
        if MATRIX:
            if BLOCK_N <= 64:
                matrix = _matrix(w, m, between, visible, PRECISION)
            out = _dot(matrix, v, out, PRECISION)
            if GRADIENTS:
                tl.store(product_ptr + o_product, tl.sum(out * other.to(tl.float32), 1))
            factor_v = D if SKIP != 0 else 0.0
            if not REVERSE:
                # a step's own input apart, in float32: its factor is the largest, so that rounding it costs the most
                factor_v += (own * exp2(sums - shifted))[:, None]
            if SKIP != 0 or not REVERSE:
                out += v.to(tl.float32) * factor_v
            tl.store(out_ptr + first * out_l + o_out, out.to(out_ptr.dtype.element_ty), mask=wide)
        state = _next(state * factor, m, v, inner, PRECISION)
    if GRADIENTS and not REVERSE and SKIP == 1:
        tl.store(dD_ptr + i_edge, tl.sum(tl.sum(dD, 1), 0))
    if GRADIENTS and not REVERSE and SKIP == 2:
        tl.store(dD_ptr + i_edge * BLOCK_P + tl.arange(0, BLOCK_P), tl.sum(dD, 0))


@triton.jit
def _outgoing(x, state, adjoint, total, shifted, before, after, run, PACKED: tl.constexpr, PRECISION: tl.constexpr):
    """Of a head: what passes over the tile, state times adjoint; and dB of what the tile adds to the state."""
    outflow, factor = exp2(total - shifted), exp2(total)
    if PACKED:
        outflow = tl.where(run == after, outflow, 0.0)
        factor = tl.where(before == after, factor, 0.0)
    passing = tl.sum(tl.sum(state.to(tl.float32) * adjoint.to(tl.float32), 1), 0) * factor
    return passing, _dot(x, tl.trans(adjoint), None, PRECISION) * outflow[:, None]


@triton.jit(do_not_specialize=["length", "tiles", "tile_0", "stored", "padded"])
def _map_gradients(
    dy_ptr, x_ptr, B_ptr, C_ptr, run_ptr, state_ptr, adjoint_ptr, shifted_ptr, sum_ptr,
    dB_ptr, dC_ptr, passing_ptr, within_ptr,
    length, tiles, tile_0, stored, padded,
    dy_b, dy_h, x_b, x_h, B_b, B_g, C_b, C_g,
    dy_l: tl.constexpr, x_l: tl.constexpr, B_l: tl.constexpr, C_l: tl.constexpr, out_l: tl.constexpr,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PER_GROUP: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """dB and dC of one tile and one group of heads, from the states that enter the tile from both sides.

    Also, for the gradient of dt: per row of the states, their product with the decay over the tile (passing_ptr), and
    per step, what it takes from steps of the tile and what it gives to them (within_ptr), the step itself counted in
    both. In one of two PASSES over the heads, dB and dC take twice the registers, and states are read once.
    """
    BLOCKS_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    SIZE: tl.constexpr = BLOCK_N * BLOCK_P
    rows: tl.constexpr = HEADS * BLOCKS_P
    GROUPS: tl.constexpr = HEADS // PER_GROUP
    i_g, i_b = tl.program_id(0) % GROUPS, tl.program_id(1).to(tl.int64)
    i_t = tl.program_id(0) // GROUPS
    tile = tile_0 + i_t
    first = tile.to(tl.int64) * Q
    o_q, o_n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    o_state = o_n[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    real = o_q < tl.minimum(length - first, Q).to(tl.int32)
    deep = real[:, None] & (o_n < N)[None, :]
    x_ptr += i_b * x_b + first * x_l
    dy_ptr += i_b * dy_b + first * dy_l
    state_ptr += (i_b * stored + i_t) * rows * SIZE
    adjoint_ptr += (i_b * stored + i_t) * rows * SIZE
    padded = tl.multiple_of(padded, Q)
    visible = (o_q[:, None] - o_q[None, :]) >= 0
    before, after, run = 0, 0, o_q
    if PACKED:
        before, after, run = _runs(run_ptr + i_b * length, first, length, real, o_q, Q)
        visible = visible & (run[:, None] == run[None, :])
    B_ptr += i_b * B_b + i_g * B_g + first * B_l
    C_ptr += i_b * C_b + i_g * C_g + first * C_l
    B = tl.load(B_ptr + o_q[:, None] * B_l + o_n[None, :], mask=deep, other=0.0)
    C = tl.load(C_ptr + o_q[:, None] * C_l + o_n[None, :], mask=deep, other=0.0)
    scores = _dot(C, tl.trans(B), None, PRECISION)
    dscores = tl.zeros([Q, Q], tl.float32)
    dC = tl.zeros([Q, BLOCK_N], tl.float32)
    dB = tl.zeros([Q, BLOCK_N], tl.float32)
    for i in tl.range(0, PER_GROUP * BLOCKS_P, num_stages=STAGES):
        i_v = i_g * (PER_GROUP * BLOCKS_P) + i
        i_h = i_v // BLOCKS_P
        o_p = (i_v % BLOCKS_P) * BLOCK_P + tl.arange(0, BLOCK_P)
        wide = real[:, None] & (o_p < P)[None, :]
        o_steps = (i_b * HEADS + i_h) * padded + first
        shifted = tl.load(shifted_ptr + o_steps + o_q)
        sums = tl.load(sum_ptr + o_steps + o_q)
        x = tl.load(x_ptr + i_h * x_h + o_q[:, None] * x_l + o_p[None, :], mask=wide, other=0.0)
        dy = tl.load(dy_ptr + i_h * dy_h + o_q[:, None] * dy_l + o_p[None, :], mask=wide, other=0.0)
        state = tl.load(state_ptr + i_v * SIZE + o_state)
        inflow = exp2(sums)
        if PACKED:
            inflow = tl.where(run == before, inflow, 0.0)
        dmatrix = _dot(dy, tl.trans(x), None, PRECISION)
        between = sums[:, None] - shifted[None, :]
        dmatrix *= exp2(tl.where(visible, between, float("-inf")))
        dscores += dmatrix
        products = (dmatrix * scores).to(sums.dtype)
        o_within = (i_b * rows + i_v) * padded + first + o_q
        tl.store(within_ptr + o_within, tl.sum(products, 1))
        tl.store(within_ptr + tl.num_programs(1) * rows * padded + o_within, tl.sum(products, 0))
        dC += _dot(dy, tl.trans(state), None, PRECISION) * inflow[:, None]
        if PASSES == 1:
            adjoint = tl.load(adjoint_ptr + i_v * SIZE + o_state)
            total = tl.load(sum_ptr + o_steps + Q - 1)
            passing, part = _outgoing(x, state, adjoint, total, shifted, before, after, run, PACKED, PRECISION)
            tl.store(passing_ptr + (i_b * tiles + tile) * rows + i_v, passing)
            dB += part
    dscores = dscores.to(x_ptr.dtype.element_ty)
    dC = _dot(dscores, B, dC, PRECISION)
    o_B = (i_b * length + first) * out_l + i_g * N
    o_tile = o_q[:, None] * out_l + o_n[None, :]
    tl.store(dC_ptr + o_B + o_tile, dC.to(dC_ptr.dtype.element_ty), mask=deep)
    # the product is transposed, not its factor: Triton 3.4 to 3.7.0 may miscompile dot(trans(a product), ...)
    dB += tl.trans(_dot(tl.trans(C), dscores, None, PRECISION))
    if PASSES == 2:
        for i in tl.range(0, PER_GROUP * BLOCKS_P, num_stages=STAGES):
            i_v = i_g * (PER_GROUP * BLOCKS_P) + i
            i_h = i_v // BLOCKS_P
            o_p = (i_v % BLOCKS_P) * BLOCK_P + tl.arange(0, BLOCK_P)
            wide = real[:, None] & (o_p < P)[None, :]
            o_steps = (i_b * HEADS + i_h) * padded + first
            shifted = tl.load(shifted_ptr + o_steps + o_q)
            total = tl.load(sum_ptr + o_steps + Q - 1)
            x = tl.load(x_ptr + i_h * x_h + o_q[:, None] * x_l + o_p[None, :], mask=wide, other=0.0)
            state = tl.load(state_ptr + i_v * SIZE + o_state)
            adjoint = tl.load(adjoint_ptr + i_v * SIZE + o_state)
            passing, part = _outgoing(x, state, adjoint, total, shifted, before, after, run, PACKED, PRECISION)
            tl.store(passing_ptr + (i_b * tiles + tile) * rows + i_v, passing)
            dB += part
    tl.store(dB_ptr + o_B + o_tile, dB.to(dB_ptr.dtype.element_ty), mask=deep)


@triton.jit(do_not_specialize=["length", "tiles", "padded"])
def _step_gradients(
    dt_ptr, A_ptr, bias_ptr, taken_ptr, given_ptr, inter_ptr, within_ptr, passing_ptr, ddt_ptr, part_ptr,
    length, tiles, padded, low, high, dt_b, dt_l,
    HEADS: tl.constexpr, BLOCKS_P: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """ddt of some tiles and heads, and their parts of the gradients of A and of the bias."""
    rows: tl.constexpr = HEADS * BLOCKS_P
    i_t, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_q, o_h = tl.arange(0, Q), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < HEADS
    o_given = tl.num_programs(2).to(tl.int64) * rows * padded
    A = tl.load(A_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    bias = tl.zeros([1, BLOCK_H], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    dA = tl.zeros([BLOCK_H], tl.float32)
    dbias = tl.zeros([BLOCK_H], tl.float32)
    for tile in range(i_t * TILES, tl.minimum(i_t * TILES + TILES, tiles)):
        step = (tile * Q + o_q).to(tl.int64)[:, None]
        real = (step < length) & m_h[None, :]
        raw = tl.load(dt_ptr + i_b * dt_b + step * dt_l + o_h[None, :], mask=real, other=0.0).to(tl.float32)
        given = tl.zeros([Q, BLOCK_H], tl.float32)
        taken = tl.zeros([Q, BLOCK_H], within_ptr.dtype.element_ty)  # float64 for float32 inputs
        inter = tl.zeros([Q, BLOCK_H], within_ptr.dtype.element_ty)
        within = tl.zeros([Q, BLOCK_H], within_ptr.dtype.element_ty)
        passing = tl.zeros([BLOCK_H], tl.float32)
        for i in range(BLOCKS_P):
            i_v = o_h * BLOCKS_P + i
            o_product = (i_b * rows + i_v)[None, :] * padded + step
            taken += tl.load(taken_ptr + o_product, mask=real, other=0.0)
            given += tl.load(given_ptr + o_product, mask=real, other=0.0)
            inter += tl.load(inter_ptr + o_product, mask=real, other=0.0)
            within += tl.load(within_ptr + o_product, mask=real, other=0.0)
            within -= tl.load(within_ptr + o_given + o_product, mask=real, other=0.0)
            passing += tl.load(passing_ptr + (i_b * tiles + tile) * rows + i_v, mask=m_h, other=0.0)
        dt = step_size(raw, bias, SOFTPLUS, low, high)
        # Of dt A at step t: what reaches step t or later from before it. From before the tile to its steps from t on,
        # from its steps before t to after the tile, within it (pairs of steps on one side of t cancel), and across it.
        reaching = taken + within
        dlog = tl.sum(reaching, 0)[None, :] - tl.cumsum(reaching, 0) + reaching
        dlog = (dlog + tl.cumsum(inter, 0) - inter + passing[None, :]).to(tl.float32)
        ddt = step_size_gradient(given / tl.maximum(dt, SMALLEST) + dlog * A, raw, bias, SOFTPLUS, low, high)
        ddt = tl.where(real, ddt, 0.0)
        tl.store(ddt_ptr + (i_b * length + step) * HEADS + o_h[None, :], ddt.to(ddt_ptr.dtype.element_ty), mask=real)
        dA += tl.sum(tl.where(real, dt * dlog, 0.0), 0)
        dbias += tl.sum(ddt, 0)
    o_part = (i_b * tl.num_programs(0) + i_t) * HEADS + o_h
    parts = tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * HEADS
    tl.store(part_ptr + o_part, dA, mask=m_h)
    tl.store(part_ptr + parts + o_part, dbias, mask=m_h)


@triton.jit(do_not_specialize=["parts", "edges"])
def _add_parts(
    part_ptr, dD_part_ptr, dA_ptr, dbias_ptr, dD_ptr, parts, edges,
    HEADS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """The gradients of A, of the bias and of D of a head, from their parts."""
    BLOCKS_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    WIDTH: tl.constexpr = BLOCK_P if SKIP == 2 else 1
    i_h = tl.program_id(0)
    o, o_p = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    dA = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    o_bias = tl.cast(parts, tl.int64) * HEADS
    for first in range(0, parts, BLOCK):
        o_part = (first + o).to(tl.int64) * HEADS + i_h
        dA += tl.load(part_ptr + o_part, mask=first + o < parts, other=0.0)
        dbias += tl.load(part_ptr + o_bias + o_part, mask=first + o < parts, other=0.0)
    tl.store(dA_ptr + i_h, tl.sum(dA, 0).to(dA_ptr.dtype.element_ty))
    tl.store(dbias_ptr + i_h, tl.sum(dbias, 0))
    total = tl.zeros([WIDTH], tl.float32)
    for i in range(BLOCKS_P if SKIP != 0 else 0):
        dD = tl.zeros([BLOCK, WIDTH], tl.float32)
        for first in range(0, edges, BLOCK):
            o_part = ((first + o).to(tl.int64) * HEADS + i_h) * BLOCKS_P + i
            real = (first + o < edges)[:, None]
            dD += tl.load(dD_part_ptr + o_part[:, None] * WIDTH + o_p[None, :], mask=real, other=0.0)
        total += tl.sum(dD, 0)
        if SKIP == 2:
            tl.store(dD_ptr + i_h * P + i * BLOCK_P + o_p, total, mask=i * BLOCK_P + o_p < P)
            total = tl.zeros([WIDTH], tl.float32)
    if SKIP == 1:
        tl.store(dD_ptr + i_h + o_p, total)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, run: Tensor | None, softplus: bool, low: float, high: float,
    enter: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and the states that enter the stretches: (b, stretches, h', n, p), padded to blocks.

    With `enter` (across.py) the given initial state is zero, and enter(final state, decay) the one to start from.
    """
    x, dt, B, C = _ready(x, x.dtype), _ready(dt, dt.dtype), _ready(B, x.dtype), _ready(C, x.dtype)
    A, D, dt_bias, initial_state = (None if t is None else t.contiguous() for t in (A, D, dt_bias, initial_state))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    plan = _forward_plan(x, dt, A, B, C, D, dt_bias, initial_state, run, y, softplus, low, high)
    starts = torch.empty(plan.edges, dtype=torch.float32, device=x.device)
    final = starts.new_empty(plan.state)
    keep, own = plan.pieces(x)
    shifted, sums = plan.pieces_of_sums(x)
    plan.decays(dt, A, dt_bias, B, C, shifted, sums, own)
    plan.ends(x, B, run, shifted, sums, starts, keep)
    if enter is not None:
        plan.chain(starts.clone(), keep, initial_state, final)
        initial_state = enter(final, plan.whole_decay(keep)).contiguous()
    plan.chain(starts, keep, initial_state, final)
    plan.outputs(x, B, C, D, run, starts, shifted, sums, own, y, None, None, None, None, None)
    return y, final, starts


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, starts: Tensor, run: Tensor | None, softplus: bool, low: float, high: float,
    enter: Callable | None = None, dx: Tensor | None = None, dB: Tensor | None = None, dC: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state.

    Those of x, B and C go into dx, dB and dC if given, parts of one contiguous tensor's rows; else into fresh memory.
    With `enter` the given dfinal is zero, and enter(gradient of the initial state) the one to start from.
    """
    dx, ddt, dB, dC = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if place is None else place
        for t, place in ((x, dx), (dt, None), (B, dB), (C, dC))
    )
    dA, ddt_bias = torch.empty_like(A, memory_format=torch.contiguous_format), starts.new_empty(A.shape)
    dD = starts.new_empty((0,) if D is None else D.shape)
    x, dt, B, C, dy = _ready(x, x.dtype), _ready(dt, dt.dtype), *(_ready(t, x.dtype) for t in (B, C, dy))
    A, D, dt_bias, dfinal = (None if t is None else t.contiguous() for t in (A, D, dt_bias, dfinal))
    plan = _backward_plan(dy, dfinal, x, dt, A, B, C, D, dt_bias, run, dx, dB, dC, softplus, low, high)
    dinitial = starts.new_empty(plan.state)
    ends, keep, taken, given, inter, passing, dD_parts, parts = plan.pieces(x)
    shifted, sums, within = plan.pieces_of_sums(x)
    states, adjoints = plan.pieces_of_states(x)
    plan.decays(dt, A, dt_bias, None, None, shifted, sums, None)
    plan.ends(dy, C, run, shifted, sums, ends, keep)
    if enter is not None:
        plan.chain(ends.clone(), keep, dfinal, dinitial)
        dfinal = enter(dinitial).contiguous()
    plan.chain(ends, keep, dfinal, dinitial)
    for states_of, adjoints_of, map_gradients in plan.passes:
        states_of(x, B, C, D, run, starts, shifted, sums, None, x, dy, states, None, taken, dD_parts)
        adjoints_of(dy, C, B, D, run, ends, shifted, sums, None, dx, x, adjoints, given, inter, None)
        map_gradients(dy, x, B, C, run, states, adjoints, shifted, sums, dB, dC, passing, within)
    plan.step_gradients(dt, A, dt_bias, taken, given, inter, within, passing, ddt, parts)
    plan.add_parts(parts, dD_parts, dA, ddt_bias, dD)
    return dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial


def shape_of_starts(x: Tensor, B: Tensor) -> tuple[int, ...]:
    """Shape of the third result of `forward`."""
    return _Plan(x, B, None).edges


def _ready(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in that dtype (a product needs one), the last dimension contiguous."""
    t = t if t.dtype == dtype else t.to(dtype)
    return t if t.stride(-1) == 1 else t.contiguous()


def _outer(t: Tensor) -> tuple[int, int]:
    """Strides over the batch and over heads or groups. The steps' stride is a constant to the kernels."""
    return t.stride(0), t.stride(2)


_Q = 64
_PROGRAMS = 1024  # 2048 and 528 were slower or the same, at 4,096 to 1,048,576 steps


class _Plan:
    """Sizes, blocks and launches."""

    def __init__(self, x: Tensor, B: Tensor, run: Tensor | None) -> None:
        self.b, self.l, self.h, p = x.shape
        self.groups, n = B.shape[2:]
        self.exact = x.dtype == torch.float32
        # what matters are differences of sums: exact enough for bfloat16, but not for float32 inputs
        self.sums_dtype = torch.float64 if self.exact else torch.float32
        # blocks of 16 read beyond shared memory as the second factor of a product (Triton 3.6, Hopper)
        block_n = max(32, triton.next_power_of_2(n))
        block_p = min(64, max(32, triton.next_power_of_2(p))) if block_n <= 64 else 32 if self.exact else 64
        # the fastest of 6 to 12 each on an H200 (l = 262,144, h = 8, p = 64, bfloat16); large tiles fit only once
        if self.exact or block_n > 128:
            self.config = {"num_warps": 8, "num_stages": 1}
        else:
            self.config = {"num_warps": 4, "num_stages": 3 if block_n <= 64 else 2}
        self.rows = self.h * triton.cdiv(p, block_p)
        self.tiles = triton.cdiv(self.l, _Q)
        self.per_stretch = 1  # enough programs for a GPU, but few states to chain
        while self.per_stretch < MOST_TILES.value and self.tiles * self.b * self.rows > self.per_stretch * _PROGRAMS:
            self.per_stretch *= 2
        self.stretches = triton.cdiv(self.tiles, self.per_stretch)
        self.padded = self.tiles * _Q
        self.state = self.b, self.h, p, n
        self.edges = self.b, self.stretches, self.rows, block_n, block_p
        self.shape = {
            "HEADS": self.h, "P": p, "N": n, "PER_GROUP": self.h // self.groups, "Q": _Q, "BLOCK_P": block_p,
            "BLOCK_N": block_n, "PACKED": run is not None, "PRECISION": "tf32x3" if self.exact else "tf32",
        }  # fmt: skip

    def whole_decay(self, keep):
        """The decay over all stretches, (b, h)."""
        return keep[: self.b * self.stretches * self.rows].view(self.b, self.stretches, self.h, -1)[..., 0].prod(1)

    def make_decays(self, dt, B, C, softplus, low, high):
        """Of every step, its decays and its C . B."""
        per_group = self.h // self.groups
        block_h = min(32, triton.next_power_of_2(per_group))
        return Launch(
            _decays, (self.tiles, self.groups * triton.cdiv(per_group, block_h), self.b), self.l, self.padded,
            float(low), float(high), dt.stride(0), *_outer(B), *_outer(C), dt_l=dt.stride(1), m_l=B.stride(1),
            w_l=C.stride(1), HEADS=self.h, N=self.shape["N"], PER_GROUP=per_group, Q=_Q, BLOCK_N=self.edges[3],
            BLOCK_H=block_h, SOFTPLUS=softplus, num_warps=4,
        )  # fmt: skip

    def make_ends(self, v, m, reverse):
        """Every stretch's own end state and decay."""
        stages = 3 if self.config["num_stages"] > 1 else 1
        return Launch(
            _ends, (self.rows, self.stretches, self.b), self.l, self.tiles, self.per_stretch, self.padded, *_outer(v),
            *_outer(m), v_l=v.stride(1), m_l=m.stride(1), **self.shape, REVERSE=reverse, STAGES=stages,
            **(self.config | {"num_stages": stages}),
        )  # fmt: skip

    def make_chain(self, reverse):
        """States that enter the stretches, and the one (b, h, p, n) that leaves the last."""
        block_n, block_p = self.edges[3:]
        return Launch(
            _chain, (self.rows * (block_n * block_p // 128), self.b), self.stretches, HEADS=self.h, P=self.shape["P"],
            N=self.shape["N"], BLOCK_P=block_p, BLOCK_N=block_n, BLOCK=128, REVERSE=reverse, num_warps=4,
        )  # fmt: skip

    def make_outputs(self, v, m, w, D, out, first, last, *, reverse, other=None, stored=0):
        """What leaves the stretches `first` to `last`, in rows as far apart as those of `out`."""
        return Launch(
            _outputs, (self.rows, last - first, self.b), self.l, self.tiles, self.per_stretch, first, stored,
            self.padded, *_outer(v), *_outer(m), *_outer(w), *((0, 0) if other is None else _outer(other)),
            v_l=v.stride(1), m_l=m.stride(1), w_l=w.stride(1), other_l=0 if other is None else other.stride(1),
            out_l=out.stride(1), **self.shape, REVERSE=reverse, GRADIENTS=other is not None,
            SKIP=0 if D is None else D.dim(), STAGES=self.config["num_stages"] if reverse or other is None else None,
            AHEAD=v.is_cuda and self.config["num_stages"] < 3, **self.config,
        )  # fmt: skip

    def make_map_gradients(self, dy, x, B, C, dB, first, last, stored):
        """dB and dC of the stretches `first` to `last`, both in rows as far apart as those of dB."""
        # one pass for large states, where reading them costs the most: 0.60 ms instead of 0.70 at h = 32, n = 128, and
        # 0.58 instead of 0.46 at h = 8, n = 64
        passes, config = 2, self.config
        if config["num_stages"] == 2:
            passes, config = 1, {"num_warps": 8, "num_stages": 3}
        tile_0 = first * self.per_stretch
        tiles = min(last * self.per_stretch, self.tiles) - tile_0
        return Launch(
            _map_gradients, (tiles * self.groups, self.b), self.l, self.tiles, tile_0, stored, self.padded,
            *_outer(dy), *_outer(x), *_outer(B), *_outer(C), dy_l=dy.stride(1), x_l=x.stride(1), B_l=B.stride(1),
            C_l=C.stride(1), out_l=dB.stride(1), **self.shape, PASSES=passes, STAGES=config["num_stages"], **config,
        )  # fmt: skip


class _ForwardPlan(_Plan):
    def __init__(self, x, dt, A, B, C, D, bias, initial, run, y, softplus, low, high):
        super().__init__(x, B, run)
        self.pieces = Pieces(torch.float32, self.edges[:3], (self.b, self.groups, self.padded))
        self.pieces_of_sums = Pieces(self.sums_dtype, *[(self.b, self.h, self.padded)] * 2)
        self.decays = self.make_decays(dt, B, C, softplus, low, high)
        self.ends = self.make_ends(x, B, reverse=False)
        self.chain = self.make_chain(reverse=False)
        self.outputs = self.make_outputs(x, B, C, D, y, 0, self.stretches, reverse=False)


class _BackwardPlan(_Plan):
    def __init__(self, dy, dfinal, x, dt, A, B, C, D, bias, run, dx, dB, dC, softplus, low, high):
        super().__init__(x, B, run)
        b, h, rows, (block_n, block_p) = self.b, self.h, self.rows, self.edges[3:]
        low, high, skip = float(low), float(high), 0 if D is None else D.dim()
        blocks = triton.cdiv(self.tiles, 4)
        per_step, per_head = (b, rows, self.padded), (b, h, self.padded)
        self.pieces = Pieces(
            torch.float32, self.edges, self.edges[:3], per_step, per_step, per_step, (b, self.tiles, rows),
            (*self.edges[:3], block_p if skip == 2 else 1), (2, b, blocks, h),
        )  # fmt: skip
        self.pieces_of_sums = Pieces(self.sums_dtype, per_head, per_head, (2, *per_step))
        self.decays = self.make_decays(dt, B, C, softplus, low, high)
        self.ends = self.make_ends(dy, C, reverse=True)
        self.chain = self.make_chain(reverse=True)
        # the states of all tiles at once would take more memory than the gradients: stretches after stretches, with
        # no more states than x has elements. Half of that costs up to a third more time, all at once saves 1 to 3 %.
        of_stretch = b * rows * block_n * block_p * self.per_stretch
        parts = triton.cdiv(self.stretches, max(1, min(2**28, x.numel()) // of_stretch))
        part = triton.cdiv(self.stretches, parts)
        stored = min(self.tiles, part * self.per_stretch)
        self.pieces_of_states = Pieces(x.dtype, *[(b, stored, rows, block_n, block_p)] * 2)
        self.passes = []
        for first in range(0, self.stretches, part):
            cut = first, min(first + part, self.stretches)
            self.passes.append((
                self.make_outputs(x, B, C, D, dx, *cut, reverse=False, other=dy, stored=stored),
                self.make_outputs(dy, C, B, D, dx, *cut, reverse=True, other=x, stored=stored),
                self.make_map_gradients(dy, x, B, C, dB, *cut, stored),
            ))  # fmt: skip
        block_h = min(16, triton.next_power_of_2(h))
        self.step_gradients = Launch(
            _step_gradients, (blocks, triton.cdiv(h, block_h), b), self.l, self.tiles, self.padded, low, high,
            *dt.stride()[:2], HEADS=h, BLOCKS_P=rows // h, Q=_Q, BLOCK_H=block_h, TILES=4, SOFTPLUS=softplus,
            num_warps=4,
        )  # fmt: skip
        self.add_parts = Launch(
            _add_parts, (h,), b * blocks, b * self.stretches, HEADS=h, P=self.shape["P"], BLOCK_P=block_p, BLOCK=128,
            SKIP=skip, num_warps=4,
        )  # fmt: skip


_forward_plan, _backward_plan = planned(_ForwardPlan), planned(_BackwardPlan)
