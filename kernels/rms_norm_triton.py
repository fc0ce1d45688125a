"""Triton form of RMSNorm for GPUs. rms_norm.py says what it computes.

A program holds tiles of several rows of one group: every group of a row is normalised on its own, so groups are just
more rows. The backward pass walks down a stretch of rows with its sums for weight and bias in registers.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.kernels.launch import Launch, planned


@triton.jit
def _gate(z):
    """silu(z) and its derivative. The square of a reciprocal root takes two instructions, a division five."""
    root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    sigmoid = root * root
    gate = z * sigmoid
    return gate, sigmoid + gate * (1.0 - sigmoid)


@triton.jit(do_not_specialize=["rows", "x_l", "z_l", "residual_l", "epsilon"])
def _forward(
    x_ptr, weight_ptr, bias_ptr, z_ptr, residual_ptr, y_ptr, total_ptr, rows, x_l, z_l, residual_l, epsilon,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, GATE_LAST: tl.constexpr, UNIT: tl.constexpr, UNIT_Z: tl.constexpr,
    UNIT_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK rows of one of the GROUPS groups of SIZE channels."""
    row = tl.program_id(0) // GROUPS * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, SIZE_BLOCK)
    inside = channel < SIZE
    mask = (row < rows)[:, None] & inside[None, :]
    channel += tl.program_id(0) % GROUPS * SIZE
    row = row.to(tl.int64)[:, None]

    v = tl.load(x_ptr + row * x_l * UNIT + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        offset = row * residual_l * UNIT_RESIDUAL + channel[None, :]
        v += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    out = row * (GROUPS * SIZE) + channel[None, :]
    if z_ptr is not None:
        z = tl.load(z_ptr + row * z_l * UNIT_Z + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        gate, _ = _gate(z)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        tl.store(total_ptr + out, v.to(total_ptr.dtype.element_ty), mask=mask)
    if z_ptr is not None and not GATE_LAST:
        v *= gate
    y = v * tl.rsqrt(tl.sum(v * v, 1) * (1.0 / SIZE) + epsilon)[:, None] * weight
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None and GATE_LAST:
        y *= gate
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "v_l", "dy_l", "dtotal_l", "z_l", "dz_l", "steps", "epsilon"])
def _backward(
    dy_ptr, dtotal_ptr, v_ptr, weight_ptr, bias_ptr, z_ptr, dx_ptr, dresidual_ptr, dz_ptr, parts_ptr,
    rows, v_l, dy_l, dtotal_l, z_l, dz_l, steps, epsilon,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, GATE_LAST: tl.constexpr, UNIT: tl.constexpr, UNIT_DY: tl.constexpr,
    UNIT_DTOTAL: tl.constexpr, UNIT_Z: tl.constexpr, UNIT_DZ: tl.constexpr, BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`steps` tiles of BLOCK rows of one group, and its part of the gradients of weight and bias."""
    stretch, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    channel = tl.arange(0, SIZE_BLOCK)
    inside = (channel < SIZE)[None, :]
    channel = (channel + group * SIZE)[None, :]
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK, SIZE_BLOCK], tl.float32)
    if bias_ptr is not None:
        dbias = dweight
        if z_ptr is not None and GATE_LAST:
            bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)

    for step in tl.range(0, steps, num_stages=STAGES):
        row = (stretch.to(tl.int64) * steps + step) * BLOCK + tl.arange(0, BLOCK)[:, None]
        mask = (row < rows) & inside
        v = tl.load(v_ptr + row * v_l * UNIT + channel, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_l * UNIT_DY + channel, mask=mask, other=0.0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + row * z_l * UNIT_Z + channel, mask=mask, other=0.0).to(tl.float32)
        if dtotal_ptr is not None:
            dtotal = tl.load(dtotal_ptr + row * dtotal_l * UNIT_DTOTAL + channel, mask=mask, other=0.0).to(tl.float32)

        u, dout = v, dy
        if z_ptr is not None:
            gate, slope = _gate(z)
            if GATE_LAST:
                dout = dy * gate
            else:
                u = v * gate
        dnormal = dout * weight
        scale = tl.rsqrt(tl.sum(u * u, 1) * (1.0 / SIZE) + epsilon)[:, None]
        along = (tl.sum(dnormal * u, 1) * (1.0 / SIZE))[:, None] * scale * scale
        normal = u * scale
        dweight += dout * normal
        if bias_ptr is not None:
            dbias += dout
        du = (dnormal - u * along) * scale
        if z_ptr is not None:
            if GATE_LAST:
                y = normal * weight
                if bias_ptr is not None:
                    y += bias
                dz = dy * y * slope
            else:
                dz = du * v * slope
                du *= gate
            tl.store(dz_ptr + row * dz_l * UNIT_DZ + channel, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if dtotal_ptr is not None:
            du += dtotal
        offset = row * (GROUPS * SIZE) + channel
        tl.store(dx_ptr + offset, du.to(dx_ptr.dtype.element_ty), mask=mask)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offset, du.to(dresidual_ptr.dtype.element_ty), mask=mask)

    column = tl.arange(0, SIZE_BLOCK)
    parts_ptr += stretch.to(tl.int64) * ((1 if bias_ptr is None else 2) * GROUPS * SIZE) + group * SIZE + column
    tl.store(parts_ptr, tl.sum(dweight, 0), mask=column < SIZE)
    if bias_ptr is not None:
        tl.store(parts_ptr + GROUPS * SIZE, tl.sum(dbias, 0), mask=column < SIZE)


@triton.jit(do_not_specialize=["parts"])
def _add_parts(
    parts_ptr, dweight_ptr, dbias_ptr, parts, D: tl.constexpr, KINDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, parts, ROWS):
        offset = (first + row).to(tl.int64)[:, None] * (KINDS * D) + column[None, :]
        mask = (first + row < parts)[:, None] & (column < KINDS * D)[None, :]
        total += tl.load(parts_ptr + offset, mask=mask, other=0.0)
    total = tl.sum(total, 0)
    tl.store(dweight_ptr + column, total.to(dweight_ptr.dtype.element_ty), mask=column < D)
    if KINDS == 2:
        within = (column >= D) & (column < 2 * D)
        tl.store(dbias_ptr + column - D, total.to(dbias_ptr.dtype.element_ty), mask=within)


def _rows(x: Tensor | None) -> Tensor | None:
    """x itself if contiguous, else x (rows, d), a view where x's strides allow, with adjacent channels."""
    if x is None or x.is_contiguous():
        return x
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _distance(x: Tensor | None, size: int) -> tuple[int, int]:
    """What divides the distance of rows, up to 8 (the compiler may load so many numbers at once), and the rest."""
    if x is None:
        return 1, 0
    distance = x.shape[-1] if x.is_contiguous() else x.stride(0)
    unit = math.gcd(8, distance, size)
    return unit, distance // unit


def _tile(size: int) -> tuple[int, int, int]:
    """A tile's channels, rows and warps: 8 numbers a thread, the best of 15 on an H200 at 2^20 rows of 256 or 512."""
    size_block = triton.next_power_of_2(size)
    return size_block, max(1, 1024 // size_block), max(4, min(32, size_block // 256))


@planned
def _forward_plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, residual: Tensor | None, epsilon: float,
    norm_before_gate: bool, groups: int, total_dtype: torch.dtype,
) -> Launch:  # fmt: skip
    rows, size = x.numel() // x.shape[-1], x.shape[-1] // groups
    (unit, x_l), (unit_z, z_l), (unit_residual, residual_l) = (_distance(t, size) for t in (x, z, residual))
    size_block, block, warps = _tile(size)
    return Launch(
        _forward, (triton.cdiv(rows, block) * groups,), rows, x_l, z_l, residual_l, epsilon, GROUPS=groups, SIZE=size,
        GATE_LAST=norm_before_gate, UNIT=unit, UNIT_Z=unit_z, UNIT_RESIDUAL=unit_residual, BLOCK=block,
        SIZE_BLOCK=size_block, num_warps=warps,
    )  # fmt: skip


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, residual: Tensor | None, epsilon: float,
    norm_before_gate: bool, groups: int, total_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and x + residual (empty without a residual); rows of x, z and residual may lie apart."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty((0,) if residual is None else x.shape, dtype=total_dtype)
    if x.numel() == 0:
        return y, total
    x, weight, bias, z, residual = _rows(x), weight.contiguous(), _contiguous(bias), _rows(z), _rows(residual)
    launch = _forward_plan(x, weight, bias, z, residual, epsilon, norm_before_gate, groups, total_dtype)
    launch(x, weight, bias, z, residual, y, total)
    return y, total


class _BackwardPlan:
    def __init__(
        self, dy: Tensor, dtotal: Tensor | None, v: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None,
        epsilon: float, norm_before_gate: bool, groups: int, x_dtype: torch.dtype, residual_dtype: torch.dtype | None,
        dz: Tensor | None,
    ) -> None:  # fmt: skip
        d = v.shape[-1]
        rows, size = v.numel() // d, d // groups
        units, strides = zip(*(_distance(t, size) for t in (v, dy, dtotal, z, dz)), strict=True)
        size_block, block, warps = _tile(size)
        # The next three tiles are underway to shared memory: 1.37 instead of 1.86 ms with a gate at 2^20 rows of 512.
        stages = 4 if size_block <= 2048 else 1
        steps = min(64, triton.cdiv(rows, block * 2048))
        stretches, kinds = triton.cdiv(rows, block * steps), 1 if bias is None else 2
        self.parts = stretches, kinds, d
        names = ("UNIT", "UNIT_DY", "UNIT_DTOTAL", "UNIT_Z", "UNIT_DZ")
        self.walk = Launch(
            _backward, (stretches * groups,), rows, *strides, steps, epsilon, GROUPS=groups, SIZE=size,
            GATE_LAST=norm_before_gate, **dict(zip(names, units, strict=True)), BLOCK=block, SIZE_BLOCK=size_block,
            STAGES=stages, num_warps=warps,
        )  # fmt: skip
        self.add = Launch(
            _add_parts, (triton.cdiv(kinds * d, 8),), stretches, D=d, KINDS=kinds, ROWS=256, BLOCK=8, num_warps=8
        )


_backward_plan = planned(_BackwardPlan)


def backward(
    dy: Tensor, dtotal: Tensor | None, v: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, epsilon: float,
    norm_before_gate: bool, groups: int, x_dtype: torch.dtype, residual_dtype: torch.dtype | None,
    dz: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, residual, weight, bias and z (into dz if given: its rows may lie apart); v is x + residual.

    Those of residual, bias and z are empty where not asked for.
    """
    dx = torch.empty_like(v, dtype=x_dtype, memory_format=torch.contiguous_format)
    dresidual = v.new_empty((0,) if residual_dtype is None else v.shape, dtype=residual_dtype or x_dtype)
    if dz is None:
        dz = v.new_empty((0,) if z is None else v.shape, dtype=x_dtype if z is None else z.dtype)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = dx.new_empty(0) if bias is None else torch.empty_like(dweight)
    if v.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_(), dz
    dy, dtotal, v, z = (_rows(t) for t in (dy, dtotal, v, z))
    weight, bias = weight.contiguous(), _contiguous(bias)
    dz_rows = None if z is None else dz if dz.is_contiguous() else dz.view(-1, dz.shape[-1])
    plan = _backward_plan(
        dy, dtotal, v, weight, bias, z, epsilon, norm_before_gate, groups, x_dtype, residual_dtype, dz_rows
    )
    parts = torch.empty(plan.parts, dtype=torch.float32, device=v.device)
    plan.walk(dy, dtotal, v, weight, bias, z, dx, None if residual_dtype is None else dresidual, dz_rows, parts)
    plan.add(parts, dweight, dbias)
    return dx, dresidual, dweight, dbias, dz
