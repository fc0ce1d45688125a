"""S4D: a diagonal state-space model that is the same at every step (linear and time-invariant), complex or real.

    h[t] = dA h[t-1] + dB x[t]                 h: n numbers per channel
    y[t] = Re(C h[t]) + D x[t]                 of complex states: those of conjugate pairs, so twice their real part

(Gu, Gupta, Goel and Re, "On the Parameterization and Initialization of Diagonal State Space Models", 2022). dA and dB
come from a continuous A by zero-order hold or the bilinear rule (discretize.py). `s4d_linear` is the definition.

As nothing depends on the step, y is the causal convolution of x with K[t] = Re(C dA^t dB). `s4d` takes it in chunks of
q steps, so that time and memory are linear in the length:

    within a chunk   y[t] = sum_j K[t-j] x[j]                          by FFT of 2 q points
    from before it   y[t] += Re(C dA^(t+1) h)                          h: the state where the chunk begins
    of the chunk     s = sum_j dA^(q-1-j) dB x[j],  h' = dA^q h + s    a scan over chunks, by doubling

All three use the powers dA^0 ... dA^q, made by repeated products, which hold for any dA, negative ones too. Packed
sequences: a chunk in which sequences begin is convolved once for each of its sequences, all others set to zero.

Letters: b batch, l length, e channels, n numbers of state per channel (half the state's size if complex), c chunks,
q steps per chunk. Shapes: x, y (b, l, e); dA, dB, C (e, n), all complex or all real; D (e,); states (b, e, n). Sums are
float32 (float64 for float64 inputs).
"""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.kernels.packing import starts_of_sequences

CHUNK = 1024


def _exact(op: Callable) -> Callable:
    """The op without autocast, which would take its products in fewer digits."""

    @wraps(op)
    def run(x: Tensor, *args: Tensor | None, **options: Tensor | int | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *args, **options)

    return run


