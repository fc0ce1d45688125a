"""SSD on NVIDIA GPUs, in Triton: the chunked form of ssd.py and its adjoint, walked with the state in registers.

The sequence is cut into tiles of q steps, and runs of tiles ("stretches") go to programs of their own. Forward, three
launches: every stretch's end state from zero (`_ends`), the states chained over stretches (`_chain`), and the outputs
(`_outputs`), which walk each stretch again from its true start. The adjoint of the map x -> y is the same map with time
reversed and B and C exchanged, so dx comes from the same three kernels. On the way they leave, per step, the products
that the gradient of dt needs (`_step_gradients`), and per tile the states from both sides, from which `_map_gradients`
forms dB and dC, one program per tile and group, summing over the group's heads in registers. kernels/README.md has the
equations and the counts.

Letters as in ssd.py. A state is kept as (n, p). A head whose p exceeds a block is split into several "rows" with a
state of their own (h' = h * blocks of p).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.kernels.math_triton import LOG2E, step_size, step_size_gradient

# The least step size that enters a product: what is linear in it can be divided by it again.
SMALLEST = tl.constexpr(1e-18)


@triton.jit(do_not_specialize=["length", "tiles", "per_stretch", "padded"])
def _ends(
    v_ptr, m_ptr, dt_ptr, A_ptr, bias_ptr, run_ptr, edge_ptr, keep_ptr, shifted_ptr, sum_ptr,
    length, tiles, per_stretch, padded, low, high,
    v_b, v_h, m_b, m_g, dt_b,
    v_l: tl.constexpr, m_l: tl.constexpr, dt_l: tl.constexpr,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PER_GROUP: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state that leaves a stretch which a zero state enters, and the decay over the stretch.

    Forward v, m = x, B; in reverse v, m = dy, C, and the state is the adjoint's. Also, of every step, the log2 of the
    decay from the tile's start (sum_ptr), and that less the log2 of the step size (shifted_ptr).
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
    dt_ptr += i_b * dt_b + i_h
    o_steps = (i_b * HEADS + i_h) * tl.multiple_of(padded, Q)
    if PACKED:
        run_ptr += i_b * length
    A = tl.load(A_ptr + i_h).to(sum_ptr.dtype.element_ty) * LOG2E
    bias = tl.load(bias_ptr + i_h).to(tl.float32) if bias_ptr is not None else 0.0
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    keep = 1.0
    steps = tl.minimum(per_stretch, tiles - i_s * per_stretch)
    for i in range(steps):
        tile = i_s * per_stretch + (steps - 1 - i if REVERSE else i)
        first = tile.to(tl.int64) * Q
        real = o_q < tl.minimum(length - first, Q).to(tl.int32)
        dt = tl.load(dt_ptr + first * dt_l + o_q * dt_l, mask=real, other=0.0).to(tl.float32)
        dt = tl.where(real, step_size(dt, bias, SOFTPLUS, low, high), 0.0)
        sums = tl.cumsum(dt * A, 0)
        total = tl.sum(dt * A, 0)
        shifted = sums - tl.log2(tl.maximum(dt, SMALLEST).to(sums.dtype))
        if i_v % BLOCKS_P == 0:
            tl.store(shifted_ptr + o_steps + first + o_q, shifted)
            tl.store(sum_ptr + o_steps + first + o_q, sums)
        weight = tl.exp2((sums if REVERSE else total - shifted).to(tl.float32))
        factor = tl.exp2(total.to(tl.float32))
        if PACKED:
            before, after, run = _runs(run_ptr, first, length, real, o_q, Q)
            weight = tl.where(run == (before if REVERSE else after), weight, 0.0)
            factor = tl.where(before == after, factor, 0.0)
        v = tl.load(v_ptr + first * v_l + o_v, mask=real[:, None] & (o_p < P)[None, :], other=0.0)
        m = tl.load(m_ptr + first * m_l + o_m, mask=real[:, None] & (o_n < N)[None, :], other=0.0)
        state = _next(state * factor, m, v, weight, PRECISION)
        keep *= factor
    i_edge = (i_b * tl.num_programs(1) + i_s) * (HEADS * BLOCKS_P) + i_v
    o_state = tl.arange(0, BLOCK_N)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    tl.store(edge_ptr + i_edge * SIZE + o_state, state)
    tl.store(keep_ptr + i_edge, keep)


@triton.jit
def _next(state, m, v, weight, PRECISION: tl.constexpr):
    """state (n, p) + m^T diag(weight) v."""
    v = (v.to(tl.float32) * weight[:, None]).to(v.dtype)
    return tl.dot(tl.trans(m), v, state, input_precision=PRECISION)


@triton.jit
def _runs(run_ptr, first, length, real, o_q, Q):
    """Packed sequences: numbers of the sequences before a tile, at its end, and at its steps."""
    before = tl.load(run_ptr + tl.maximum(first - 1, 0))
    after = tl.load(run_ptr + tl.minimum(first + Q, length) - 1)
    return before, after, tl.load(run_ptr + first + o_q, mask=real, other=-1)


@triton.jit(do_not_specialize=["stretches"])
def _chain(
    local_ptr, keep_ptr, outer_ptr, edge_ptr, end_ptr, stretches,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state that enters each stretch (edge_ptr) from the stretches' own; from outer_ptr (or zero) to end_ptr."""
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
        local = tl.load(local_ptr + (s * rows + i_v) * SIZE + o)
        keep = tl.load(keep_ptr + s * rows + i_v)
        tl.store(edge_ptr + (s * rows + i_v) * SIZE + o, state)
        state = keep * state + local
    tl.store(end_ptr + o_outer, state, mask=real)


