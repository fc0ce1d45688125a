"""State-space dual (SSD), the core of Mamba-2: a selective scan whose decay is one scalar per head and step.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T          h: (p, n) per head
    y[t] = h[t] C[t] + D x[t],   then y[t] * silu(z[t])

The same map has three forms (Dao and Gu, "Transformers are SSMs", 2024, sections 3 and 6): the recurrence above
(`ssd_linear`, the definition), a masked quadratic product (`ssd_quadratic`), and the chunked mixture of both that
`ssd` computes with matrix products. kernels/README.md derives the chunked form and its adjoint.

Letters: b batch, l length, h heads, p head size, g groups, r = h/g heads per group, n state size, c chunks, q steps
per chunk. Shapes: x, z (b, l, h, p); dt (b, l, h); A (h,); B, C (b, l, g, n); D (h,) or (h, p); dt_bias (h,);
states (b, h, p, n). States, and all sums, are float32 (float64 for float64 inputs).
"""

import math
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.kernels.across import Exchange, across
from seqmodels.kernels.direct import direct
from seqmodels.kernels.discretize import step_size, step_size_gradient
from seqmodels.kernels.dispatch import triton_form
from seqmodels.kernels.packing import starts_of_sequences
from seqmodels.kernels.split import room, take_all

# Chunks that one pass handles together: bounds the (q, q) matrices per pass, in elements; what fits the cache is
# fastest on a CPU, and a GPU wants enough work per launch.
_ELEMENTS_PER_PASS = {"cpu": 2**19, "cuda": 2**27}
_MAX_CHUNKS_PER_PASS = 64


def ssd(
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
    chunk_size: int = 64,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunked SSD: y (b, l, h, p) in x's dtype, and the final state (b, h, p, n).

    The state resets wherever `seq_idx` (b, l) changes; `initial_state` belongs to the first sequence of each row and
    the final state to the last. Linear in l in time and memory; differentiable in every tensor argument. With an
    `exchange` the arguments are one rank's stretch of the sequence, and both states the whole sequence's (across.py).
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    run = None if seq_idx is None else starts_of_sequences(seq_idx).cumsum(1, dtype=torch.int32)
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state, run, dt_softplus, *dt_limit, chunk_size)
    y, final_state = _direct(*inputs)[:2] if exchange is None else _across(exchange, *inputs)
    return y if z is None else (y * F.silu(z.to(_state_dtype(x)))).to(x.dtype), final_state


def ssd_linear(
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
    """The definition: the recurrence, one `ssd_step` after the other. Arguments and results as in `ssd`."""
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    state = _zero_state(x, B) if initial_state is None else initial_state.to(_state_dtype(x))
    starts = None if seq_idx is None else starts_of_sequences(seq_idx)
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None], 0.0, state)
        z_t = None if z is None else z[:, t]
        y, state = ssd_step(
            x[:, t], dt[:, t], A, B[:, t], C[:, t], D, z_t, dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
            state=state,
        )  # fmt: skip
        outputs.append(y)
    return torch.stack(outputs, 1), state


def ssd_quadratic(
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
    """The attention-like form y = (L o C B^T) (dt x): quadratic in l. Arguments and results as in `ssd`."""
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    dtype = _state_dtype(x)
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    per_group = x.shape[2] // B.shape[2]
    B, C = (t.to(dtype).repeat_interleave(per_group, 2) for t in (B, C))
    log_decay = (dt * A.to(dtype)).cumsum(1).transpose(1, 2)  # (b, h, l)
    visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    first = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if seq_idx is not None:
        run = starts_of_sequences(seq_idx).cumsum(1)
        visible = visible & (run[:, None, :, None] == run[:, None, None, :])
        first = run == 0
    decay = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~visible, -math.inf).exp()
    inputs = x.to(dtype) * dt[..., None]
    y = torch.einsum("bihn,bjhn,bhij,bjhp->bihp", C, B, decay, inputs)
    final_state = torch.einsum("bhj,bjhn,bjhp->bhpn", decay[:, :, -1], B, inputs)
    if initial_state is not None:
        carried = log_decay.exp() * first[:, None]  # (b, h, l)
        y = y + torch.einsum("bhi,bihn,bhpn->bihp", carried, C, initial_state.to(dtype))
        final_state = final_state + carried[:, :, -1, None, None] * initial_state.to(dtype)
    return _skip_and_gate(y, x, D, z).to(x.dtype), final_state


