"""Triton form of the causal convolution for GPUs. causal_conv1d.py says what it computes; letters are the same.

Both directions walk down the rows. A program takes a block of channels of STRETCHES stretches of steps, over all
sequences of the batch, and goes through them side by side; the last k-1 inputs stay in registers, so that x is read
once, and the backward pass also keeps the k-1 unfinished rows of dx. A stretch reads k-1 rows more at each end.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.kernels.launch import Launch, planned


@triton.jit
def _sigmoid(s):
    """1 / (1 + exp(-s)): the square of a reciprocal root takes two instructions, a division five."""
    root = tl.rsqrt(1.0 + tl.exp2(s * -1.4426950408889634))
    return root * root


@triton.jit
def _stretches(b, l, steps, D: tl.constexpr, STRETCHES: tl.constexpr, BLOCK: tl.constexpr):
    """Of the program's stretches: sequence, first step and the sequence's length; and its channels."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    per_sequence = (l + steps - 1) // steps
    stretch = tl.program_id(0) // blocks * STRETCHES + tl.arange(0, STRETCHES)
    batch = stretch // per_sequence
    start = stretch % per_sequence * steps
    limit = tl.where(batch < b, l, 0)  # beyond the batch nothing is read or written
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return tl.minimum(batch, b - 1).to(tl.int64), start, limit, channel[None, :]


