"""One decoding step of a whole residual layer, Mamba-2's or Mamba's, its states updated in place.

    total = x + residual,   y = mixer(norm(total)):

    Mamba-2   z, xBC, dt = split(W_in norm(total));   x, B, C = silu(conv(xBC));   h <- exp(dt A) h + dt B x
              y = W_out gated_norm(C h + D x, z)
    Mamba     x, z = split(W_in norm(total));   x = silu(conv(x));   dt, B, C = split(W_x x);   dt = W_dt dt
              h <- exp(dt A) h + dt B x;   y = W_out ((C h + D x) silu(z))

The definition is the ops in turn. On NVIDIA GPUs it is three launches (Mamba: four), which suit a CUDA graph and may
overlap: mamba2_step_triton.py, mamba_step_triton.py.

Letters: b batch, d model width, e inner width = h heads * p head size, n state size, g groups, k conv taps, r rank of
Mamba's dt, c channels of the convolution. `layer_norm` (d,) is the norm before the mixer. With `follows` the caller
says that this op follows other work of the same pass, so that no weight is being written: launches may overlap.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.kernels.causal_conv1d import causal_conv1d_step
from seqmodels.kernels.dispatch import triton_form
from seqmodels.kernels.rms_norm import rms_norm_reference
from seqmodels.kernels.selective_scan import selective_scan_step
from seqmodels.kernels.ssd import ssd_step


def _mamba2_in_torch(
    x: Tensor, residual: Tensor | None, layer_norm: Tensor, in_proj: Tensor, in_bias: Tensor | None,
    conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor | None, out_proj: Tensor, out_bias: Tensor | None, conv_state: Tensor, state: Tensor,
    groups: int, norm_before_gate: bool, layer_epsilon: float, epsilon: float, dt_low: float, dt_high: float,
    residual_in_fp32: bool, follows: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x, residual (b, d), states (b, k-1, c) and (b, h, p, n) -> y and total (b, d); the states become the new ones.

    in_proj (2 e + 2 g n + h, d), out_proj (d, e), conv_weight (c, k), dt_bias and A_log (h,), D (h,) or (e,),
    norm_weight (e,), or None for a gate without a norm.
    """
    b, h, p, n = state.shape
    wide, e, shared = state.dtype, h * p, groups * n
    u, total = _add_and_norm(x, residual, layer_norm, layer_epsilon, residual_in_fp32)
    z, xBC, dt = F.linear(u, in_proj, in_bias).split([e, e + 2 * shared, h], -1)
    xBC, window = causal_conv1d_step(xBC, conv_weight, conv_bias, activation="silu", state=conv_state)
    v, B, C = xBC.split([e, shared, shared], -1)
    y, new = ssd_step(
        v.view(b, h, p), dt, -A_log.to(wide).exp(), B.view(b, groups, n), C.view(b, groups, n),
        (D if len(D) == h else D.view(h, p)).to(wide), None, dt_bias.to(wide), dt_softplus=True,
        dt_limit=(dt_low, dt_high), state=state,
    )  # fmt: skip
    conv_state.copy_(window)
    state.copy_(new)
    y = y.flatten(1)
    if norm_weight is None:
        y = y * F.silu(z)
    else:
        options = {"groups": groups, "epsilon": epsilon, "norm_before_gate": norm_before_gate}
        y = rms_norm_reference(y, norm_weight, z=z, **options)
    return F.linear(y, out_proj, out_bias), total


def _mamba_in_torch(
    x: Tensor, residual: Tensor | None, layer_norm: Tensor, in_proj: Tensor, in_bias: Tensor | None,
    conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, out_proj: Tensor, out_bias: Tensor | None, conv_state: Tensor, state: Tensor, layer_epsilon: float,
    residual_in_fp32: bool, follows: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x, residual (b, d), states (b, k-1, e) and (b, e, n) -> y and total (b, d); the states become the new ones.

    in_proj (2 e, d), conv_weight (e, k), x_proj (r + 2 n, e), dt_proj (e, r), dt_bias and D (e,), A_log (e, n),
    out_proj (d, e).
    """
    n, wide = state.shape[2], state.dtype
    u, total = _add_and_norm(x, residual, layer_norm, layer_epsilon, residual_in_fp32)
    v, z = F.linear(u, in_proj, in_bias).chunk(2, -1)
    v, window = causal_conv1d_step(v, conv_weight, conv_bias, activation="silu", state=conv_state)
    low, B, C = F.linear(v, x_proj).split([dt_proj.shape[1], n, n], -1)
    y, new = selective_scan_step(
        v, F.linear(low, dt_proj), -A_log.to(wide).exp(), B[:, None], C[:, None], D.to(wide), z, dt_bias.to(wide),
        dt_softplus=True, state=state,
    )  # fmt: skip
    conv_state.copy_(window)
    state.copy_(new)
    return F.linear(y, out_proj, out_bias), total


def _add_and_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """norm(x + residual) in x's dtype, and the sum."""
    residual = x.new_zeros(x.shape) if residual is None else residual
    options = {"epsilon": epsilon, "residual_in_fp32": residual_in_fp32}
    return rms_norm_reference(x, weight, residual=residual, **options)  # pyright: ignore


def _total_dtype(x: Tensor, residual_in_fp32: bool) -> torch.dtype:
    return torch.float32 if residual_in_fp32 and x.dtype != torch.float64 else x.dtype


def _layer_op(mixer: str, in_torch: Callable) -> Callable:
    """The operator that in_torch defines; the last two arguments are residual_in_fp32 and follows."""
    op = torch.library.custom_op(f"longseq::{mixer}_layer_step", in_torch, mutates_args=("conv_state", "state"))

    @op.register_kernel("cuda")
    def _(x, *others):
        form = triton_form(f"{mixer}_step", x)
        if form is None:
            return in_torch(x, *others)
        return form.forward(x, *others[:-2], _total_dtype(x, others[-2]), others[-1])

    @op.register_fake
    def _(x, *others):
        return x.new_empty(x.shape), x.new_empty(x.shape, dtype=_total_dtype(x, others[-2]))

    return op


mamba2_layer_step = _layer_op("mamba2", _mamba2_in_torch)
mamba_layer_step = _layer_op("mamba", _mamba_in_torch)