def ssd_step(
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
    """One step: x, z (b, h, p), dt (b, h), B, C (b, g, n), state (b, h, p, n) -> y (b, h, p), the new state."""
    dtype = state.dtype
    b, h, p, n = state.shape
    g = B.shape[1]
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    decay = (dt * A).exp()
    inputs = (x * dt[..., None]).to(dtype)
    # (b, g, r, p, n): a group's heads share B and C
    state = torch.addcmul(
        (state * decay[..., None, None]).view(b, g, h // g, p, n),
        inputs.view(b, g, h // g, p, 1),
        B.to(dtype).view(b, g, 1, 1, n),
    )
    y = torch.matmul(state.view(b, g, -1, n), C.to(dtype).unsqueeze(-1)).view(b, h, p)
    return _skip_and_gate(y, x, D, z).to(x.dtype), state.view(b, h, p, n)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _zero_state(x: Tensor, B: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=_state_dtype(x))


def _skip(y: Tensor, x: Tensor, D: Tensor) -> Tensor:
    return torch.addcmul(y, x.to(y.dtype), (D if D.dim() == 2 else D[:, None]).to(y.dtype))


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = _skip(y, x, D)
    return y if z is None else y * F.silu(z.to(y.dtype))


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None,
) -> None:  # fmt: skip
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (b, l, h, p) with l >= 1")
    b, l, h, p = x.shape
    if B.dim() != 4 or B.shape[:2] != (b, l) or h % B.shape[2]:
        raise ValueError(f"B has shape {tuple(B.shape)}; expected (b, l, g, n) = ({b}, {l}, g, n) with g dividing {h}")
    n = B.shape[3]
    wanted = {
        "dt": (dt, (b, l, h)), "A": (A, (h,)), "C": (C, tuple(B.shape)), "z": (z, (b, l, h, p)),
        "dt_bias": (dt_bias, (h,)), "initial_state": (initial_state, (b, h, p, n)), "seq_idx": (seq_idx, (b, l)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with x {(b, l, h, p)} it must be {shape}")
    if D is not None and tuple(D.shape) not in ((h,), (h, p)):
        raise ValueError(f"D has shape {tuple(D.shape)}; expected ({h},) or ({h}, {p})")


# The chunked form. One pass handles up to 64 chunks; passes are chained by the state, so that memory beyond the
# inputs and outputs is that of one pass. Layouts inside a pass: 'wide' (b, c, g, q, r, p) folds a group's heads beside
# B and C, 'head' (b, c, g, r, q, p) is what the (q, q) products want.


def _chunks_per_pass(x: Tensor, chunk_size: int) -> int:
    budget = _ELEMENTS_PER_PASS["cpu" if x.device.type == "cpu" else "cuda"]
    return max(1, min(_MAX_CHUNKS_PER_PASS, budget // (x.shape[0] * x.shape[2] * chunk_size**2)))


def _number_of_passes(x: Tensor, chunk_size: int) -> int:
    return -(-x.shape[1] // (chunk_size * _chunks_per_pass(x, chunk_size)))


def _slice_pass(tensor: Tensor, index: int, chunks: int, q: int, *, repeat_last: bool = False) -> Tensor:
    """Steps of pass `index` as (b, c, q, ...), the last pass padded to whole chunks (with zeros, or its last item)."""
    part = tensor[:, index * chunks * q : (index + 1) * chunks * q]
    if missing := -part.shape[1] % q:
        tail = part[:, -1:].expand(-1, missing, *part.shape[2:])
        part = torch.cat([part, tail if repeat_last else torch.zeros_like(tail)], 1)
    return part.reshape(part.shape[0], -1, q, *part.shape[2:])


class _Pass:
    """What forward and backward of one pass share: decays, the masked matrix M, and the states between chunks."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, run: Tensor | None, before: Tensor | None,
        start: Tensor,
    ) -> None:  # fmt: skip
        b, c, q, h, p = x.shape
        g, n = B.shape[3:]
        self.shape = (b, c, q, g, h // g, p, n)
        self.dt = dt.view(b, c, q, g, -1).transpose(2, 3)  # (b, c, g, q, r)
        self.x = x.view(b, c, q, g, -1, p).transpose(2, 3)  # wide
        self.inputs = self.x * self.dt[..., None]  # wide
        self.B, self.C = B.transpose(2, 3).contiguous(), C.transpose(2, 3).contiguous()  # (b, c, g, q, n)
        # summed in float64: what counts are small differences of sums that grow with q
        log_decay = (self.dt * A.view(g, 1, -1)).cumsum(3, dtype=torch.float64)
        by_head = log_decay.transpose(3, 4)  # (b, c, g, r, q)
        visible = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
        self.inflow = log_decay.to(x.dtype).exp()  # decay from the chunk's start to each step, (b, c, g, q, r)
        self.outflow = (log_decay[:, :, :, -1:] - log_decay).to(x.dtype).exp()  # and from each step to the chunk's end
        chunk_decay = by_head[..., -1].flatten(2).cumsum(1)  # (b, c, h), summed over chunks
        chunk_decay = F.pad(chunk_decay, (0, 0, 1, 0)).transpose(1, 2)  # (b, h, c + 1), 0 at the pass's start
        boundary_visible = torch.ones(c + 1, c + 1, dtype=torch.bool, device=x.device).tril()
        if run is not None and before is not None:
            visible = visible & (run[:, :, None, None, :, None] == run[:, :, None, None, None, :])
            ends = torch.cat([before[:, None], run[:, :, -1]], 1)  # the run that each boundary's state belongs to
            self.inflow = self.inflow * (run == ends[:, :-1, None])[:, :, None, :, None]
            self.outflow = self.outflow * (run == ends[:, 1:, None])[:, :, None, :, None]
            boundary_visible = boundary_visible & (ends[:, None, :, None] == ends[:, None, None, :])
        self.decay = (by_head[..., :, None] - by_head[..., None, :]).to(x.dtype)
        self.decay.masked_fill_(~visible, -math.inf).exp_()
        self.scores = torch.matmul(self.C, self.B.transpose(-1, -2))[:, :, :, None]  # (b, c, g, 1, q, q)
        self.matrix = self.decay * self.scores
        # decay between any two chunk boundaries, (b, h, c + 1, c + 1)
        self.passing = (chunk_decay[..., :, None] - chunk_decay[..., None, :]).to(x.dtype)
        self.passing.masked_fill_(~boundary_visible, -math.inf).exp_()
        local = torch.matmul((self.inputs * self.outflow[..., None]).flatten(4).transpose(-1, -2), self.B)
        states = torch.cat([start[:, None], local.view(b, c, h, p, n)], 1)  # (b, c + 1, h, p, n)
        self.states = self._pass_states(self.passing, states)

    @staticmethod
    def _pass_states(passing: Tensor, states: Tensor) -> Tensor:
        b, c, h, p, n = states.shape
        return torch.matmul(passing, states.transpose(1, 2).flatten(3)).view(b, h, c, p, n).transpose(1, 2)

    def _grouped(self, states: Tensor) -> Tensor:
        """States (b, c, h, p, n) as (b, c, g, r p, n)."""
        b, c, _, g, r, p, n = self.shape
        return states.reshape(b, c, g, r * p, n)

    def from_states(self) -> Tensor:
        """What the chunks' start states add to the output, wide."""
        b, c, q, g, r, p, _ = self.shape
        carried = torch.matmul(self.C, self._grouped(self.states[:, :-1]).transpose(-1, -2))
        return carried.view(b, c, g, q, r, p) * self.inflow[..., None]

    def output(self) -> Tensor:
        """y of this pass, (b, c q, h, p)."""
        b, c, q, g, r, p, _ = self.shape
        y = torch.matmul(self.matrix, self.inputs.transpose(3, 4)).transpose(3, 4) + self.from_states()
        return y.transpose(2, 3).reshape(b, c * q, g * r, p)

    def backward(self, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients (dx, dlog_decay, ddt through the inputs, dB, dC) of this pass and of its start state.

        dy: (b, c, q, h, p), dfinal: (b, h, p, n). Returns dx (b, c, q, h, p), d(dt A) and direct ddt (b, c, q, h),
        dB and dC (b, c, q, g, n); the start state's gradient is left in `self.dstart`.
        """
        b, c, q, g, r, p, n = self.shape
        dy = dy.view(b, c, q, g, r, p).transpose(2, 3)  # wide
        dy_head, inputs_head = dy.transpose(3, 4).contiguous(), self.inputs.transpose(3, 4).contiguous()
        # between chunks
        weighted = (dy * self.inflow[..., None]).flatten(4)  # (b, c, g, q, r p)
        dstates = torch.matmul(weighted.transpose(-1, -2), self.C).view(b, c, g * r, p, n)
        dstates = self._pass_states(self.passing.transpose(-1, -2), torch.cat([dstates, dfinal[:, None]], 1))
        self.dstart, dends = dstates[:, 0], dstates[:, 1:]  # of the pass's start, of each chunk's end
        dC = torch.matmul(weighted, self._grouped(self.states[:, :-1]))
        dB = torch.matmul((self.inputs * self.outflow[..., None]).flatten(4), self._grouped(dends))
        to_end = torch.matmul(self.B, self._grouped(dends).transpose(-1, -2)).view(b, c, g, q, r, p)
        to_end = to_end * self.outflow[..., None]
        # d(log decay) is a small difference of large sums: its terms are added in float64, where equal ones cancel
        leaving = (self.inputs * to_end).sum(-1).double()  # (b, c, g, q, r)
        dlog = (dy * self.from_states()).sum(-1) - leaving
        chunk_decay = (self.inflow[:, :, :, -1]).reshape(b, c, g * r)  # zero where the chunk holds a reset
        through = (self.states[:, :-1] * dends).sum((-1, -2)) * chunk_decay
        dlog[:, :, :, -1] += leaving.sum(3) + through.view(b, c, g, r)
        # within chunks
        dmatrix = torch.matmul(dy_head, inputs_head.transpose(-1, -2))  # (b, c, g, r, q, q)
        dinputs = torch.matmul(self.matrix.transpose(-1, -2), dy_head).transpose(3, 4) + to_end
        dscores = (dmatrix * self.decay).sum(3)
        dC = dC + torch.matmul(dscores, self.B)
        dB = dB + torch.matmul(dscores.transpose(-1, -2), self.C)
        products = dmatrix.mul_(self.matrix)
        both = products.sum(-1, dtype=torch.float64) - products.sum(-2, dtype=torch.float64)
        dlog = (dlog + both.transpose(3, 4)).flip(3).cumsum(3).flip(3).to(dy.dtype)
        ddt = (dinputs * self.x).sum(-1)
        dx = dinputs * self.dt[..., None]
        return (
            dx.transpose(2, 3).reshape(b, c, q, g * r, p),
            dlog.transpose(2, 3).reshape(b, c, q, g * r),
            ddt.transpose(2, 3).reshape(b, c, q, g * r),
            dB.transpose(2, 3),
            dC.transpose(2, 3),
        )


def _passes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, run: Tensor | None, q: int, i: int, start: Tensor):
    """Pass number i of the chunked form, with its start state."""
    chunks, dtype = _chunks_per_pass(x, q), _state_dtype(x)
    part = [_slice_pass(t, i, chunks, q).to(dtype) for t in (x, dt, B, C)]
    before = None if run is None else run[:, max(i * chunks * q - 1, 0)]
    run = None if run is None else _slice_pass(run, i, chunks, q, repeat_last=True)
    return _Pass(part[0], part[1], A.to(dtype), part[2], part[3], run, before, start)


def _forward_in_torch(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, run: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (b, l, h, p), final state, and each pass's start state (passes, b, h, p, n). run: (b, l) from 0, or None."""
    dt = step_size(dt, dt_bias, dt_softplus, (dt_min, dt_max), _state_dtype(x))
    state = _zero_state(x, B) if initial_state is None else initial_state.to(_state_dtype(x))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    starts = state.new_empty(_number_of_passes(x, chunk_size), *state.shape)
    steps = chunk_size * _chunks_per_pass(x, chunk_size)
    for i in range(len(starts)):
        starts[i] = state
        one = _passes(x, dt, A, B, C, run, chunk_size, i, state)
        rows = y[:, i * steps : (i + 1) * steps]
        part = one.output()[:, : rows.shape[1]]
        rows.copy_(part if D is None else _skip(part, x[:, i * steps : (i + 1) * steps], D))
        state = one.states[:, -1]
    return y, state.clone(), starts


_ssd = torch.library.custom_op("longseq::ssd", _forward_in_torch, mutates_args=())


def _gpu_form(x: Tensor, B: Tensor) -> ModuleType | None:
    """The Triton form on a GPU, except in float32 with n > 128: where sums of so many products cost dA a digit."""
    return None if x.dtype == torch.float32 and B.shape[-1] > 128 else triton_form("ssd", x)


@_ssd.register_kernel("cuda")
def _anywhere(x, *others):
    form = _gpu_form(x, others[2])
    return _forward_in_torch(x, *others) if form is None else form.forward(x, *others[:-1])  # it has chunks of its own


@_ssd.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial_state, run, dt_softplus, dt_min, dt_max, chunk_size):
    state = torch.empty_like(_zero_state(x, B))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    form = _gpu_form(x, B)
    if form is not None:
        return y, state, state.new_empty(form.shape_of_starts(x, B))
    return y, state, state.new_empty(_number_of_passes(x, chunk_size), *state.shape)


def _backward_in_torch(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, starts: Tensor, run: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D (empty without one), dt_bias (per head, also without one), the initial state.

    The chunks are recomputed from each pass's start state.
    """
    dtype = _state_dtype(x)
    raw, dt = dt, step_size(dt, dt_bias, dt_softplus, (dt_min, dt_max), dtype)
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    dA = torch.zeros(A.shape, dtype=dtype, device=A.device)
    dD = torch.zeros((0,) if D is None else D.shape, dtype=dtype, device=x.device)
    dstate = _zero_state(x, B) if dfinal is None else dfinal.to(dtype)
    chunks = _chunks_per_pass(x, chunk_size)
    steps = chunks * chunk_size
    for i in reversed(range(len(starts))):
        one = _passes(x, dt, A, B, C, run, chunk_size, i, starts[i])
        dy_part = _slice_pass(dy, i, chunks, chunk_size).to(dtype)
        dx_part, dlog, ddt_part, dB_part, dC_part = one.backward(dy_part, dstate)
        if D is not None:
            products = dy_part * _slice_pass(x, i, chunks, chunk_size).to(dtype)
            products = products.sum(2) if D.dim() == 2 else products.sum(4).sum(2)  # in parts: a long sum loses digits
            dD += products.sum((0, 1))
            dx_part = _skip(dx_part, dy_part, D)
        dt_part = _slice_pass(dt, i, chunks, chunk_size).to(dtype)
        ddt_part = ddt_part + dlog * A.to(dtype)
        dA += (dlog * dt_part).sum((0, 1, 2))
        for whole, part in ((dx, dx_part), (ddt, ddt_part), (dB, dB_part), (dC, dC_part)):
            rows = whole[:, i * steps : (i + 1) * steps]
            rows.copy_(part.flatten(1, 2)[:, : rows.shape[1]])
        dstate = one.dstart
    ddt = step_size_gradient(ddt, raw, dt_bias, dt_softplus, (dt_min, dt_max))
    return dx, ddt.to(raw.dtype), dA.to(A.dtype), dB, dC, dD, ddt.sum((0, 1)), dstate.clone()


_ssd_backward = torch.library.custom_op("longseq::ssd_backward", _backward_in_torch, mutates_args=())


@_ssd_backward.register_kernel("cuda")
def _backward_anywhere(dy, dfinal, x, *others, places=(None, None, None)):
    form = _gpu_form(x, others[2])
    if form is None:
        return _backward_in_torch(dy, dfinal, x, *others)
    return form.backward(dy, dfinal, x, *others[:-1], None, *take_all(places))


@_ssd_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, dt_bias, starts, run, dt_softplus, dt_min, dt_max, chunk_size):
    dx, ddt, dA, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, A, B, C))
    dD = torch.empty((0,) if D is None else D.shape, dtype=_state_dtype(x), device=x.device)
    ddt_bias = torch.empty(A.shape, dtype=_state_dtype(x), device=x.device)
    return dx, ddt, dA, dB, dC, dD, ddt_bias, torch.empty_like(_zero_state(x, B))


def _setup_context(ctx, inputs, output):
    x, dt, A, B, C, D, dt_bias, initial_state, run, *ctx.options = inputs
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.places = {"places": (room(x), room(B), room(C))}
    ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, output[2], run)
    ctx.set_materialize_grads(False)  # a final state that nobody uses has no gradient to add


def _backward(ctx, dy, dfinal, dstarts, backward=_ssd_backward):
    x, dt, A, B, C, D, dt_bias, starts, run = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddt, dA, dB, dC, dD, ddt_bias, dstate = backward(
        dy, dfinal, x, dt, A, B, C, D, dt_bias, starts, run, *ctx.options,
        **({} if backward is _ssd_backward else ctx.places),
    )  # fmt: skip
    return (
        dx, ddt, dA, dB, dC, None if D is None else dD.to(D.dtype),
        None if dt_bias is None else ddt_bias.to(dt_bias.dtype),
        None if ctx.state_dtype is None else dstate.to(ctx.state_dtype), None, None, None, None, None,
    )  # fmt: skip


_ssd.register_autograd(_backward, setup_context=_setup_context)
_direct = direct(_ssd, _anywhere, _setup_context, partial(_backward, backward=_backward_anywhere))


# What a stretch of a sequence adds to the state at its end, and to the adjoint at its start: sums over its steps,
# weighted with the decay between the step and that edge, as far from the edge as the decay is not 0.


def _at_edge(v: Tensor, m: Tensor, decay: Tensor, steps: Tensor | None) -> Tensor:
    """sum_t decay[t] (steps[t]) v[t] m[t]^T, (b, h, p, n), from v (b, l, h, p), m (b, l, g, n), decay, steps (b, l, h).

    With steps the edge is the last one, else the first.
    """
    (b, l, h, p), (g, n), q = v.shape, m.shape[2:], 64  # steps per product: a long sum loses digits
    chunks = max(1, _ELEMENTS_PER_PASS["cpu" if v.device.type == "cpu" else "cuda"] // (b * h * p * q))
    state = decay.new_zeros(b, g, h // g * p, n)
    passes = range(-(-l // (q * chunks)))
    for i in passes if steps is None else reversed(passes):
        weight = _slice_pass(decay, i, chunks, q)  # (b, c, q, h)
        if not bool(weight.any()):
            break
        weight = weight if steps is None else weight * _slice_pass(steps, i, chunks, q)
        weighted = (_slice_pass(v, i, chunks, q).to(decay.dtype) * weight[..., None]).unflatten(3, (g, -1)).flatten(4)
        columns = _slice_pass(m, i, chunks, q).to(decay.dtype).transpose(2, 3)  # (b, c, g, q, n)
        state += torch.matmul(weighted.permute(0, 1, 3, 4, 2), columns).sum(1)
    return state.view(b, h, p, n)


def _forward_across(x, dt, A, B, C, D, dt_bias, initial_state, run, softplus, low, high, chunk_size, enter):
    form = _gpu_form(x, B)
    if form is not None:
        return form.forward(x, dt, A, B, C, D, dt_bias, _zero_state(x, B), run, softplus, low, high, enter)
    dtype = _state_dtype(x)
    steps = step_size(dt, dt_bias, softplus, (low, high), dtype)
    sums = (steps * A.to(dtype)).cumsum(1, dtype=torch.float64)
    decay, whole = (sums[:, -1:] - sums).to(dtype).exp(), sums[:, -1].to(dtype).exp()
    if run is not None:
        decay, whole = decay * (run == run[:, -1:])[..., None], whole * (run[:, -1:] == 0)
    start = enter(_at_edge(x, B, decay, steps), whole)
    return _forward_in_torch(x, dt, A, B, C, D, dt_bias, start, run, softplus, low, high, chunk_size)


def _backward_across(dy, _, x, dt, A, B, C, D, dt_bias, starts, run, softplus, low, high, chunk_size, enter, places):
    form = _gpu_form(x, B)
    inputs = x, dt, A, B, C, D, dt_bias, starts, run, softplus, low, high
    if form is not None:
        return form.backward(dy, _zero_state(x, B), *inputs, enter, *take_all(places))
    dtype = _state_dtype(x)
    decay = (step_size(dt, dt_bias, softplus, (low, high), dtype) * A.to(dtype)).cumsum(1, dtype=torch.float64)
    decay = decay.to(dtype).exp()
    dfinal = enter(_at_edge(dy, C, decay if run is None else decay * (run == 0)[..., None], None))
    return _backward_in_torch(dy, dfinal, *inputs, chunk_size)


_across = across(_forward_across, _setup_context, _backward, _backward_across, at=7)
