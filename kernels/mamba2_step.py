"""One decoding step of a whole Mamba-2 mixer, or of a stack of residual layers around such, on a CPU, in numba.

    z, xBC, dt = split(W_in u);   x, B, C = silu(conv(xBC));   h <- exp(dt A) h + dt B x;   y = C h + D x
    result = W_out norm(y, z)

The same mathematics as in_proj, causal_conv1d_step, ssd_step, rms_norm and out_proj in turn, whose some forty small
calls cost far more than their arithmetic at batch 1 (measured with d = 128, n = 64, b = 1: 187 us in turn, 47 us here).
A stack is one call, which saves the some 250 us between its layers' calls. Rows are computed apart: a row's result does
not depend on the batch.

Letters: b batch, d model width, e inner width = h heads * p head size, n state size, g groups, k conv taps, and
c = e + 2 g n channels of the convolution.
"""

import math
from collections.abc import Sequence

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
    new_conv, new_state = conv_state.numpy(force=True).copy(), state.numpy(force=True).copy()
    bias = torch.zeros(conv_weight.shape[0]) if conv_bias is None else conv_bias
    norm = A_log if norm_weight is None else norm_weight  # not read without norm groups
    tensors = (
        u, in_proj, conv_weight, bias, dt_bias, A_log, D.view(h, -1), norm, out_proj
    )  # fmt: skip
    _step(
        *[(t if t.is_contiguous() else t.contiguous()).numpy(force=True) for t in tensors],
        new_conv, new_state, result, groups, 0 if norm_weight is None else norm_groups, norm_before_gate, epsilon,
        *dt_limit,
    )  # fmt: skip
    return torch.from_numpy(result), torch.from_numpy(new_conv), torch.from_numpy(new_state)


class Mamba2Stack:
    """The weights of equal Mamba-2 layers in one piece, and of the rows in work the states, which a step overwrites.

    y (b, d) = norm_f(total),   total = x + sum of the layers' results, each mixer(norm(total before it)).
    """

    def __init__(
        self, layers: Sequence[Sequence[Tensor | None]], norm_f: Tensor, conv_states: Sequence[Tensor],
        states: Sequence[Tensor], *, groups: int, norm_before_gate: bool, layer_epsilon: float, epsilon: float,
        dt_limit: tuple[float, float],
    ) -> None:  # fmt: skip
        """layers: of each its norm (d,), then the weights as `mamba2_step` takes them; states as there."""
        self.states = np.stack([t.numpy(force=True) for t in states])
        self.conv_states = np.stack([t.numpy(force=True) for t in conv_states])
        heads, channels = self.states.shape[2], self.conv_states.shape[3]
        norm, in_proj, conv_weight, conv_bias, dt_bias, A_log, D, gated_norm, out_proj = zip(*layers, strict=True)
        bias = [torch.zeros(channels) if t is None else t for t in conv_bias]
        gated = A_log if gated_norm[0] is None else gated_norm  # not read without norm groups
        kinds = (norm, in_proj, conv_weight, bias, dt_bias, A_log, [t.view(heads, -1) for t in D], gated, out_proj)
        self.weights = [np.stack([t.numpy(force=True) for t in kind]) for kind in kinds]
        self.norm_f = np.ascontiguousarray(norm_f.numpy(force=True))
        norm_groups = 0 if gated_norm[0] is None else groups
        self.options = (layer_epsilon, groups, norm_groups, norm_before_gate, epsilon, *dt_limit)

    def step(self, x: Tensor) -> Tensor:
        """x (b, d) float32 -> y (b, d)."""
        result = np.empty(x.shape, np.float32)
        _stack(x.numpy(force=True), *self.weights, self.norm_f, self.conv_states, self.states, result, *self.options)
        return torch.from_numpy(result)


@_compiled(_SUM_FLAGS, error_model="numpy")
def _stack(
    x, norm, in_proj, conv_weight, conv_bias, dt_bias, A_log, D, gated_norm, out_proj, norm_f, conv_states, states,
    result, layer_epsilon, groups, norm_groups, norm_before_gate, epsilon, dt_low, dt_high,
):  # fmt: skip
    total, u, y = x.copy(), np.empty(x.shape, np.float32), np.zeros(x.shape, np.float32)
    for i in range(len(norm)):
        _add_and_norm(total, y, norm[i], layer_epsilon, u)
        _step(
            u, in_proj[i], conv_weight[i], conv_bias[i], dt_bias[i], A_log[i], D[i], gated_norm[i], out_proj[i],
            conv_states[i], states[i], y, groups, norm_groups, norm_before_gate, epsilon,
            dt_low, dt_high,
        )  # fmt: skip
    _add_and_norm(total, y, norm_f, layer_epsilon, result)


@_compiled(_SUM_FLAGS, error_model="numpy")
def _add_and_norm(total, y, weight, epsilon, result):
    """total += y (b, d), in place; result = RMSNorm of it."""
    for row in range(len(total)):
        squares = np.float32(0)
        for i in range(len(weight)):
            total[row, i] += y[row, i]
            squares += total[row, i] * total[row, i]
        scale = np.float32(1) / np.sqrt(squares / np.float32(len(weight)) + np.float32(epsilon))
        for i in range(len(weight)):
            result[row, i] = total[row, i] * scale * weight[i]


@_compiled(_SUM_FLAGS, error_model="numpy")
def _product(weight, x, result):
    """result (b, o) = x (b, i) weight (o, i)^T, each weight read once; four at a time share the reading of x."""
    outputs, inputs = weight.shape
    for o in range(0, outputs - 3, 4):
        w0, w1, w2, w3 = weight[o], weight[o + 1], weight[o + 2], weight[o + 3]
        for row in range(len(x)):
            v = x[row]
            y0 = y1 = y2 = y3 = np.float32(0)
            for i in range(inputs):
                y0 += w0[i] * v[i]
                y1 += w1[i] * v[i]
                y2 += w2[i] * v[i]
                y3 += w3[i] * v[i]
            result[row, o], result[row, o + 1], result[row, o + 2], result[row, o + 3] = y0, y1, y2, y3
    for o in range(outputs - outputs % 4, outputs):
        for row in range(len(x)):
            y0 = np.float32(0)
            for i in range(inputs):
                y0 += weight[o, i] * x[row, i]
            result[row, o] = y0


@_compiled(_SUM_FLAGS, error_model="numpy")
def _step(
    u, in_proj, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, out_proj, conv_state, state, result, groups,
    norm_groups, norm_before_gate, epsilon, dt_low, dt_high,
):  # fmt: skip
    # In place: the states.
    b, h, p, n = state.shape
    e, (c, k) = h * p, conv_weight.shape
    one, dt_low, dt_high = np.float32(1), np.float32(dt_low), np.float32(dt_high)
    zxBCdt, y, xBC = np.empty((b, in_proj.shape[0]), np.float32), np.empty((b, e), np.float32), np.empty(c, np.float32)
    _product(in_proj, u, zxBCdt)
    for row in range(b):
        for i in range(c):
            xBC[i] = conv_bias[i] + conv_weight[i, k - 1] * zxBCdt[row, e + i]
        for j in range(k - 1):
            for i in range(c):
                xBC[i] += conv_weight[i, j] * conv_state[row, j, i]
        for j in range(k - 2):
            conv_state[row, j] = conv_state[row, j + 1]
        if k > 1:
            conv_state[row, k - 2] = zxBCdt[row, e : e + c]
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
                h_i = state[row, head, i]
                for s in range(n):
                    h_i[s] = decay * h_i[s] + inputs * B[s]
                    total += h_i[s] * C[s]
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
