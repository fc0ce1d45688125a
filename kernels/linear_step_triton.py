"""Projections of one decoding step in Triton: what stands before and after them runs in the same launch.

    y = W norm(x + residual) + bias,   then for some rows of W the causal convolution's step and SiLU

At batch 1 a launch costs as much as its reading of W, so a layer takes as few launches as its dependences allow: the
norm is computed anew by every program (x is short), and a gated norm's sum of squares comes from the launch before.

On Hopper, launches overlap (programmatic dependent launch): a program reads its part of W, then waits for the launch
before it. What is read before the wait must not be written by a launch that may still run. A launch with EARLY lets the
next one start at once, without EARLY only after its own wait, when everything before it has ended. Therefore: only
weights and the state-space state are read before a wait; in_proj's launch is not EARLY, so that the step before has
ended when a state is read; and the first launch of all does not overlap with what foreign launch precedes it. Elsewhere
lines are only asked for before the wait (prefetch), which is right whatever still runs.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seqmodels.kernels.math_triton import prefetch, sigmoid


class Conv:
    """The convolution's step for rows first to first + channels of a projection; its state is updated in place."""

    def __init__(self, weight: Tensor, bias: Tensor | None, state: Tensor, first: int) -> None:
        self.weight, self.bias, self.state, self.first = weight, bias, state, first


def check_states(*states: Tensor) -> None:
    """They are overwritten as they lie."""
    for state in states:
        if not state.is_contiguous():
            raise ValueError(f"a state of shape {tuple(state.shape)} has strides {state.stride()}; make it contiguous")


