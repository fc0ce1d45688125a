"""One decoding step of a residual Mamba layer in Triton: four launches, the states updated in place.

1. norm(x + residual), in_proj, the convolution's step and SiLU                                  linear_step_triton
2. x_proj
3. dt_proj, step size, state update, y = h C + D x, gate                                         here
4. out_proj
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
from seqmodels.kernels.math_triton import sigmoid, softplus


def forward(
    x: Tensor, residual: Tensor | None, layer_norm: Tensor, in_proj: Tensor, in_bias: Tensor | None,
    conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, out_proj: Tensor, out_bias: Tensor | None, conv_state: Tensor, state: Tensor, layer_epsilon: float,
    total_dtype: torch.dtype, follows: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (b, d) -> the mixer's result (b, d) and x + residual; conv_state and state are overwritten."""
    b, e, n = state.shape
    rank = dt_proj.shape[1]
    check_states(conv_state, state)
    conv_weight, overlap = conv_weight.contiguous(), overlaps(x) and conv_weight.is_contiguous()
    with torch.cuda.device_of(x):
        total = torch.empty(x.shape, dtype=total_dtype, device=x.device)
        xz = linear(
            x, in_proj, in_bias, dtype=torch.float32, norm=layer_norm, residual=residual, total=total,
            epsilon=layer_epsilon, conv=Conv(conv_weight, conv_bias, conv_state, 0), overlap=overlap and follows,
        )  # fmt: skip
        dtBC = linear(xz[:, :e], x_proj, dtype=torch.float32, overlap=overlap, early=True)
        y = torch.empty(b, e, dtype=x.dtype if on_tensor_cores(x, out_proj) else torch.float32, device=x.device)
        ROWS, BLOCK_N = 8 if b <= 4 else 32, triton.next_power_of_2(n)
        parts = triton.cdiv(e, ROWS)
        _update[(b * parts,)](
            xz, dtBC, dt_proj, dt_bias, A_log, D, state, y,
            E=e, N=n, RANK=rank, PARTS=parts, ROWS=ROWS, BLOCK_N=BLOCK_N,
            BLOCK_RANK=triton.next_power_of_2(rank), OVERLAP=overlap,
            num_warps=warps_for(ROWS * BLOCK_N, 1 if b <= 4 else 4),
            **launch_options(overlap),
        )  # fmt: skip
        result = linear(y, out_proj, out_bias, dtype=x.dtype, overlap=overlap, early=True)
    return result, total


@triton.jit
def _update(
    xz_ptr, dtBC_ptr, dt_proj_ptr, dt_bias_ptr, A_log_ptr, D_ptr, state_ptr, y_ptr,
    E: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_RANK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    i_b = (tl.program_id(0) // PARTS).to(tl.int64)
    o_e = (tl.program_id(0) % PARTS) * ROWS + tl.arange(0, ROWS)
    o_n, o_r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_RANK)
    m_e, m_n, m_r = o_e < E, o_n < N, o_r < RANK
    m_state = m_e[:, None] & m_n[None, :]
    p_state = state_ptr + (i_b * E + o_e[:, None]) * N + o_n[None, :]
    state = tl.load(p_state, mask=m_state, other=0.0)
    A = -tl.exp(tl.load(A_log_ptr + o_e[:, None] * N + o_n[None, :], mask=m_state, other=0.0).to(tl.float32))
    p_w = dt_proj_ptr + o_e[:, None] * RANK + o_r[None, :]
    w = tl.load(p_w, mask=m_e[:, None] & m_r[None, :], other=0.0).to(tl.float32)
    bias = tl.load(dt_bias_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
    p_dtBC = dtBC_ptr + i_b * (RANK + 2 * N)
    low = tl.load(p_dtBC + o_r, mask=m_r, other=0.0)
    B = tl.load(p_dtBC + RANK + o_n, mask=m_n, other=0.0)
    C = tl.load(p_dtBC + RANK + N + o_n, mask=m_n, other=0.0)
    p_x = xz_ptr + i_b * (2 * E) + o_e
    x = tl.load(p_x, mask=m_e, other=0.0)
    z = tl.load(p_x + E, mask=m_e, other=0.0)
    dt = softplus(tl.sum(w * low[None, :], 1) + bias)
    state = state * tl.exp(dt[:, None] * A) + (dt * x)[:, None] * B[None, :]
    tl.store(p_state, state, mask=m_state)
    y = (tl.sum(state * C[None, :], 1) + D * x) * (z * sigmoid(z))
    tl.store(y_ptr + i_b * E + o_e, y.to(y_ptr.dtype.element_ty), mask=m_e)