@_exact
def s4d(
    x: Tensor,
    dA: Tensor,
    dB: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """y (b, l, e) in x's dtype, and the state (b, e, n) after the last of `lengths` (b,) real steps (None: all).

    The state resets wherever `seq_idx` (b, l) changes; `initial_state` belongs to the first sequence of each row and
    the final state to that of the last real step. Differentiable in every tensor argument.
    """
    b, l, e = x.shape
    q = min(chunk_size, 1 << (l - 1).bit_length())
    c = -(-l // q)
    wide = _wide(x)
    padded = F.pad(wide, (0, 0, 0, c * q - l))
    chunks = padded.unflatten(1, (c, q)).permute(3, 0, 1, 2).flatten(1, 2)  # (e, b c, q)
    first = last = None  # (b, c) bool: whether the state before a chunk meets it, and goes through it; None means yes
    pieces, of, run = chunks, None, None
    if seq_idx is not None:
        starts = F.pad(starts_of_sequences(seq_idx), (0, c * q - l)).unflatten(1, (c, q))
        run = starts.cumsum(2)  # (b, c, q), from 0 or, where a chunk begins with a new sequence, from 1
        first, last = run == 0, run[..., -1] == 0
        pieces, of, shown = _pieces(chunks, run.flatten(0, 1))
    powers = _powers(dA, q)  # (e, n, q + 1)
    kernel = torch.einsum("em,emq->eq", _read(C * dB), _parts(powers[..., :q], 1))
    y = torch.fft.irfft(torch.fft.rfft(pieces, 2 * q) * torch.fft.rfft(kernel, 2 * q)[:, None], 2 * q)[..., :q]
    if of is not None:
        y = torch.zeros_like(chunks).index_add(1, of, y * shown)
    into = _parts(dB[..., None] * powers[..., :q].flip(-1), 1).mT  # (e, q, m): to the state at a chunk's end
    state = torch.zeros(b, e, dA.shape[1], dtype=dA.dtype, device=x.device)
    state = state if initial_state is None else initial_state.to(dA.dtype)
    before = state[:, None]  # (b, c, e, n): the state where each chunk begins
    if c > 1:
        inputs = chunks if run is None else chunks * (run == run[..., -1:]).flatten(0, 1)
        own = _whole(inputs.unflatten(1, (b, c))[:, :, :-1].flatten(1, 2) @ into, dA)  # (e, b (c - 1), n)
        own = own.unflatten(1, (b, c - 1)).permute(1, 2, 0, 3)
        before = _scan(torch.cat([before, own], 1), powers[..., q], None if last is None else last[:, :-1])
    if initial_state is not None or c > 1:
        out = _read(C[..., None] * powers[..., 1:])  # (e, m, q)
        from_before = _parts(before, -1).permute(2, 0, 1, 3).flatten(1, 2) @ out
        y = y + (from_before if first is None else from_before * first.flatten(0, 1))
    y = y.unflatten(1, (b, c)).permute(1, 2, 3, 0).flatten(1, 2)[:, :l]
    y = y if D is None else y + D.to(y.dtype) * wide
    return y.to(x.dtype), _final_state(padded, dA, powers, into, before, lengths, run, l)


def s4d_linear(
    x: Tensor,
    dA: Tensor,
    dB: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: the recurrence, one `s4d_step` after the other. Arguments and results as in `s4d`."""
    state = x.new_zeros(len(x), *dA.shape, dtype=dA.dtype) if initial_state is None else initial_state
    starts = None if seq_idx is None else starts_of_sequences(seq_idx)
    outputs = []
    for t in range(x.shape[1]):
        before = state if starts is None else torch.where(starts[:, t, None, None], 0, state)
        y, after = s4d_step(x[:, t], dA, dB, C, D, state=before)
        state = after if lengths is None else torch.where((t < lengths)[:, None, None], after, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


@_exact
def s4d_step(
    x: Tensor, dA: Tensor, dB: Tensor, C: Tensor, D: Tensor | None = None, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: x (b, e) -> y (b, e) in x's dtype, and the new state (b, e, n)."""
    wide = _wide(x)
    state = dA * state + dB * wide[..., None]
    y = torch.einsum("em,bem->be", _read(C), _parts(state, -1))
    return (y if D is None else y + D.to(y.dtype) * wide).to(x.dtype), state


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _parts(z: Tensor, dim: int) -> Tensor:
    """Real and imaginary parts side by side along the dimension of n numbers, which then has m = 2 n (real: n)."""
    return torch.cat([z.real, z.imag], dim) if z.is_complex() else z


def _read(C: Tensor) -> Tensor:
    """(e, n, ...) -> (e, m, ...) that, times `_parts` of a state and summed, gives what is read of it: Re(C h), twice
    for a pair of conjugates."""
    return torch.cat([2 * C.real, -2 * C.imag], 1) if C.is_complex() else C


def _whole(parts: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_parts` along the last dimension."""
    return torch.complex(*parts.chunk(2, -1)) if like.is_complex() else parts


def _powers(dA: Tensor, q: int) -> Tensor:
    """dA^0 ... dA^q, (e, n, q + 1), by doubling."""
    powers, top = torch.ones_like(dA)[..., None], dA[..., None]
    while powers.shape[-1] < q + 1:
        powers = torch.cat([powers, powers * top], -1)
        top = top * top
    return powers[..., : q + 1]


def _scan(states: Tensor, factor: Tensor, goes_on: Tensor | None) -> Tensor:
    """h[0] = states[0], h[i] = factor h[i-1] + states[i] along dimension 1 of states (b, c, e, n); factor (e, n).

    With goes_on (b, c - 1) bool, h[i-1] counts only where it is true.
    """
    gate = None if goes_on is None else F.pad(goes_on, (1, 0))[..., None, None].to(factor.real.dtype)
    distance = 1
    while distance < states.shape[1]:
        back = states[:, :-distance] * factor
        if gate is not None:
            back = back * gate[:, distance:]
            gate = torch.cat([gate[:, :distance], gate[:, distance:] * gate[:, :-distance]], 1)
        states = torch.cat([states[:, :distance], states[:, distance:] + back], 1)
        factor, distance = factor * factor, 2 * distance
    return states


def _pieces(chunks: Tensor, run: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks (e, b c, q) once for each of their sequences, all else zero; which chunk each is of, and what is shown.

    run (b c, q) tells the sequences of a chunk apart, from 0 or 1 on. Shapes: (e, pieces, q), (pieces,), (pieces, q).
    """
    low, high = run[:, 0], run[:, -1]
    counts = high - low + 1
    of = torch.repeat_interleave(torch.arange(len(run), device=run.device), counts)
    within = torch.arange(len(of), device=run.device) - (counts.cumsum(0) - counts)[of]
    shown = run[of] == (low[of] + within)[:, None]
    return chunks[:, of] * shown, of, shown


def _final_state(
    x: Tensor, dA: Tensor, powers: Tensor, into: Tensor, before: Tensor, lengths: Tensor | None, run: Tensor | None,
    l: int,
) -> Tensor:  # fmt: skip
    """The state (b, e, n) after the last real step, of padded x (b, c q, e).

    Its chunk's real steps, moved to the chunk's end, meet the same powers `into` as in a full chunk.
    """
    b, q = len(x), into.shape[1]
    rows = torch.arange(b, device=x.device)
    lengths = torch.full((b,), l, device=x.device) if lengths is None else lengths
    chunk = (lengths - 1).clamp(min=0) // q  # (b,): the last real step's
    steps = lengths - chunk * q  # (b,) real steps of that chunk, 1 ... q, or 0 of an empty row
    at = torch.arange(q, device=x.device) - (q - steps)[:, None]  # (b, q): places in the chunk, before it below 0
    counts, reaches = at >= 0, None
    if run is not None:
        own = run[rows, chunk]  # (b, q)
        final = own.gather(1, (steps - 1).clamp(min=0)[:, None])
        counts, reaches = counts & (own.gather(1, at.clamp(min=0)) == final), final == 0
    places = (chunk * q)[:, None] + at.clamp(min=0)
    moved = x.gather(1, places[..., None].expand(-1, -1, x.shape[2])) * counts[..., None]
    carried = before[rows, chunk] * powers[..., steps].permute(2, 0, 1)
    carried = carried if reaches is None else carried * reaches[..., None]
    return carried + _whole(moved.permute(2, 0, 1) @ into, dA).transpose(0, 1)
