"""Causal depthwise convolution over time with k taps, and SiLU after it: the short convolution of a Mamba mixer.

    y[t] = act(bias + sum_j weight[:, j] x[t - k + 1 + j]),   j = 0 ... k-1; weight[:, k-1] meets x[t] itself

Inputs before the start come from `initial_state`, else they are zero; inputs of another packed sequence count as zero.
kernels/README.md has the gradient.

Letters: b batch, l length, d channels, k taps. Shapes: x (b, l, d), weight (d, k), bias (d,), states (b, k-1, d): the
last k-1 inputs, oldest first. Sums are float32 (float64 for float64 inputs).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.kernels.direct import direct
from seqmodels.kernels.dispatch import triton_form
from seqmodels.kernels.packing import starts_of_sequences
from seqmodels.kernels.split import room

_ELEMENTS_PER_PASS = 2**17  # what a pass over time handles together on a CPU: what fits the cache


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal convolution: y (b, l, d) and the final state (b, k-1, d), both in x's dtype. activation: None or "silu".

    The window is cut wherever `seq_idx` (b, l) changes; `initial_state` belongs to the first sequence of each row and
    the final state to the last, with zeros before that one's start.
    """
    _check(x, weight, bias, activation, initial_state, seq_idx)
    run = None if seq_idx is None else starts_of_sequences(seq_idx).cumsum(1)
    return _direct(x, weight, bias, initial_state, run, activation == "silu")


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: one `causal_conv1d_step` after the other. Arguments and results as in `causal_conv1d`."""
    _check(x, weight, bias, activation, initial_state, seq_idx)
    b, _, d = x.shape
    state = x.new_zeros(b, weight.shape[1] - 1, d) if initial_state is None else initial_state.to(x.dtype)
    starts = None if seq_idx is None else starts_of_sequences(seq_idx)
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None], 0.0)
        y, state = causal_conv1d_step(x[:, t], weight, bias, activation=activation, state=state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: x (b, d), state (b, k-1, d) -> y (b, d), the new state."""
    window = torch.cat([state, x[:, None].to(state.dtype)], 1)
    dtype = _sum_dtype(x)
    y = (window * weight.t().to(dtype)).sum(1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), window[:, 1:]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:  # fmt: skip
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (b, l, d) with l >= 1: skip sequences without a step")
    b, l, d = x.shape
    if weight.dim() != 2 or weight.shape[0] != d or weight.shape[1] == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; with x {(b, l, d)} it must be ({d}, k); "
            "squeeze the middle dimension of a Conv1d's weight"
        )
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; use None or 'silu'")
    k = weight.shape[1]
    for name, tensor, shape in (
        ("bias", bias, (d,)), ("initial_state", initial_state, (b, k - 1, d)), ("seq_idx", seq_idx, (b, l)),
    ):  # fmt: skip
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with x {(b, l, d)} and k = {k} taps it must be {shape}"
            )


# The fast form goes over time in passes. A pass sees a window of its q steps and the k-1 inputs before them; tap j of
# step t is row t + j of the window.