def overlaps(x: Tensor) -> bool:
    """Whether launches for x can overlap."""
    return x.is_cuda and _is_hopper(x.device)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def warps_for(tile: int, most: int) -> int:
    """Warps for a tile of a state that is updated in place, `most` if it has a value for each of their threads.

    Else several threads would hold the same value, and a warp that lags behind could read what another has already
    written.
    """
    return max(1, min(most, tile // 32))


def on_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    """Whether a batch's projection is a matrix product: from 5 rows in bfloat16."""
    return x.dtype == weight.dtype == torch.bfloat16 and x.shape[0] > 4


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, total: Tensor, overlap: bool
) -> Tensor:
    """norm(x + residual) in x's dtype, one program per row; the sum goes to `total`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    b, d = x.shape
    _add_norm[(b,)](
        x, residual, weight, y, total, x.stride(0), 0 if residual is None else residual.stride(0), epsilon,
        D=d, BLOCK_D=triton.next_power_of_2(d), HAS_RESIDUAL=residual is not None, OVERLAP=overlap, num_warps=4,
        **launch_options(overlap),
    )  # fmt: skip
    return y


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    squares: Tensor | None = None,
    groups: int = 1,
    epsilon: float = 0.0,
    conv: Conv | None = None,
    overlap: bool = False,
    early: bool = False,
) -> Tensor:
    """x (b, i) -> y (b, o) in `dtype`, weight (o, i).

    norm (i,): RMSNorm of x + residual first; the sum is written to `total`. squares (b, parts): x is divided by the
    root mean square that these partial sums of squares, an equal number of neighbours per group, stand for.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (b, i), o = x.shape, weight.shape[0]
    y = torch.empty(b, o, dtype=dtype, device=x.device)
    if not weight.is_contiguous():
        weight, overlap = weight.contiguous(), False  # what a copy writes must not be read before the wait
    parts = 1 if squares is None else squares.shape[1] // groups
    conv_tensors = (None, None, None) if conv is None else (conv.weight, conv.bias, conv.state)
    channels, taps = (0, 0) if conv is None else conv.weight.shape
    first = 0 if conv is None else conv.first
    if on_tensor_cores(x, weight):
        if norm is not None and total is not None:
            x, overlap = add_norm(x, residual, norm, epsilon, total, overlap), overlaps(x)
        BLOCK_B, BLOCK_O, BLOCK_I, warps, stages = _dot_sizes(b, i)
        _linear_dot[(triton.cdiv(o, BLOCK_O), triton.cdiv(b, BLOCK_B))](
            x, squares, weight, bias, *conv_tensors, y, b, x.stride(0), epsilon,
            O=o, FIRST=first, CHANNELS=channels, I=i, TAPS=taps,
            SCALED=squares is not None, GROUPS=groups, PARTS=parts, BLOCK_PARTS=triton.next_power_of_2(parts),
            HAS_BIAS=bias is not None, HAS_CONV_BIAS=conv is not None and conv.bias is not None,
            BLOCK_B=BLOCK_B, BLOCK_O=BLOCK_O, BLOCK_I=BLOCK_I, LINES=triton.next_power_of_2(triton.cdiv(i, 64)),
            OVERLAP=overlap, EARLY=early and norm is None,
            num_warps=warps, num_stages=stages, **launch_options(overlap),
        )  # fmt: skip
        return y
    BLOCK_I, BATCH = triton.next_power_of_2(i), min(b, 4)
    ROWS, warps = _few_sizes(BLOCK_I, weight.element_size())
    _linear_few[(triton.cdiv(o, ROWS), triton.cdiv(b, BATCH))](
        x, residual, norm, squares, weight, bias, *conv_tensors, y, total, b, x.stride(0),
        0 if residual is None else residual.stride(0), epsilon,
        O=o, FIRST=first, CHANNELS=channels, I=i, TAPS=taps, NORM=norm is not None, HAS_RESIDUAL=residual is not None,
        SCALED=squares is not None, GROUPS=groups, PARTS=parts, BLOCK_PARTS=triton.next_power_of_2(parts),
        HAS_BIAS=bias is not None, HAS_CONV_BIAS=conv is not None and conv.bias is not None,
        BATCH=BATCH, ROWS=ROWS, BLOCK_I=BLOCK_I, OVERLAP=overlap, EARLY=early,
        num_warps=warps, **launch_options(overlap),
    )  # fmt: skip
    return y


# Sizes were measured on an H200 with mamba2-130m's shapes, whole steps of 24 layers in a graph.


def _few_sizes(BLOCK_I: int, bytes_each: int) -> tuple[int, int]:
    """Rows of the weight per program and warps: 64 values of a bfloat16 weight per thread. (Half or twice as many rows
    per program of in_proj: 203 or 160 us instead of 157 at batch 1.)"""
    warps = max(1, min(8, BLOCK_I * bytes_each // 4096))
    return max(1, 8192 * warps // (BLOCK_I * bytes_each)), warps


def _dot_sizes(b: int, i: int) -> tuple[int, int, int, int, int]:
    """Rows of the batch, of the weight and columns per tile, warps, stages. (At batch 64, tiles of 64 x 16 take 0.95 to
    0.97 ms, of 64 x 32 up to 1.02; at batch 8, 0.39 ms instead of 0.47 with 32 rows of the weight and 4 warps.)"""
    if b <= 16:
        return 16, 16, 256, 2, 4
    if b <= 32:
        return 32, 16, 256 if i > 1024 else 128, 4, 4
    if b <= 128:
        return 64, 16, 128, 4, 8 if i > 1024 else 4
    return (64, 32, 128, 4, 4) if i > 1024 else (64, 64, 128, 4, 3)


def launch_options(overlap: bool) -> dict[str, bool]:
    """The interpreter does not know the option."""
    return {"launch_pdl": True} if overlap else {}


@triton.jit
def _add_norm(
    x_ptr, residual_ptr, norm_ptr, y_ptr, total_ptr, x_stride, residual_stride, epsilon,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    weight = tl.load(norm_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + i_b * x_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + i_b * residual_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(total_ptr + i_b * D + o_d, x.to(total_ptr.dtype.element_ty), mask=m_d)
    y = x * weight / tl.sqrt(tl.sum(x * x, 0) / D + epsilon)
    tl.store(y_ptr + i_b * D + o_d, y.to(y_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def _linear_few(
    x_ptr, residual_ptr, norm_ptr, squares_ptr, weight_ptr, bias_ptr, conv_weight_ptr, conv_bias_ptr, conv_state_ptr,
    y_ptr, total_ptr, b, x_stride, residual_stride, epsilon,
    O: tl.constexpr, FIRST: tl.constexpr, CHANNELS: tl.constexpr, I: tl.constexpr, TAPS: tl.constexpr,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    GROUPS: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, BLOCK_I: tl.constexpr,
    OVERLAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    # A program's rows of the weight stay in registers for all its rows of the batch.
    i_o = tl.program_id(0)
    if OVERLAP and EARLY:
        gdc_launch_dependents()
    o_i = tl.arange(0, BLOCK_I)
    m_i = o_i < I
    o_o = i_o * ROWS + tl.arange(0, ROWS)
    p_w = weight_ptr + o_o.to(tl.int64)[:, None] * I + o_i[None, :]
    w = tl.load(p_w, mask=(o_o < O)[:, None] & m_i[None, :], other=0.0)
    if NORM:
        norm = tl.load(norm_ptr + o_i, mask=m_i, other=0.0).to(tl.float32)
    if TAPS > 0:
        channel = o_o - FIRST
        m_channel = (o_o < O) & (channel >= 0) & (channel < CHANNELS)
        taps = ()
        for tap in tl.static_range(0, TAPS):
            value = tl.load(conv_weight_ptr + channel * TAPS + tap, mask=m_channel, other=0.0).to(tl.float32)
            taps = taps + (value,)  # noqa: RUF005
        if HAS_CONV_BIAS:
            conv_bias = tl.load(conv_bias_ptr + channel, mask=m_channel, other=0.0).to(tl.float32)
    if OVERLAP:
        if TAPS > 1:
            o_tap = tl.arange(0, 4)[None, :]
            p_tap = conv_state_ptr + tl.program_id(1).to(tl.int64) * BATCH * (TAPS - 1) * CHANNELS
            p_tap += o_tap * CHANNELS + channel[:, None]
            prefetch(tl.where(m_channel[:, None] & (o_tap < TAPS - 1), p_tap, conv_state_ptr))
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    # All rows' inputs are asked for before the first is used.
    xs, residuals, pasts = (), (), ()
    for j in tl.static_range(0, BATCH):
        i_b = tl.program_id(1).to(tl.int64) * BATCH + j
        m_x = m_i & (i_b < b)
        xs = xs + (tl.load(x_ptr + i_b * x_stride + o_i, mask=m_x, other=0.0),)  # noqa: RUF005
        if HAS_RESIDUAL:
            value = tl.load(residual_ptr + i_b * residual_stride + o_i, mask=m_x, other=0.0)
            residuals = residuals + (value,)  # noqa: RUF005
        if TAPS > 0:  # the convolution's inputs before this step, oldest first
            for tap in tl.static_range(0, TAPS - 1):
                p_past = conv_state_ptr + (i_b * (TAPS - 1) + tap) * CHANNELS + channel
                pasts = pasts + (tl.load(p_past, mask=m_channel & (i_b < b), other=0.0),)  # noqa: RUF005
    for j in tl.static_range(0, BATCH):
        i_b = tl.program_id(1).to(tl.int64) * BATCH + j
        m_o = (o_o < O) & (i_b < b)
        x = xs[j].to(tl.float32)
        scale = 1.0
        if NORM:
            if HAS_RESIDUAL:
                x += residuals[j].to(tl.float32)
            if i_o == 0:
                tl.store(total_ptr + i_b * I + o_i, x.to(total_ptr.dtype.element_ty), mask=m_i & (i_b < b))
            scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / I + epsilon)
            x *= norm
        if SCALED:
            o_s = tl.arange(0, BLOCK_PARTS)
            p_s = squares_ptr + i_b * (GROUPS * PARTS) + o_s
            m_s = (o_s < PARTS) & (i_b < b)
            if GROUPS == 1:
                scale = 1.0 / tl.sqrt(tl.sum(tl.load(p_s, mask=m_s, other=0.0), 0) / I + epsilon)
            else:
                for group in range(GROUPS):
                    total = tl.sum(tl.load(p_s + group * PARTS, mask=m_s, other=0.0), 0)
                    inverse = 1.0 / tl.sqrt(total / (I // GROUPS) + epsilon)
                    x = tl.where(o_i // (I // GROUPS) == group, x * inverse, x)
        y = tl.sum(w.to(tl.float32) * x[None, :], 1) * scale
        if HAS_BIAS:
            y += tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(tl.float32)
        if TAPS > 0:
            s = y * taps[TAPS - 1]
            if HAS_CONV_BIAS:
                s += conv_bias
            for tap in tl.static_range(0, TAPS - 1):
                s += pasts[j * (TAPS - 1) + tap].to(tl.float32) * taps[tap]
                new = pasts[j * (TAPS - 1) + tap + 1].to(tl.float32) if tap + 2 < TAPS else y
                p_past = conv_state_ptr + (i_b * (TAPS - 1) + tap) * CHANNELS + channel
                tl.store(p_past, new.to(conv_state_ptr.dtype.element_ty), mask=m_channel & (i_b < b))
            y = tl.where(m_channel, s * sigmoid(s), y)
        tl.store(y_ptr + i_b * O + o_o, y.to(y_ptr.dtype.element_ty), mask=m_o)


@triton.jit
def _linear_dot(
    x_ptr, squares_ptr, weight_ptr, bias_ptr, conv_weight_ptr, conv_bias_ptr, conv_state_ptr, y_ptr, b, x_stride,
    epsilon,
    O: tl.constexpr, FIRST: tl.constexpr, CHANNELS: tl.constexpr, I: tl.constexpr, TAPS: tl.constexpr,
    SCALED: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_o, m_b = o_o < O, o_b < b
    if OVERLAP:
        if EARLY:
            gdc_launch_dependents()
        o_line = tl.arange(0, LINES)[None, :] * 64
        p_weight = weight_ptr + o_o.to(tl.int64)[:, None] * I + o_line
        prefetch(tl.where(m_o[:, None] & (o_line < I), p_weight, weight_ptr))
        if TAPS > 1:
            o_tap = tl.arange(0, 4)[None, :]
            p_line = conv_state_ptr + (o_b.to(tl.int64)[:, None] * (TAPS - 1) + o_tap) * CHANNELS
            column = tl.program_id(0) * BLOCK_O - FIRST
            inside = (column > -BLOCK_O) & (column < CHANNELS)
            mask = m_b[:, None] & (o_tap < TAPS - 1) & inside
            prefetch(tl.where(mask, p_line + tl.maximum(tl.minimum(column, CHANNELS - 1), 0), conv_state_ptr))
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    if TAPS > 0:  # asked for before the product, which takes as long as they do
        channel = o_o - FIRST
        m_channel = m_o & (channel >= 0) & (channel < CHANNELS)
        m_conv = m_b[:, None] & m_channel[None, :]
        p_state = conv_state_ptr + o_b.to(tl.int64)[:, None] * ((TAPS - 1) * CHANNELS) + channel[None, :]
        past, taps = (), ()
        for tap in tl.static_range(0, TAPS):
            if tap + 1 < TAPS:
                past = past + (tl.load(p_state + tap * CHANNELS, mask=m_conv, other=0.0),)  # noqa: RUF005
            value = tl.load(conv_weight_ptr + channel * TAPS + tap, mask=m_channel, other=0.0)
            taps = taps + (value.to(tl.float32),)  # noqa: RUF005
    WIDTH: tl.constexpr = I // GROUPS
    p_x = x_ptr + o_b.to(tl.int64)[:, None] * x_stride
    p_w = weight_ptr + o_o.to(tl.int64)[:, None] * I
    y = tl.zeros([BLOCK_B, BLOCK_O], tl.float32)
    for group in range(GROUPS):
        part = tl.zeros([BLOCK_B, BLOCK_O], tl.float32)
        for start in range(0, WIDTH, BLOCK_I):
            o_i = start + tl.arange(0, BLOCK_I)
            m_i = o_i < WIDTH
            o_i += group * WIDTH
            x = tl.load(p_x + o_i[None, :], mask=m_b[:, None] & m_i[None, :], other=0.0)
            w = tl.load(p_w + o_i[None, :], mask=m_o[:, None] & m_i[None, :], other=0.0)
            part = tl.dot(x, tl.trans(w), part)
        if SCALED:
            o_s = tl.arange(0, BLOCK_PARTS)
            p_s = squares_ptr + o_b.to(tl.int64)[:, None] * (GROUPS * PARTS) + group * PARTS + o_s[None, :]
            total = tl.sum(tl.load(p_s, mask=m_b[:, None] & (o_s < PARTS)[None, :], other=0.0), 1)
            part *= (1.0 / tl.sqrt(total / WIDTH + epsilon))[:, None]
        y += part
    mask = m_b[:, None] & m_o[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    if TAPS > 0:
        s = y * taps[TAPS - 1][None, :]
        if HAS_CONV_BIAS:
            s += tl.load(conv_bias_ptr + channel, mask=m_channel, other=0.0).to(tl.float32)[None, :]
        for tap in tl.static_range(0, TAPS - 1):
            s += past[tap].to(tl.float32) * taps[tap][None, :]
            new = past[tap + 1].to(tl.float32) if tap + 2 < TAPS else y
            tl.store(p_state + tap * CHANNELS, new.to(conv_state_ptr.dtype.element_ty), mask=m_conv)
        y = tl.where(m_conv, s * sigmoid(s), y)
    p_y = y_ptr + o_b.to(tl.int64)[:, None] * O + o_o[None, :]
    tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=mask)
