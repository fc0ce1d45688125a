"""The selective scan of Mamba (S6): a linear recurrence whose step size, input and output maps depend on the input.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]            h: (e, n)
    y[t] = h[t] C[t] + D x[t],   then y[t] * silu(z[t])

(Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, algorithm 2; exp for A and Euler
for B, see discretize.py.) kernels/README.md derives the adjoint.

Letters: b batch, l length, e inner width (channels), g groups of e/g consecutive channels that share B and C, n state
size, c stretches of STEPS steps. Shapes: x, dt, z (b, l, e); A (e, n) real; B, C (b, l, g, n); D, dt_bias (e,); states
(b, e, n). States, and all sums, are float32 (float64 for float64 inputs).
"""

import math
from functools import cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.kernels.across import Exchange, across
from seqmodels.kernels.direct import direct
from seqmodels.kernels.discretize import step_size, step_size_gradient
from seqmodels.kernels.dispatch import triton_form
from seqmodels.kernels.packing import starts_of_sequences

STEPS = 64  # the forward pass stores a state every so many steps; the backward pass recomputes what lies between


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective scan: y (b, l, e) in x's dtype, and the final state (b, e, n).

    The state resets wherever `seq_idx` (b, l) changes; `initial_state` belongs to the first sequence of each row and
    the final state to the last. Linear in l in time and memory; differentiable in every tensor argument. With an
    `exchange` the arguments are one rank's stretch of the sequence, and both states the whole sequence's (across.py).
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    resets = None if seq_idx is None else starts_of_sequences(seq_idx)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state, resets, dt_softplus, *dt_limit)
    return _direct(*inputs)[:2] if exchange is None else _across(exchange, *inputs)


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: one `selective_scan_step` after the other. Arguments and results as in `selective_scan`."""
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    state = _zero_state(x, A) if initial_state is None else initial_state.to(_state_dtype(x))
    starts = None if seq_idx is None else starts_of_sequences(seq_idx)
    gates = [None] * x.shape[1] if z is None else z.unbind(1)
    outputs = []
    for t, (x_t, dt_t, B_t, C_t, z_t) in enumerate(zip(*(v.unbind(1) for v in (x, dt, B, C)), gates, strict=True)):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None], 0.0)
        y, state = selective_scan_step(
            x_t, dt_t, A, B_t, C_t, D, z_t, dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, state=state
        )
        outputs.append(y)
    return torch.stack(outputs, 1), state


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step: x, dt, z (b, e), B, C (b, g, n), state (b, e, n) -> y (b, e), the new state."""
    dtype = state.dtype
    b, e, n = state.shape
    g = B.shape[1]
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    wide = x.to(dtype)
    kept = state * (dt[..., None] * A.to(dtype)).exp()
    state = torch.addcmul(  # (b, g, e/g, n): a group's channels share B and C
        kept.view(b, g, e // g, n), (wide * dt).view(b, g, e // g, 1), B.to(dtype).view(b, g, 1, n)
    )
    y = torch.matmul(state, C.to(dtype).view(b, g, n, 1)).view(b, e)
    if D is not None:
        y = torch.addcmul(y, wide, D.to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state.view(b, e, n)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _zero_state(x: Tensor, A: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], *A.shape, dtype=_state_dtype(x))


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None,
) -> None:  # fmt: skip
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (b, l, e) with l >= 1: skip sequences without a step")
    b, l, e = x.shape
    if A.dim() != 2 or A.shape[0] != e or A.is_complex():
        raise ValueError(f"A is {A.dtype} of shape {tuple(A.shape)}; with x {(b, l, e)} it must be real, ({e}, n)")
    n = A.shape[1]
    if B.dim() != 4 or B.shape[:2] != (b, l) or B.shape[3] != n or B.shape[2] == 0 or e % B.shape[2]:
        raise ValueError(
            f"B has shape {tuple(B.shape)}; with x {(b, l, e)} and A {(e, n)} it must be (b, l, g, n) = "
            f"({b}, {l}, g, {n}) with g dividing {e}; for one group use B[:, :, None]"
        )
    wanted = {
        "dt": (dt, (b, l, e)), "C": (C, tuple(B.shape)), "D": (D, (e,)), "z": (z, (b, l, e)),
        "dt_bias": (dt_bias, (e,)), "initial_state": (initial_state, (b, e, n)), "seq_idx": (seq_idx, (b, l)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with x {(b, l, e)} it must be {shape}")


@cache
def _compiled() -> ModuleType | None:
    """The compiled CPU form, or None where numba is missing."""
    try:
        from seqmodels.kernels import selective_scan_cpu
    except ImportError:
        return None
    return selective_scan_cpu


# The form in plain PyTorch, for devices without a kernel of their own: one stretch of STEPS steps after the other, each
# by doubling (h[t] over 1, 2, 4, ... steps), so that only a stretch's states exist.


def _by_doubling(decay: Tensor, states: Tensor) -> Tensor:
    """h[t] = decay[t] h[t-1] + states[t] with h before the first step 0; (b, q, e, n) each."""
    reach = 1
    while reach < decay.shape[1]:
        states = torch.cat(
            [states[:, :reach], torch.addcmul(states[:, reach:], decay[:, reach:], states[:, :-reach])], 1
        )
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
        reach *= 2
    return states


def _stretch(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, resets: Tensor | None, start: Tensor, t0: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Steps t0 to t0 + STEPS: x, dt (b, q, e), then B, C, decay and states (b, q, e, n) per channel."""
    part = slice(t0, t0 + STEPS)
    x, dt, B, C = (t[:, part].to(start.dtype) for t in (x, dt, B, C))
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    decay = (dt[..., None] * A.to(start.dtype)).exp()
    if resets is not None:
        decay = decay.masked_fill(resets[:, part, None, None], 0.0)
    inputs = (x * dt)[..., None] * B
    inputs[:, 0] += decay[:, 0] * start
    return x, dt, B, C, decay, _by_doubling(decay, inputs)


def _forward_in_torch(x, dt, A, B, C, state, resets):
    y = torch.empty(x.shape, dtype=state.dtype, device=x.device)
    starts = []
    for t0 in range(0, x.shape[1], STEPS):
        starts.append(state.mT)
        _, _, _, per_channel, _, states = _stretch(x, dt, A, B, C, resets, state, t0)
        y[:, t0 : t0 + STEPS] = (states * per_channel).sum(-1)
        state = states[:, -1]
    return y, state.clone(), torch.stack(starts, 1)


def _backward_in_torch(dy, dfinal, x, dt, A, B, C, starts, resets, with_y):
    dtype = starts.dtype
    y = torch.empty(x.shape if with_y else 0, dtype=dtype, device=x.device)
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=dtype, device=t.device) for t in (x, dt, B, C))
    dA, carried = torch.zeros_like(A, dtype=dtype), dfinal.to(dtype)
    for i in reversed(range(starts.shape[1])):
        part = slice(i * STEPS, (i + 1) * STEPS)
        x_p, dt_p, B_p, C_p, decay, states = _stretch(x, dt, A, B, C, resets, starts[:, i].mT, i * STEPS)
        dy_p = dy[:, part, :, None].to(dtype)
        grads = dy_p * C_p
        grads[:, -1] += carried
        # the adjoint is the same scan backwards in time: g[t] = decay[t+1] g[t+1] + dy[t] C[t]
        next_decay = torch.cat([decay[:, 1:], decay[:, :1]], 1)
        grads = _by_doubling(next_decay.flip(1), grads.flip(1)).flip(1)
        before = torch.cat([starts[:, i, None].mT, states[:, :-1]], 1)
        through_decay = grads * decay * before
        dinputs = (grads * B_p).sum(-1)
        dx[:, part] = dt_p * dinputs
        ddt[:, part] = x_p * dinputs + (through_decay * A.to(dtype)).sum(-1)
        dA += (through_decay * dt_p[..., None]).sum((0, 1))
        grouped = (*B[:, part].shape[:3], -1, B.shape[3])
        dB[:, part] = (grads * (x_p * dt_p)[..., None]).reshape(grouped).sum(3)
        dC[:, part] = (dy_p * states).reshape(grouped).sum(3)
        if with_y:
            y[:, part] = (states * C_p).sum(-1)
        carried = grads[:, 0] * decay[:, 0]
    return dx, ddt, dA, dB, dC, carried, y


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, resets: Tensor | None, dt_softplus: bool, low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (b, l, e), the final state, and the states before every STEPS-th step (b, c, n, e). resets: (b, l) bool.

    On CPUs, and wherever there is no kernel: step size, skip and gate around one of the fast forms.
    """
    state = _zero_state(x, A) if initial_state is None else initial_state.to(_state_dtype(x))
    dt = step_size(dt, dt_bias, dt_softplus, (low, high), state.dtype)
    compiled = _compiled() if x.device.type == "cpu" else None
    y, final_state, starts = (compiled.forward if compiled else _forward_in_torch)(x, dt, A, B, C, state, resets)
    if D is not None:
        y.addcmul_(x.to(y.dtype), D.to(y.dtype))
    if z is not None:
        y *= F.silu(z.to(y.dtype))
    return y.to(x.dtype), final_state, starts


def _backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, starts: Tensor, resets: Tensor | None, dt_softplus: bool, low: float,
    high: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, of D, z, dt_bias where given, in their dtypes, and of the initial state."""
    dtype, inputs = starts.dtype, (x, dt, A, B, C, D, z, dt_bias)
    dfinal = starts.new_zeros(x.shape[0], *A.shape) if dfinal is None else dfinal
    dy = dy.to(dtype)
    before_gate = dy
    if z is not None:
        z = z.to(dtype)
        before_gate = F.silu(z).mul_(dy)
    step = step_size(dt, dt_bias, dt_softplus, (low, high), dtype)
    compiled = _compiled() if x.device.type == "cpu" else None
    run = compiled.backward if compiled else _backward_in_torch
    dx, ddt, dA, dB, dC, dinitial, y = run(before_gate, dfinal, x, step, A, B, C, starts, resets, z is not None)
    dD = dz = dbias = None
    if D is not None:
        dx.addcmul_(before_gate, D.to(dtype))
        dD = (before_gate * x).sum((0, 1))
    if z is not None:
        if D is not None:
            y.addcmul_(x.to(dtype), D.to(dtype))
        dz = torch.ops.aten.silu_backward(y.mul_(dy), z)
    if dt_softplus and (low, high) == (0.0, math.inf):
        ddt *= step.neg_().expm1_().neg_()  # 1 - exp(-softplus(v)) is the sigmoid of v
    else:
        ddt = step_size_gradient(ddt, dt, dt_bias, dt_softplus, (low, high))
    if dt_bias is not None:
        dbias = ddt.sum((0, 1))
    gradients = zip((dx, ddt, dA, dB, dC, dD, dz, dbias), inputs, strict=True)
    return [*(d.to(t.dtype) for d, t in gradients if t is not None), dinitial]


def _gpu_form(x: Tensor) -> ModuleType | None:
    return triton_form("selective_scan", x)


_scan = torch.library.custom_op("longseq::selective_scan", _forward, mutates_args=())


@_scan.register_kernel("cuda")
def _anywhere(x, *arguments):
    form = _gpu_form(x)
    return (form.forward if form else _forward)(x, *arguments)


@_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_state, resets, dt_softplus, low, high):
    (b, l, e), n, dtype = x.shape, A.shape[1], _state_dtype(x)
    final_state = x.new_empty(b, e, n, dtype=dtype)
    return x.new_empty(b, l, e), final_state, x.new_empty(b, -(-l // STEPS), n, e, dtype=dtype)


_scan_backward = torch.library.custom_op("longseq::selective_scan_backward", _backward, mutates_args=())


@_scan_backward.register_kernel("cuda")
def _backward_anywhere(dy, dfinal, x, *arguments):
    form = _gpu_form(x)
    return (form.backward if form else _backward)(dy, dfinal, x, *arguments)


@_scan_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, starts, resets, dt_softplus, low, high):
    shaped = [x.new_empty(t.shape, dtype=t.dtype) for t in (x, dt, A, B, C, D, z, dt_bias) if t is not None]
    return [*shaped, starts.new_empty(x.shape[0], *A.shape)]


def _setup_context(ctx, inputs, output):
    *tensors, initial_state, resets, dt_softplus, low, high = inputs
    ctx.options = dt_softplus, low, high
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)  # the final state is rarely used, and its gradient need not exist then
    ctx.save_for_backward(*tensors, output[2], resets)


def _autograd(ctx, dy, dfinal, dstarts, backward=_scan_backward):
    *tensors, starts, resets = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    *gradients, dinitial = backward(dy, dfinal, *tensors, starts, resets, *ctx.options)
    given = iter(gradients)
    gradients = [None if t is None else next(given) for t in tensors]
    dinitial = None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype)
    return *gradients, dinitial, None, None, None, None


_scan.register_autograd(_autograd, setup_context=_setup_context)
_direct = direct(_scan, _anywhere, _setup_context, partial(_autograd, backward=_backward_anywhere))


# What a stretch of a sequence adds to the state at its end, and to the adjoint at its start: sums over its steps,
# weighted with the decay between the step and that edge.


def _at_edge_in_torch(v, dt, A, m, resets, at_end):
    """The sum and the decay over all steps, (b, e, n): v, m are dt x, B at the end, and dy, C at the start."""
    dtype = v.dtype
    total, state = torch.zeros_like(dt[:, 0], dtype=torch.float64), v.new_zeros(v.shape[0], *A.shape)
    decay = torch.ones_like(state)  # between the edge and the next steps
    run = None if resets is None else resets.cumsum(1)
    for t0 in range(0, v.shape[1], STEPS)[:: -1 if at_end else 1]:
        part = slice(t0, t0 + STEPS)
        sums = dt[:, part].cumsum(1, dtype=torch.float64)
        reach = sums[:, -1:] - sums if at_end else sums
        weight = (reach.to(dtype)[..., None] * A.to(dtype)).exp()  # (b, q, e, n)
        if run is not None:  # only steps of the sequence at the edge
            weight = weight * (run[:, part] == (run[:, -1:] if at_end else 0))[..., None, None]
        m_part = m[:, part].to(dtype).repeat_interleave(v.shape[2] // m.shape[2], 2)
        state.addcmul_((v[:, part, :, None] * weight * m_part).sum(1), decay)
        total += sums[:, -1]
        decay = (total.to(dtype)[..., None] * A.to(dtype)).exp()
    return state, decay if resets is None else decay.masked_fill(resets.any(1)[:, None, None], 0.0)


def _at_edge(v, *others):
    compiled = _compiled() if v.device.type == "cpu" else None
    return (compiled.at_edge if compiled else _at_edge_in_torch)(v, *others)


def _forward_across(x, dt, A, B, C, D, z, dt_bias, initial_state, resets, softplus, low, high, enter):
    form = _gpu_form(x)
    if form is not None:
        return form.forward(x, dt, A, B, C, D, z, dt_bias, None, resets, softplus, low, high, enter)
    steps = step_size(dt, dt_bias, softplus, (low, high), _state_dtype(x))
    start = enter(*_at_edge(x.to(steps.dtype) * steps, steps, A, B, resets, True))
    return _forward(x, dt, A, B, C, D, z, dt_bias, start, resets, softplus, low, high)


def _backward_across(dy, _, x, dt, A, B, C, D, z, dt_bias, starts, resets, softplus, low, high, enter):
    form = _gpu_form(x)
    inputs = x, dt, A, B, C, D, z, dt_bias, starts, resets, softplus, low, high
    if form is not None:
        return form.backward(dy, None, *inputs, enter)
    steps = step_size(dt, dt_bias, softplus, (low, high), starts.dtype)
    before_gate = dy.to(steps.dtype) if z is None else dy * F.silu(z.to(steps.dtype))
    return _backward(dy, enter(_at_edge(before_gate, steps, A, C, resets, False)[0]), *inputs)


_across = across(_forward_across, _setup_context, _autograd, _backward_across, at=8)