def _passes(x: Tensor) -> list[tuple[int, int]]:
    b, l, d = x.shape
    step = max(1, _ELEMENTS_PER_PASS // (b * d)) if x.device.type == "cpu" else l
    return [(t0, min(t0 + step, l)) for t0 in range(0, l, step)]


def _window(x: Tensor, initial_state: Tensor | None, reach: int, t0: int, t1: int) -> Tensor:
    """Inputs t0 - reach to t1, (b, reach + q, d)."""
    if t0 >= reach:
        return x[:, t0 - reach : t1]
    if initial_state is None:
        return F.pad(x[:, :t1], (0, 0, reach - t0, 0))
    return torch.cat([initial_state[:, t0:].to(x.dtype), x[:, :t1]], 1)


class _Pass:
    """Steps t0 to t1: their window, the taps and which taps stay within a sequence."""

    def __init__(
        self, x: Tensor, weight: Tensor, initial_state: Tensor | None, run: Tensor | None, t0: int, t1: int
    ) -> None:
        self.q, self.k = t1 - t0, weight.shape[1]
        dtype = _sum_dtype(x)
        self.inputs = _window(x, initial_state, self.k - 1, t0, t1).to(dtype)
        self.taps = weight.t().to(dtype)  # (k, d)
        self.run = None if run is None else _window(run[..., None], None, self.k - 1, t0, t1)  # (b, k-1 + q, 1)

    def tap(self, j: int) -> Tensor:
        """What tap j of every step sees, (b, q, d)."""
        return self.keep(self.inputs[:, j : j + self.q], j)

    def keep(self, values: Tensor, j: int) -> Tensor:
        """values (b, q, d), zero where tap j lies in another sequence."""
        if self.run is None or j == self.k - 1:
            return values
        return values.masked_fill(self.run[:, j : j + self.q] != self.run[:, self.k - 1 :], 0.0)

    def sums(self, bias: Tensor | None) -> Tensor:
        """The convolution before the activation, (b, q, d)."""
        total = self.tap(self.k - 1) * self.taps[-1]
        if bias is not None:
            total += bias.to(total.dtype)
        for j in range(self.k - 1):
            total.addcmul_(self.tap(j), self.taps[j])
        return total

    def in_last_sequence(self, state: Tensor) -> Tensor:
        """The state's rows (the window's last k-1), zero where not of the last step's sequence."""
        if self.run is None:
            return state
        return state.masked_fill(self.run[:, self.q :] != self.run[:, -1:], 0.0)


def _conv_in_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, run: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y and the final state. run: (b, l), the sequence's number from 0 on, or None."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for t0, t1 in _passes(x):
        one = _Pass(x, weight, initial_state, run, t0, t1)
        total = one.sums(bias)
        y[:, t0:t1] = F.silu(total, inplace=True) if silu else total
    return y, one.in_last_sequence(one.inputs[:, one.q :]).to(x.dtype, copy=True)


_conv = torch.library.custom_op("longseq::causal_conv1d", mutates_args=())(_conv_in_torch)


@_conv.register_kernel("cuda")
def _conv_anywhere(x, weight, bias, initial_state, run, silu):
    form = triton_form("causal_conv1d", x)
    return (_conv_in_torch if form is None else form.forward)(x, weight, bias, initial_state, run, silu)


@_conv.register_fake
def _(x, weight, bias, initial_state, run, silu):
    b, _, d = x.shape
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(b, weight.shape[1] - 1, d)


def _conv_backward_in_torch(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    run: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and the initial state (empty without one); the pre-activation is recomputed."""
    dtype, (b, _, d), k = _sum_dtype(x), x.shape, weight.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dtaps = torch.zeros(k, d, dtype=dtype, device=x.device)
    dbias = torch.zeros(d, dtype=dtype, device=x.device)
    carried = None  # gradient of the k-1 inputs before the pass on the right
    for t0, t1 in reversed(_passes(x)):
        one = _Pass(x, weight, initial_state, run, t0, t1)
        if carried is None:
            carried = 0.0 if dfinal is None else one.in_last_sequence(dfinal.to(dtype))
        dsum = dy[:, t0:t1].to(dtype)
        if silu:
            dsum = torch.ops.aten.silu_backward(dsum, one.sums(bias))
        dbias += dsum.sum((0, 1))
        dwindow = torch.zeros(b, one.q + k - 1, d, dtype=dtype, device=x.device)
        dwindow[:, one.q :] = carried
        for j in range(k):
            dtaps[j] += (dsum * one.tap(j)).sum((0, 1))
            dwindow[:, j : j + one.q].addcmul_(one.keep(dsum, j), one.taps[j])
        dx[:, t0:t1] = dwindow[:, k - 1 :]
        carried = dwindow[:, : k - 1]
    carried = carried.new_empty((0,)) if initial_state is None else carried.clone()
    return dx, dtaps.t().to(weight.dtype).contiguous(), dbias, carried


_conv_backward = torch.library.custom_op("longseq::causal_conv1d_backward", mutates_args=())(_conv_backward_in_torch)


@_conv_backward.register_kernel("cuda")
def _conv_backward_anywhere(dy, dfinal, x, weight, bias, initial_state, run, silu, place=None):
    form = triton_form("causal_conv1d", x)
    if form is None:
        return _conv_backward_in_torch(dy, dfinal, x, weight, bias, initial_state, run, silu)
    dx = None if place is None else place.take()
    return form.backward(dy, dfinal, x, weight, bias, initial_state, run, silu, dx)


@_conv_backward.register_fake
def _(dy, dfinal, x, weight, bias, initial_state, run, silu):
    wide = torch.empty(x.shape[2], dtype=_sum_dtype(x), device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    return dx, dweight, wide, wide.new_empty((0,) if initial_state is None else initial_state.shape)


def _setup_context(ctx, inputs, output):
    x, weight, bias, initial_state, run, ctx.silu = inputs
    ctx.place = room(x)
    ctx.save_for_backward(x, weight, bias, initial_state, run)
    ctx.set_materialize_grads(False)  # a final state that nobody uses has no gradient to add


def _autograd(ctx, dy, dfinal, backward=_conv_backward):
    x, weight, bias, initial_state, run = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    place = () if backward is _conv_backward else (ctx.place,)
    dx, dweight, dbias, dinitial = backward(dy, dfinal, x, weight, bias, initial_state, run, ctx.silu, *place)
    return (
        dx, dweight, None if bias is None else dbias.to(bias.dtype),
        None if initial_state is None else dinitial.to(initial_state.dtype), None, None,
    )  # fmt: skip


_conv.register_autograd(_autograd, setup_context=_setup_context)
_direct = direct(_conv, _conv_anywhere, _setup_context, partial(_autograd, backward=_conv_backward_anywhere))