@triton.jit(do_not_specialize=["length", "tiles", "per_stretch", "stretch_0", "stored", "padded"])
def _outputs(
    v_ptr, m_ptr, w_ptr, D_ptr, run_ptr, edge_ptr, shifted_ptr, sum_ptr, out_ptr,
    other_ptr, tile_ptr, product_ptr, inter_ptr, dD_ptr,
    length, tiles, per_stretch, stretch_0, stored, padded,
    v_b, v_h, m_b, m_g, w_b, w_g, other_b, other_h,
    v_l: tl.constexpr, m_l: tl.constexpr, w_l: tl.constexpr, other_l: tl.constexpr,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PER_GROUP: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    REVERSE: tl.constexpr, GRADIENTS: tl.constexpr, SKIP: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
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
    out_ptr += i_b * length * (HEADS * P) + i_h * P
    padded = tl.multiple_of(padded, Q)
    shifted_ptr += (i_b * HEADS + i_h) * padded
    sum_ptr += (i_b * HEADS + i_h) * padded
    if PACKED:
        run_ptr += i_b * length
    if SKIP == 1:
        D = tl.load(D_ptr + i_h).to(tl.float32)
    if SKIP == 2:
        D = tl.load(D_ptr + i_h * P + o_p, mask=o_p < P, other=0.0).to(tl.float32)[None, :]
    o_v, o_out = o_q[:, None] * v_l + o_p[None, :], o_q[:, None] * (HEADS * P) + o_p[None, :]
    o_m, o_w = o_q[:, None] * m_l + o_n[None, :], o_q[:, None] * w_l + o_n[None, :]
    if GRADIENTS:
        other_ptr += i_b * other_b + i_h * other_h
        o_other = o_q[:, None] * other_l + o_p[None, :]
        dD = tl.zeros([Q, BLOCK_P if SKIP == 2 else 1], tl.float32)
    steps = tl.minimum(per_stretch, tiles - i_s * per_stretch)
    for i in range(steps):
        tile = i_s * per_stretch + (steps - 1 - i if REVERSE else i)
        first = tile.to(tl.int64) * Q
        real = o_q < tl.minimum(length - first, Q).to(tl.int32)
        wide = real[:, None] & (o_p < P)[None, :]
        deep = real[:, None] & (o_n < N)[None, :]
        shifted = tl.load(shifted_ptr + first + o_q)
        sums = tl.load(sum_ptr + first + o_q)
        total = tl.load(sum_ptr + first + Q - 1)
        v = tl.load(v_ptr + first * v_l + o_v, mask=wide, other=0.0)
        m = tl.load(m_ptr + first * m_l + o_m, mask=deep, other=0.0)
        w = tl.load(w_ptr + first * w_l + o_w, mask=deep, other=0.0)
        if GRADIENTS:
            other = tl.load(other_ptr + first * other_l + o_other, mask=wide, other=0.0)
            o_tile = (i_b * stored + tile - stretch_0 * per_stretch) * rows + i_v
            tl.store(tile_ptr + o_tile * SIZE + o_state, state.to(tile_ptr.dtype.element_ty))
        # log2 of the decay (with the step size) from step j to step i; from and to the tile's edges
        if REVERSE:
            between = (sums[None, :] - shifted[:, None]).to(tl.float32)
            outer, inner = tl.exp2((total - shifted).to(tl.float32)), tl.exp2(sums.to(tl.float32))
            visible = (o_q[None, :] - o_q[:, None]) >= 0
        else:
            between = (sums[:, None] - shifted[None, :]).to(tl.float32)
            outer, inner = tl.exp2(sums.to(tl.float32)), tl.exp2((total - shifted).to(tl.float32))
            visible = (o_q[:, None] - o_q[None, :]) > 0
        factor = tl.exp2(total.to(tl.float32))
        if PACKED:
            before, after, run = _runs(run_ptr, first, length, real, o_q, Q)
            outer = tl.where(run == (after if REVERSE else before), outer, 0.0)
            inner = tl.where(run == (before if REVERSE else after), inner, 0.0)
            factor = tl.where(before == after, factor, 0.0)
            visible = visible & (run[:, None] == run[None, :])
        out = tl.dot(w, state.to(w.dtype), input_precision=PRECISION) * outer[:, None]
        o_product = (i_b * rows + i_v) * padded + first + o_q
        if GRADIENTS:
            tl.store(inter_ptr + o_product, tl.sum(out * other.to(tl.float32), 1))
        if GRADIENTS and not REVERSE and SKIP != 0:
            products = v.to(tl.float32) * other.to(tl.float32)
            dD += products if SKIP == 2 else tl.sum(products, 1)[:, None]
        if REVERSE or not GRADIENTS:
            scores = tl.dot(w, tl.trans(m), input_precision=PRECISION)
            matrix = scores * tl.exp2(tl.where(visible, between, float("-inf")))
            out = tl.dot(matrix.to(v.dtype), v, out, input_precision=PRECISION)
            if GRADIENTS:
                tl.store(product_ptr + o_product, tl.sum(out * other.to(tl.float32), 1))
            own = D if SKIP != 0 else 0.0
            if not REVERSE:
                # a step's own input apart, in float32: its factor is the largest, so that rounding it costs the most
                factor_own = tl.sum(tl.where(o_q[:, None] == o_q[None, :], scores, 0.0), 1)
                own += (factor_own * tl.exp2((sums - shifted).to(tl.float32)))[:, None]
            if SKIP != 0 or not REVERSE:
                out += v.to(tl.float32) * own
            tl.store(out_ptr + first * (HEADS * P) + o_out, out.to(out_ptr.dtype.element_ty), mask=wide)
        state = _next(state * factor, m, v, inner, PRECISION)
    if GRADIENTS and not REVERSE and SKIP == 1:
        tl.store(dD_ptr + i_edge, tl.sum(tl.sum(dD, 1), 0))
    if GRADIENTS and not REVERSE and SKIP == 2:
        tl.store(dD_ptr + i_edge * BLOCK_P + tl.arange(0, BLOCK_P), tl.sum(dD, 0))


@triton.jit(do_not_specialize=["length", "tiles", "tile_0", "stored", "padded"])
def _map_gradients(
    dy_ptr, x_ptr, B_ptr, C_ptr, run_ptr, state_ptr, adjoint_ptr, shifted_ptr, sum_ptr,
    dB_ptr, dC_ptr, passing_ptr, within_ptr,
    length, tiles, tile_0, stored, padded,
    dy_b, dy_h, x_b, x_h, B_b, B_g, C_b, C_g,
    dy_l: tl.constexpr, x_l: tl.constexpr, B_l: tl.constexpr, C_l: tl.constexpr,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PER_GROUP: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB and dC of one tile and one group of heads, from the states that enter the tile from both sides.

    Also, for the gradient of dt: per row of the states, their product with the decay over the tile (passing_ptr), and
    per step, what it takes from steps of the tile and what it gives to them (within_ptr), the step itself counted in
    both.
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
    if PACKED:
        before, after, run = _runs(run_ptr + i_b * length, first, length, real, o_q, Q)
        visible = visible & (run[:, None] == run[None, :])
    B_ptr += i_b * B_b + i_g * B_g + first * B_l
    C_ptr += i_b * C_b + i_g * C_g + first * C_l
    B = tl.load(B_ptr + o_q[:, None] * B_l + o_n[None, :], mask=deep, other=0.0)
    C = tl.load(C_ptr + o_q[:, None] * C_l + o_n[None, :], mask=deep, other=0.0)
    scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
    dscores = tl.zeros([Q, Q], tl.float32)
    dC = tl.zeros([Q, BLOCK_N], tl.float32)
    # two passes over the heads: with dB and dC in one, the registers do not suffice for n = 128
    for i in range(PER_GROUP * BLOCKS_P):
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
        inflow = tl.exp2(sums.to(tl.float32))
        if PACKED:
            inflow = tl.where(run == before, inflow, 0.0)
        dmatrix = tl.dot(dy, tl.trans(x), input_precision=PRECISION)
        between = (sums[:, None] - shifted[None, :]).to(tl.float32)
        dmatrix *= tl.exp2(tl.where(visible, between, float("-inf")))
        dscores += dmatrix
        products = (dmatrix * scores).to(sums.dtype)
        o_within = (i_b * rows + i_v) * padded + first + o_q
        tl.store(within_ptr + o_within, tl.sum(products, 1))
        tl.store(within_ptr + tl.num_programs(1) * rows * padded + o_within, tl.sum(products, 0))
        dC += tl.dot(dy, tl.trans(state), input_precision=PRECISION) * inflow[:, None]
    dscores = dscores.to(x_ptr.dtype.element_ty)
    dC = tl.dot(dscores, B, dC, input_precision=PRECISION)
    o_B = (i_b * length + first) * (GROUPS * N) + i_g * N
    o_tile = o_q[:, None] * (GROUPS * N) + o_n[None, :]
    tl.store(dC_ptr + o_B + o_tile, dC.to(dC_ptr.dtype.element_ty), mask=deep)
    # the product is transposed, not its factor: Triton 3.4 to 3.7.0 may miscompile dot(trans(a product), ...)
    dB = tl.trans(tl.dot(tl.trans(C), dscores, input_precision=PRECISION))
    for i in range(PER_GROUP * BLOCKS_P):
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
        outflow, factor = tl.exp2((total - shifted).to(tl.float32)), tl.exp2(total.to(tl.float32))
        if PACKED:
            outflow = tl.where(run == after, outflow, 0.0)
            factor = tl.where(before == after, factor, 0.0)
        passing = tl.sum(tl.sum(state.to(tl.float32) * adjoint.to(tl.float32), 1), 0) * factor
        tl.store(passing_ptr + (i_b * tiles + tile) * rows + i_v, passing)
        dB += tl.dot(x, tl.trans(adjoint), input_precision=PRECISION) * outflow[:, None]
    tl.store(dB_ptr + o_B + o_tile, dB.to(dB_ptr.dtype.element_ty), mask=deep)


@triton.jit(do_not_specialize=["length", "tiles", "padded"])
def _step_gradients(
    dt_ptr, A_ptr, bias_ptr, taken_ptr, given_ptr, inter_ptr, within_ptr, passing_ptr, ddt_ptr, part_ptr,
    length, tiles, padded, low, high, dt_b, dt_l,
    HEADS: tl.constexpr, BLOCKS_P: tl.constexpr, Q: tl.constexpr, BLOCK_T: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """ddt of some tiles of a head, and their parts of the gradients of A and of the bias."""
    i_h, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows: tl.constexpr = HEADS * BLOCKS_P
    tile = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    step = tile.to(tl.int64)[:, None] * Q + tl.arange(0, Q)[None, :]
    real = step < length
    taken = tl.zeros([BLOCK_T, Q], tl.float32)
    given = tl.zeros([BLOCK_T, Q], tl.float32)
    inter = tl.zeros([BLOCK_T, Q], tl.float32)
    within = tl.zeros([BLOCK_T, Q], within_ptr.dtype.element_ty)
    o_given = tl.num_programs(2).to(tl.int64) * rows * padded
    passing = tl.zeros([BLOCK_T], tl.float32)
    for i in range(BLOCKS_P):
        i_v = i_h * BLOCKS_P + i
        o_product = (i_b * rows + i_v) * padded + step
        taken += tl.load(taken_ptr + o_product, mask=real, other=0.0)
        given += tl.load(given_ptr + o_product, mask=real, other=0.0)
        inter += tl.load(inter_ptr + o_product, mask=real, other=0.0)
        within += tl.load(within_ptr + o_product, mask=real, other=0.0)
        within -= tl.load(within_ptr + o_given + o_product, mask=real, other=0.0)
        passing += tl.load(passing_ptr + (i_b * tiles + tile) * rows + i_v, mask=tile < tiles, other=0.0)
    A = tl.load(A_ptr + i_h).to(tl.float32)
    bias = tl.load(bias_ptr + i_h).to(tl.float32) if bias_ptr is not None else 0.0
    raw = tl.load(dt_ptr + i_b * dt_b + i_h + step * dt_l, mask=real, other=0.0).to(tl.float32)
    dt = step_size(raw, bias, SOFTPLUS, low, high)
    # Of dt A at step t: what reaches step t or later from before it. From before the tile to its steps from t on, from
    # its steps before t to after the tile, within it (pairs of steps on one side of t cancel), and across it.
    within += tl.sum(within, 1)[:, None] - tl.cumsum(within, 1)
    dlog = tl.sum(taken, 1)[:, None] - tl.cumsum(taken, 1) + taken + within.to(tl.float32)
    dlog += tl.cumsum(inter, 1) - inter + passing[:, None]
    ddt = step_size_gradient(given / tl.maximum(dt, SMALLEST) + dlog * A, raw, bias, SOFTPLUS, low, high)
    ddt = tl.where(real, ddt, 0.0)
    tl.store(ddt_ptr + (i_b * length + step) * HEADS + i_h, ddt.to(ddt_ptr.dtype.element_ty), mask=real)
    o_part = (i_b * tl.num_programs(1) + i_t) * HEADS + i_h
    parts = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * HEADS
    tl.store(part_ptr + o_part, tl.sum(tl.sum(tl.where(real, dt * dlog, 0.0), 1), 0))
    tl.store(part_ptr + parts + o_part, tl.sum(tl.sum(ddt, 1), 0))


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, run: Tensor | None, softplus: bool, low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and the states that enter the stretches: (b, stretches, h', n, p), padded to blocks."""
    x, dt, B, C = _prepared(x.dtype, x, dt, B, C)
    A, D, dt_bias = (None if t is None else t.contiguous() for t in (A, D, dt_bias))
    plan = _Plan(x, B, run)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        local, keep, steps = plan.ends(x, B, dt, A, dt_bias, softplus, low, high, reverse=False)
        starts, final = plan.chain(local, keep, initial_state, reverse=False)
        plan.outputs(x, B, C, D, starts, steps, y, 0, plan.stretches, reverse=False)
    return y, final, starts


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, starts: Tensor, run: Tensor | None, softplus: bool, low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state."""
    dtypes = B.dtype, C.dtype
    dy, x, dt, B, C = _prepared(x.dtype, dy, x, dt, B, C)
    A, D, dt_bias = (None if t is None else t.contiguous() for t in (A, D, dt_bias))
    plan = _Plan(x, B, run)
    b, l, h, tiles, rows = plan.b, plan.l, plan.h, plan.tiles, plan.rows
    dx, ddt = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt))
    dB, dC = (torch.empty(B.shape, dtype=dtype, device=B.device) for dtype in dtypes)
    new = lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device=x.device)  # noqa: E731
    taken, given, inter = (new(b, rows, plan.padded) for _ in range(3))
    within = new(2, b, rows, plan.padded, dtype=plan.sums_dtype)
    passing = new(b, tiles, rows)
    skip = 0 if D is None else D.dim()
    dD = new(b, plan.stretches, rows, plan.shape["BLOCK_P"] if skip == 2 else 1)
    with torch.cuda.device_of(x):
        local, keep, steps = plan.ends(dy, C, dt, A, dt_bias, softplus, low, high, reverse=True)
        ends, dinitial = plan.chain(local, keep, dfinal, reverse=True)
        # the states of all tiles at once would take more memory than the gradients: some stretches after the other
        states = new(b, min(tiles, plan.part * plan.per_stretch), *starts.shape[2:], dtype=x.dtype)
        adjoints = torch.empty_like(states)
        for first in range(0, plan.stretches, plan.part):
            last = min(first + plan.part, plan.stretches)
            plan.outputs(
                x, B, C, D, starts, steps, None, first, last, reverse=False, other=dy, stored=states, inter=taken,
                dD=dD,
            )  # fmt: skip
            plan.outputs(
                dy, C, B, D, ends, steps, dx, first, last, reverse=True, other=x, stored=adjoints, products=given,
                inter=inter,
            )  # fmt: skip
            plan.map_gradients(dy, x, B, C, states, adjoints, steps, dB, dC, passing, within, first, last)
        blocks = triton.cdiv(tiles, 16)
        parts = new(2, b * blocks, h)
        _step_gradients[(h, blocks, b)](
            dt, A, dt_bias, taken, given, inter, within, passing, ddt, parts, l, tiles, plan.padded, low, high,
            *dt.stride()[:2], HEADS=h, BLOCKS_P=rows // h, Q=_Q, BLOCK_T=16, SOFTPLUS=softplus, num_warps=4,
        )  # fmt: skip
    dA, ddt_bias = (part.sum(0) for part in parts)
    dD = dD.sum((0, 1)).view(h, -1)
    dD = new(0) if skip == 0 else dD.sum(1) if skip == 1 else dD[:, : x.shape[3]].contiguous()
    return dx, ddt, dA.to(A.dtype), dB, dC, dD, ddt_bias, dinitial


def shape_of_starts(x: Tensor, B: Tensor) -> tuple[int, ...]:
    """Shape of the third result of `forward`."""
    plan = _Plan(x, B, None)
    return plan.b, plan.stretches, plan.rows, plan.shape["BLOCK_N"], plan.shape["BLOCK_P"]


def _prepared(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """All but the step sizes in one dtype (a product needs that), the last dimension contiguous."""
    tensors = [t if t.dim() == 3 else t.to(dtype) for t in tensors]
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _outer(t: Tensor) -> tuple[int, int]:
    """Strides over the batch and over heads or groups. The steps' stride is a constant to the kernels."""
    return t.stride(0), t.stride(2)


_Q = 64
_PROGRAMS = 2048


class _Plan:
    """Blocks and strides that all launches of a call share."""

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
        while self.per_stretch < 64 and self.tiles * self.b * self.rows > self.per_stretch * _PROGRAMS:
            self.per_stretch *= 2
        self.stretches = triton.cdiv(self.tiles, self.per_stretch)
        self.padded = self.tiles * _Q
        per_tile = self.b * self.rows * block_n * block_p
        self.part = max(1, min(self.stretches, 2**29 // (per_tile * self.per_stretch)))
        self.run = run
        self.shape = {
            "HEADS": self.h, "P": p, "N": n, "PER_GROUP": self.h // self.groups, "Q": _Q, "BLOCK_P": block_p,
            "BLOCK_N": block_n, "PACKED": run is not None, "PRECISION": "tf32x3" if self.exact else "tf32",
        }  # fmt: skip

    def ends(self, v, m, dt, A, bias, softplus, low, high, reverse):
        """Every stretch's own end state and decay, and the steps' (shifted and summed) log2 decays."""
        size = self.b, self.stretches, self.rows, self.shape["BLOCK_N"], self.shape["BLOCK_P"]
        edges = torch.empty(size, dtype=torch.float32, device=v.device)
        keep = torch.empty(size[:3], dtype=torch.float32, device=v.device)
        steps = torch.empty(2, self.b, self.h, self.padded, dtype=self.sums_dtype, device=v.device)
        _ends[(self.rows, self.stretches, self.b)](
            v, m, dt, A, bias, self.run, edges, keep, steps[0], steps[1], self.l, self.tiles, self.per_stretch,
            self.padded, low, high, *_outer(v), *_outer(m), dt.stride(0), v.stride(1), m.stride(1), dt.stride(1),
            **self.shape, REVERSE=reverse, SOFTPLUS=softplus, **self.config,
        )  # fmt: skip
        return edges, keep, steps

    def chain(self, local, keep, outer, reverse):
        """States that enter the stretches, and the one (b, h, p, n) that leaves the last."""
        edges = torch.empty_like(local)
        p, n, block_p, block_n = (self.shape[k] for k in ("P", "N", "BLOCK_P", "BLOCK_N"))
        end = torch.empty(self.b, self.h, p, n, dtype=torch.float32, device=local.device)
        outer = None if outer is None else outer.contiguous()
        _chain[(self.rows * (block_n * block_p // 128), self.b)](
            local, keep, outer, edges, end, self.stretches, HEADS=self.h, P=p, N=n, BLOCK_P=block_p, BLOCK_N=block_n,
            BLOCK=128, REVERSE=reverse, num_warps=4,
        )  # fmt: skip
        return edges, end

    def outputs(
        self, v, m, w, D, edges, steps, out, first, last, *, reverse, other=None, stored=None, products=None,
        inter=None, dD=None,
    ):  # fmt: skip
        """What leaves the stretches `first` to `last`."""
        skip = 0 if D is None else D.dim()
        _outputs[(self.rows, last - first, self.b)](
            v, m, w, D, self.run, edges, steps[0], steps[1], v if out is None else out, other, stored, products, inter,
            dD, self.l, self.tiles, self.per_stretch, first, 0 if stored is None else stored.shape[1],
            self.padded, *_outer(v), *_outer(m), *_outer(w), *((0, 0) if other is None else _outer(other)),
            v.stride(1), m.stride(1), w.stride(1), 0 if other is None else other.stride(1), **self.shape,
            REVERSE=reverse, GRADIENTS=other is not None, SKIP=skip, **self.config,
        )  # fmt: skip

    def map_gradients(self, dy, x, B, C, states, adjoints, steps, dB, dC, passing, within, first, last):
        """dB and dC of the stretches `first` to `last`."""
        tile_0 = first * self.per_stretch
        tiles = min(last * self.per_stretch, self.tiles) - tile_0
        _map_gradients[(tiles * self.groups, self.b)](
            dy, x, B, C, self.run, states, adjoints, steps[0], steps[1], dB, dC, passing, within, self.l, self.tiles,
            tile_0, states.shape[1], self.padded, *_outer(dy), *_outer(x), *_outer(B), *_outer(C), dy.stride(1),
            x.stride(1), B.stride(1), C.stride(1), **self.shape, **self.config,
        )  # fmt: skip
