"""One decoding step of a whole Mamba-2 mixer on a CPU, compiled with numba.

    z, xBC, dt = split(W_in u);   x, B, C = silu(conv(xBC));   h <- exp(dt A) h + dt B x;   y = C h + D x
    result = W_out norm(y, z)

The same mathematics as in_proj, causal_conv1d_step, ssd_step, rms_norm and out_proj in turn, whose some forty small
calls cost far more than their arithmetic at batch 1 (measured with d = 128, n = 64, b = 1: 187 us in turn, 47 us here).
Rows are computed apart: a row's result does not depend on the batch.

Letters: b batch, d model width, e inner width = h heads * p head size, n state size, g groups, k conv taps, and
c = e + 2 g n channels of the convolution.
"""

import math

import numpy as np
import torch
from torch import Tensor

from seqmodels.kernels.selective_scan_cpu import _SUM_FLAGS, _compiled, _exp_float32


def mamba2_step(
    u: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    out_proj: Tensor,
    conv_state: Tensor,
    state: Tensor,
    *,
    groups: int = 1,
    norm_groups: int = 1,
    norm_before_gate: bool = False,
    epsilon: float = 1e-5,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor, Tensor]:
    """u (b, d), states (b, k-1, c) and (b, h, p, n) -> result (b, d) and the two new states.

    in_proj (2 e + 2 g n + h, d), out_proj (d, e), conv_weight (c, k), conv_bias (c,), dt_bias and A_log (h,), D (h,) or
    (e,), norm_weight (e,) or None for y * silu(z) without a norm. All float32 on a CPU, without gradients.
    """
    b, h, _, _ = state.shape
    result = np.empty((b, out_proj.shape[0]), np.float32)
    new_conv, new_state = np.empty(conv_state.shape, np.float32), np.empty(state.shape, np.float32)
    bias = torch.zeros(conv_weight.shape[0]) if conv_bias is None else conv_bias
    norm = A_log if norm_weight is None else norm_weight  # not read without norm groups
    tensors = (
        u, in_proj, conv_weight, bias, dt_bias, A_log, D.view(h, -1), norm, out_proj, conv_state, state,
    )  # fmt: skip
    _step(
        *[(t if t.is_contiguous() else t.contiguous()).numpy(force=True) for t in tensors],
        new_conv, new_state, result, groups, 0 if norm_weight is None else norm_groups, norm_before_gate, epsilon,
        *dt_limit,
    )  # fmt: skip
    return torch.from_numpy(result), torch.from_numpy(new_conv), torch.from_numpy(new_state)


@_compiled(_SUM_FLAGS, error_model="numpy")
def _product(weight, x, result):
    """result (b, o) = x (b, i) weight (o, i)^T, each weight read once."""
    for o in range(weight.shape[0]):
        w = weight[o]
        for row in range(x.shape[0]):
            v = x[row]
            total = np.float32(0)
            for i in range(len(w)):
                total += w[i] * v[i]
            result[row, o] = total


@_compiled(_SUM_FLAGS, error_model="numpy")
def _step(
    u, in_proj, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, out_proj, conv_state, state, new_conv,
    new_state, result, groups, norm_groups, norm_before_gate, epsilon, dt_low, dt_high,
):  # fmt: skip
    b, h, p, n = state.shape
    e, (c, k) = h * p, conv_weight.shape
    one, dt_low, dt_high = np.float32(1), np.float32(dt_low), np.float32(dt_high)
    zxBCdt, y, xBC = np.empty((b, in_proj.shape[0]), np.float32), np.empty((b, e), np.float32), np.empty(c, np.float32)
    _product(in_proj, u, zxBCdt)
    for row in range(b):
        for j in range(k - 2):
            new_conv[row, j] = conv_state[row, j + 1]
        if k > 1:
            new_conv[row, k - 2] = zxBCdt[row, e : e + c]
        for i in range(c):
            xBC[i] = conv_bias[i] + conv_weight[i, k - 1] * zxBCdt[row, e + i]
        for j in range(k - 1):
            for i in range(c):
                xBC[i] += conv_weight[i, j] * conv_state[row, j, i]
        for i in range(c):
            xBC[i] /= one + _exp_float32(-xBC[i])
        for head in range(h):
            group = head // (h // groups)
            B = xBC[e + group * n : e + (group + 1) * n]
            C = xBC[e + (groups + group) * n : e + (groups + group + 1) * n]
            dt = zxBCdt[row, e + c + head] + dt_bias[head]
            dt = dt if dt > 20 else np.log1p(np.exp(dt))
            dt = min(max(dt, dt_low), dt_high)
            decay = np.exp(-dt * np.exp(A_log[head]))
            for i in range(p):
                x = xBC[head * p + i]
                inputs = x * dt
                total = D[head, i % D.shape[1]] * x
                old, new = state[row, head, i], new_state[row, head, i]
                for s in range(n):
                    new[s] = decay * old[s] + inputs * B[s]
                for s in range(n):
                    total += new[s] * C[s]
                y[row, head * p + i] = total
        _gate_and_norm(y[row], zxBCdt[row], norm_weight, norm_groups, norm_before_gate, epsilon)
    _product(out_proj, y, result)


@_compiled(_SUM_FLAGS, error_model="numpy")
def _gate_and_norm(y, z, weight, groups, norm_before_gate, epsilon):
    one, epsilon = np.float32(1), np.float32(epsilon)
    if groups == 0 or not norm_before_gate:
        for i in range(len(y)):
            y[i] *= z[i] / (one + _exp_float32(-z[i]))
    if groups == 0:
        return
    size = len(y) // groups
    for group in range(groups):
        total = np.float32(0)
        for i in range(group * size, (group + 1) * size):
            total += y[i] * y[i]
        scale = one / np.sqrt(total / np.float32(size) + epsilon)
        for i in range(group * size, (group + 1) * size):
            y[i] *= scale * weight[i]
            if norm_before_gate:
                y[i] *= z[i] / (one + _exp_float32(-z[i]))