@triton.jit
def _rows(rows_ptr, first, left, inside, distance, COUNT: tl.constexpr):
    """Rows from `first` >= 0 on of every stretch, each (STRETCHES, BLOCK), zero beyond the end."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows += (tl.load(rows_ptr, mask=(first + i < left)[:, None] & inside, other=0.0),)
        rows_ptr += distance
    return rows


@triton.jit
def _row_at(x_ptr, initial_ptr, t, limit, batch, distance, channel, K: tl.constexpr, D: tl.constexpr):
    """Rows t, one per stretch: x's or the initial state's, zero elsewhere. x_ptr points to the sequences' first row."""
    inside = channel < D
    mask = ((t >= 0) & (t < limit))[:, None] & inside
    value = tl.load(x_ptr + (t * distance)[:, None], mask=mask, other=0.0).to(tl.float32)
    if initial_ptr is not None:
        offset = ((batch * (K - 1) + t + K - 1) * D)[:, None] + channel
        value += tl.load(initial_ptr + offset, mask=(t < 0)[:, None] & inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _run(run_ptr, t, l, batch):
    """Numbers of the steps' sequences; steps before the first belong to number 0."""
    return tl.load(run_ptr + batch * l + t, mask=(t >= 0) & (t < l), other=0)


@triton.jit
def _window(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, run_ptr, start, limit, l, batch, distance, channel,
    K: tl.constexpr, D: tl.constexpr, STRETCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Taps and bias, and of the k-1 steps before the stretches the inputs and their sequences' numbers."""
    bias = tl.zeros([STRETCHES, BLOCK], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
    taps, past, runs = (), (), ()
    for j in tl.static_range(K):
        taps += (tl.load(weight_ptr + channel * K + j, mask=channel < D, other=0.0).to(tl.float32),)
    for i in tl.static_range(1, K):
        past += (_row_at(x_ptr, initial_ptr, start + i - K, limit, batch, distance, channel, K, D),)
        if run_ptr is not None:
            runs += (_run(run_ptr, start + i - K, l, batch),)
    return taps, bias, past, runs


@triton.jit(do_not_specialize=["b", "l", "x_b", "x_l", "steps"])
def _forward(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, run_ptr, y_ptr, final_ptr, b, l, x_b, x_l, steps,
    D: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr,
    STRETCHES: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    batch, start, limit, channel = _stretches(b, l, steps, D, STRETCHES, BLOCK)
    inside, own, x_l = channel < D, tl.minimum(limit - start, steps), tl.cast(x_l, tl.int64) * UNIT
    first_ptr = x_ptr + (batch * x_b * UNIT)[:, None] + channel
    x_ptr = first_ptr + (start * x_l)[:, None]
    y_ptr += ((batch * l + start) * D)[:, None] + channel
    taps, bias, past, runs = _window(
        first_ptr, weight_ptr, bias_ptr, initial_ptr, run_ptr, start, limit, l, batch, x_l, channel, K, D, STRETCHES,
        BLOCK,
    )  # fmt: skip
    for first in range(0, steps, UNROLL):
        rows = _rows(x_ptr, first, own, inside, x_l, UNROLL)
        x_ptr += UNROLL * x_l
        for i in tl.static_range(UNROLL):
            window = past
            window += (rows[i].to(tl.float32),)
            if run_ptr is not None:
                numbers = runs
                numbers += (_run(run_ptr, start + first + i, l, batch),)
            total = bias
            for j in tl.static_range(K):
                value = window[j]
                if run_ptr is not None:
                    value = tl.where((numbers[j] == numbers[K - 1])[:, None], value, 0.0)
                total += taps[j] * value
            past = window[1:]
            if run_ptr is not None:
                runs = numbers[1:]
            if SILU:
                total *= _sigmoid(total)
            tl.store(y_ptr, total.to(y_ptr.dtype.element_ty), mask=(first + i < own)[:, None] & inside)
            y_ptr += D

    last = (own > 0) & (start + own == l)  # the stretch with the sequence's last step writes the final state
    for m in tl.static_range(K - 1):
        t = tl.zeros_like(start) + l - (K - 1) + m
        value = _row_at(first_ptr, initial_ptr, t, limit, batch, x_l, channel, K, D)
        if run_ptr is not None:
            same = _run(run_ptr, t, l, batch) == _run(run_ptr, tl.zeros_like(t) + l - 1, l, batch)
            value = tl.where(same[:, None], value, 0.0)
        offset = ((batch * (K - 1) + m) * D)[:, None] + channel
        tl.store(final_ptr + offset, value.to(final_ptr.dtype.element_ty), mask=last[:, None] & inside)


@triton.jit
def _walk(
    rows, gradients, run_ptr, dfinal_ptr, dx_ptr, dinitial_ptr, first, start, left, own, l, dx_l, batch, channel,
    taps, bias, past, unfinished, runs, dtaps, dbias, OWN: tl.constexpr, STEPS: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """STEPS steps of the backward pass, from the stretches' step `first` on.

    If not OWN, without their part of the gradients of weight and bias.
    """
    inside = channel < D
    for i in tl.static_range(STEPS):
        window, dsum = past, gradients[i].to(tl.float32)
        window += (rows[i].to(tl.float32),)
        if run_ptr is not None:
            numbers = runs
            numbers += (_run(run_ptr, start + first + i, l, batch),)
        seen, total = (), bias
        for j in tl.static_range(K):
            value = window[j]
            if run_ptr is not None:
                value = tl.where((numbers[j] == numbers[K - 1])[:, None], value, 0.0)
            seen += (value,)
            total += taps[j] * value
        if SILU:
            sigmoid = _sigmoid(total)
            dsum *= sigmoid * (1.0 + total * (1.0 - sigmoid))
        if OWN:
            dbias += dsum
            added = ()
            for j in tl.static_range(K):
                added += (dtaps[j] + dsum * seen[j],)
            dtaps = added
        due = ()
        for j in tl.static_range(K):
            part = taps[j] * dsum
            if j < K - 1:
                if run_ptr is not None:
                    part = tl.where((numbers[j] == numbers[K - 1])[:, None], part, 0.0)
                part += unfinished[j]
            due += (part,)
        past, unfinished = window[1:], due[1:]
        if run_ptr is not None:
            runs = numbers[1:]

        r = first + i - (K - 1)  # the row of dx that this step finishes
        t = start + r
        done = due[0]
        if dfinal_ptr is not None:
            given = (t >= l - (K - 1)) & (r < left)
            if run_ptr is not None:
                given &= _run(run_ptr, t, l, batch) == _run(run_ptr, tl.zeros_like(t) + l - 1, l, batch)
            offset = ((batch * (K - 1) + t - l + K - 1) * D)[:, None] + channel
            done += tl.load(dfinal_ptr + offset, mask=given[:, None] & inside, other=0.0).to(tl.float32)
        mask = ((r >= 0) & (r < own))[:, None] & inside
        tl.store(dx_ptr, done.to(dx_ptr.dtype.element_ty), mask=mask)
        dx_ptr += dx_l
        if dinitial_ptr is not None:
            offset = ((batch * (K - 1) + t + K - 1) * D)[:, None] + channel
            tl.store(dinitial_ptr + offset, done, mask=((t < 0) & (left > 0))[:, None] & inside)
    return dx_ptr, past, unfinished, runs, dtaps, dbias


@triton.jit(do_not_specialize=["b", "l", "x_b", "x_l", "dy_b", "dy_l", "dx_b", "dx_l", "steps"])
def _backward(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, run_ptr, dy_ptr, dfinal_ptr, dx_ptr, dinitial_ptr, parts_ptr,
    b, l, x_b, x_l, dy_b, dy_l, dx_b, dx_l, steps,
    D: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr, UNIT_DY: tl.constexpr,
    UNIT_DX: tl.constexpr, STRETCHES: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    batch, start, limit, channel = _stretches(b, l, steps, D, STRETCHES, BLOCK)
    left = limit - start
    own = tl.minimum(left, steps)
    x_l, dy_l = tl.cast(x_l, tl.int64) * UNIT, tl.cast(dy_l, tl.int64) * UNIT_DY
    dx_l = tl.cast(dx_l, tl.int64) * UNIT_DX
    first_ptr = x_ptr + (batch * x_b * UNIT)[:, None] + channel
    x_ptr = first_ptr + (start * x_l)[:, None]
    dy_ptr += (batch * dy_b * UNIT_DY + start * dy_l)[:, None] + channel
    dx_ptr += (batch * dx_b * UNIT_DX + (start - (K - 1)) * dx_l)[
        :, None
    ] + channel  # a step finishes the row k-1 above it
    taps, bias, past, runs = _window(
        first_ptr, weight_ptr, bias_ptr, initial_ptr, run_ptr, start, limit, l, batch, x_l, channel, K, D, STRETCHES,
        BLOCK,
    )  # fmt: skip
    zero = tl.zeros([STRETCHES, BLOCK], tl.float32)
    unfinished, dtaps, dbias = (), (zero,), zero
    for _ in tl.static_range(1, K):
        unfinished += (zero,)
        dtaps += (zero,)

    # A group's rows are asked for before the group above is computed: 1.11 instead of 1.45 ms at d = 640, l = 2^20.
    rows = _rows(x_ptr, 0, left, channel < D, x_l, UNROLL)
    gradients = _rows(dy_ptr, 0, left, channel < D, dy_l, UNROLL)
    for first in range(0, steps, UNROLL):
        x_ptr += UNROLL * x_l
        dy_ptr += UNROLL * dy_l
        next_rows = _rows(x_ptr, first + UNROLL, left, channel < D, x_l, UNROLL)
        next_gradients = _rows(dy_ptr, first + UNROLL, left, channel < D, dy_l, UNROLL)
        dx_ptr, past, unfinished, runs, dtaps, dbias = _walk(
            rows, gradients, run_ptr, dfinal_ptr, dx_ptr, dinitial_ptr, first, start, left, own, l, dx_l, batch,
            channel, taps, bias, past, unfinished, runs, dtaps, dbias, True, UNROLL, D, K, SILU,
        )  # fmt: skip
        rows, gradients = next_rows, next_gradients
    _walk(  # the first steps of the next stretch finish the last rows of dx
        rows, gradients, run_ptr, dfinal_ptr, dx_ptr, dinitial_ptr, steps, start, left, own, l, dx_l, batch,
        channel, taps, bias, past, unfinished, runs, dtaps, dbias, False, K - 1, D, K, SILU,
    )  # fmt: skip

    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    parts_ptr += (tl.program_id(0) // blocks).to(tl.int64) * ((K + 1) * D) + column
    for j in tl.static_range(K):
        tl.store(parts_ptr + j * D, tl.sum(dtaps[j], 0), mask=column < D)
    tl.store(parts_ptr + K * D, tl.sum(dbias, 0), mask=column < D)


@triton.jit(do_not_specialize=["parts"])
def _add_parts(
    parts_ptr, dweight_ptr, dbias_ptr, parts, D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, parts, ROWS):
        offset = (first + row).to(tl.int64)[:, None] * ((K + 1) * D) + column[None, :]
        mask = (first + row < parts)[:, None] & (column < (K + 1) * D)[None, :]
        total += tl.load(parts_ptr + offset, mask=mask, other=0.0)
    total = tl.sum(total, 0)
    j, channel = column // D, column % D
    tl.store(dweight_ptr + channel * K + j, total.to(dweight_ptr.dtype.element_ty), mask=j < K)
    tl.store(dbias_ptr + channel, total, mask=j == K)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rows_apart(x: Tensor) -> Tensor:
    """x (b, l, d), or its copy if its channels are not adjacent."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _distances(x: Tensor) -> tuple[int, int, int]:
    """What divides the strides over b and l, up to 8 (the compiler may load so many numbers at once), and the rests."""
    over_b, over_l = (s if n > 1 else 0 for s, n in zip(x.stride()[:2], x.shape[:2], strict=True))
    unit = math.gcd(8, over_b, over_l)
    return unit, over_b // unit, over_l // unit


def _steps(b: int, l: int, columns: int, stretches: int, unroll: int) -> int:
    """Steps of a stretch: enough for a thousand programs, which fill the largest GPUs, between 16 and 128."""
    steps = min(128, max(16, b * l * columns // (stretches * 1024)), l)
    return triton.cdiv(steps, unroll) * unroll


@planned
def _forward_plan(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Any, run: Any, silu: bool) -> Launch:
    (b, l, d), k = x.shape, weight.shape[1]
    # The best of 18 configurations on an H200 at l = 2^20, bf16: 16 bytes of a row a thread, 16 rows asked for at once
    # (0.685 ms at d = 640, 2.43 at d = 2,304; 8 rows 0.746 and 2.65).
    stretches, block, unroll = 8, 128, 32 // x.element_size()
    unit, x_b, x_l = _distances(x)
    columns = triton.cdiv(d, block)
    steps = _steps(b, l, columns, stretches, unroll)
    programs = triton.cdiv(b * triton.cdiv(l, steps), stretches) * columns
    return Launch(
        _forward, (programs,), b, l, x_b, x_l, steps, D=d, K=k, SILU=silu, UNIT=unit, STRETCHES=stretches,
        BLOCK=block, UNROLL=unroll, num_warps=4,
    )  # fmt: skip


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, run: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the final state (b, k-1, d), as in causal_conv1d.py; x may have any strides over b and l."""
    x, weight = _rows_apart(x), weight.contiguous()
    bias, initial_state, run = _contiguous(bias), _contiguous(initial_state), _contiguous(run)
    launch = _forward_plan(x, weight, bias, initial_state, run, silu)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])
    launch(x, weight, bias, initial_state, run, y, final)
    return y, final


class _BackwardPlan:
    def __init__(
        self, dy: Tensor, dfinal: Any, x: Tensor, weight: Tensor, bias: Any, initial: Any, run: Any, silu: bool,
        dx: Tensor,
    ) -> None:  # fmt: skip
        (b, l, d), k = x.shape, weight.shape[1]
        # The best of 20 configurations on an H200 at l = 2^20, bf16: 4 channels a thread, since all of its sums live in
        # registers, and 128 registers, which lets 16 warps run on a processor: 1.11 ms at d = 640 instead of 1.22.
        stretches, block, unroll = 4, 64, max(4, triton.next_power_of_2(k - 1))
        registers = {"maxnreg": 128} if k <= 4 and x.element_size() == 2 else {}
        (unit, *x_bl), (unit_dy, *dy_bl), (unit_dx, *dx_bl) = _distances(x), _distances(dy), _distances(dx)
        columns = triton.cdiv(d, block)
        steps = _steps(b, l, columns, stretches, unroll)
        parts = triton.cdiv(b * triton.cdiv(l, steps), stretches)
        self.parts = parts, k + 1, d
        self.walk = Launch(
            _backward, (parts * columns,), b, l, *x_bl, *dy_bl, *dx_bl, steps, D=d, K=k, SILU=silu, UNIT=unit,
            UNIT_DY=unit_dy, UNIT_DX=unit_dx, STRETCHES=stretches, BLOCK=block, UNROLL=unroll, num_warps=2,
            **registers,
        )  # fmt: skip
        self.add = Launch(_add_parts, (triton.cdiv((k + 1) * d, 8),), parts, D=d, K=k, ROWS=256, BLOCK=8, num_warps=8)


_backward_plan = planned(_BackwardPlan)


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    run: Tensor | None, silu: bool, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (into dx if given: any strides over b and l), weight, bias and the initial state (if any)."""
    dy, x, weight = _rows_apart(dy), _rows_apart(x), weight.contiguous()
    bias, initial_state, run, dfinal = (_contiguous(t) for t in (bias, initial_state, run, dfinal))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if dx is None else dx
    plan = _backward_plan(dy, dfinal, x, weight, bias, initial_state, run, silu, dx)
    parts = torch.empty(plan.parts, dtype=torch.float32, device=x.device)
    dweight, dbias = torch.empty_like(weight), parts.new_empty(x.shape[2])
    dinitial = parts.new_empty((0,) if initial_state is None else initial_state.shape)
    plan.walk(x, weight, bias, initial_state, run, dy, dfinal, dx, None if initial_state is None else dinitial, parts)
    plan.add(parts, dweight, dbias)
    return dx, dweight, dbias, dinitial
