"""One decoding step of a residual Mamba-2 layer in Triton: three launches, the states updated in place.

    1. norm(x + residual), in_proj, the convolution's step and SiLU                                  linear_step_triton
    2. step size, state update, y = h C + D x, gate; sums of squares for the gated norm              here
    3. out_proj, divided by the root mean square

From 5 rows in bfloat16 the first norm is a launch of its own and projections run on tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from seqmodels.kernels.linear_step_triton import (
    Conv,
    check_states,
    launch_options,
    linear,
    on_tensor_cores,
    overlaps,
    warps_for,
)
from seqmodels.kernels.math_triton import sigmoid, step_size


def forward(
    x: Tensor, residual: Tensor | None, layer_norm: Tensor, in_proj: Tensor, in_bias: Tensor | None,
    conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor | None, out_proj: Tensor, out_bias: Tensor | None, conv_state: Tensor, state: Tensor,
    groups: int, norm_before_gate: bool, layer_epsilon: float, epsilon: float, dt_low: float, dt_high: float,
    total_dtype: torch.dtype, follows: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (b, d) -> the mixer's result (b, d) and x + residual; conv_state and state are overwritten."""
    b, h, p, n = state.shape
    check_states(conv_state, state)
    conv_weight, overlap = conv_weight.contiguous(), overlaps(x) and conv_weight.is_contiguous()
    with torch.cuda.device_of(x):
        total = torch.empty(x.shape, dtype=total_dtype, device=x.device)
        zxBCdt = linear(
            x, in_proj, in_bias, dtype=torch.float32, norm=layer_norm, residual=residual, total=total,
            epsilon=layer_epsilon, conv=Conv(conv_weight, conv_bias, conv_state, h * p), overlap=overlap and follows,
        )  # fmt: skip
        many = on_tensor_cores(x, out_proj)
        # A batch's states pass the cache by: 0.95 instead of 0.97 ms at batch 64.
        ROWS = min(triton.next_power_of_2(p), 32 if b > 4 else 8)
        parts, BLOCK_N = triton.cdiv(p, ROWS), triton.next_power_of_2(n)
        y = torch.empty(b, h * p, dtype=x.dtype if many else torch.float32, device=x.device)
        squares = None if norm_weight is None else torch.empty(b, h * parts, device=x.device)
        _update[(b * h * parts,)](
            zxBCdt, dt_bias, A_log, D, norm_weight, state, y, squares, dt_low, dt_high,
            H=h, G=groups, P=p, N=n, PARTS=parts, D_PER_CHANNEL=D.numel() > h, NORM=norm_weight is not None,
            NORM_BEFORE_GATE=norm_before_gate, ROWS=ROWS, BLOCK_N=BLOCK_N, OVERLAP=overlap,
            EVICTION="evict_first" if b > 4 else "", num_warps=warps_for(ROWS * BLOCK_N, 8 if b > 4 else 4),
            **launch_options(overlap),
        )  # fmt: skip
        result = linear(
            y, out_proj, out_bias, dtype=x.dtype, squares=squares, groups=1 if squares is None else groups,
            epsilon=epsilon, overlap=overlap, early=True,
        )  # fmt: skip
    return result, total


@triton.jit
def _update(
    zxBCdt_ptr, dt_bias_ptr, A_log_ptr, D_ptr, norm_ptr, state_ptr, y_ptr, squares_ptr, dt_low, dt_high,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr, NORM: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, EVICTION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # One part of a head: ROWS of its P channels.
    if OVERLAP:
        gdc_launch_dependents()
    part = tl.program_id(0) % (H * PARTS)
    i_b = (tl.program_id(0) // (H * PARTS)).to(tl.int64)
    i_h = part // PARTS
    o_p = (part % PARTS) * ROWS + tl.arange(0, ROWS)
    o_n = tl.arange(0, BLOCK_N)
    m_p, m_n = o_p < P, o_n < N
    m_state = m_p[:, None] & m_n[None, :]
    o_e = i_h * P + o_p
    p_state = state_ptr + (i_b * (H * P) + o_e[:, None]) * N + o_n[None, :]
    state = tl.load(p_state, mask=m_state, other=0.0, eviction_policy=EVICTION)
    A = -tl.exp(tl.load(A_log_ptr + i_h).to(tl.float32))
    bias = tl.load(dt_bias_ptr + i_h).to(tl.float32)
    if D_PER_CHANNEL:
        D = tl.load(D_ptr + o_e, mask=m_p, other=0.0).to(tl.float32)
    else:
        D = tl.load(D_ptr + i_h).to(tl.float32)
    if NORM:
        weight = tl.load(norm_ptr + o_e, mask=m_p, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
    E: tl.constexpr = H * P
    p_z = zxBCdt_ptr + i_b * (2 * E + 2 * G * N + H)
    p_B = p_z + 2 * E + (i_h // (H // G)) * N + o_n
    dt = step_size(tl.load(p_z + 2 * E + 2 * G * N + i_h), bias, True, dt_low, dt_high)
    x = tl.load(p_z + E + o_e, mask=m_p, other=0.0)
    B = tl.load(p_B, mask=m_n, other=0.0)
    C = tl.load(p_B + G * N, mask=m_n, other=0.0)
    z = tl.load(p_z + o_e, mask=m_p, other=0.0)
    state = state * tl.exp(dt * A) + (dt * x)[:, None] * B[None, :]
    tl.store(p_state, state, mask=m_state, eviction_policy=EVICTION)
    y = tl.sum(state * C[None, :], 1) + D * x
    gate = z * sigmoid(z)
    if not NORM_BEFORE_GATE:
        y *= gate
    if NORM:
        tl.store(squares_ptr + i_b * (H * PARTS) + part, tl.sum(tl.where(m_p, y * y, 0.0), 0))
        y *= weight
    if NORM_BEFORE_GATE:
        y *= gate
    tl.store(y_ptr + i_b * E + o_e, y.to(y_ptr.dtype.element_ty), mask=m_p)
