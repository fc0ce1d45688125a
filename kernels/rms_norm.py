"""RMSNorm with an optional gate and residual addition.

    v = x + residual
    y = u / sqrt(mean(u^2) + epsilon) * weight + bias,   u = v * silu(z)                   (gate first, Mamba-2)
    y = (v / sqrt(mean(v^2) + epsilon) * weight + bias) * silu(z)                          (norm_before_gate)

(Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.) With `groups` the mean runs within each of that many
equal parts of d. kernels/README.md derives the gradient. Sums are float32 (float64 for float64 inputs).

Shapes: x, residual, z (..., d); weight, bias (d,).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.kernels.direct import direct
from seqmodels.kernels.dispatch import triton_form
from seqmodels.kernels.split import room

# What a pass over rows handles together on a CPU, in elements: what fits the cache. And up to how many elements the
# operator's own overhead (some 30 microseconds) would show, as in a decoding step.
_ELEMENTS_PER_PASS = 2**17
_SMALL = 2**14


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    z: Tensor | None = None,
    residual: Tensor | None = None,
    epsilon: float = 1e-5,
    norm_before_gate: bool = False,
    groups: int = 1,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm y (..., d) in x's dtype; with a residual also the sum x + residual, in float32 if so asked."""
    _check(x, weight, bias, z, residual, groups)
    tensors = (x, weight, bias, z, residual)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if x.device.type == "cpu" and not needs_gradient and x.numel() <= _SMALL:
        v = x if residual is None else _wide(x) + residual
        y = _normalise(_wide(v), weight, bias, z, epsilon, norm_before_gate, groups).to(x.dtype)
        return y if residual is None else (y, v.to(_residual_dtype(x, residual_in_fp32)))
    y, total = _direct(x, weight, bias, z, residual, epsilon, norm_before_gate, groups, residual_in_fp32)
    return y if residual is None else (y, total)


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    z: Tensor | None = None,
    residual: Tensor | None = None,
    epsilon: float = 1e-5,
    norm_before_gate: bool = False,
    groups: int = 1,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition. Arguments and results as in `rms_norm`."""
    _check(x, weight, bias, z, residual, groups)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    v = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    gate = 1.0 if z is None else z.to(dtype) * torch.sigmoid(z.to(dtype))
    u = v if norm_before_gate else v * gate
    parts = u.unflatten(-1, (groups, -1))
    y = (parts / torch.sqrt(parts.square().mean(-1, keepdim=True) + epsilon)).flatten(-2) * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    y = (y * gate if norm_before_gate else y).to(x.dtype)
    return y if residual is None else (y, v.to(_residual_dtype(x, residual_in_fp32)))


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, residual: Tensor | None, groups: int
) -> None:
    d = x.shape[-1]
    if groups < 1 or d % groups:
        raise ValueError(f"x has {d} channels, which groups = {groups} does not divide; choose a divisor of {d}")
    for name, tensor, shape in (
        ("weight", weight, (d,)), ("bias", bias, (d,)), ("z", z, x.shape), ("residual", residual, x.shape),
    ):  # fmt: skip
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with x {tuple(x.shape)} it must be {tuple(shape)}"
            )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _residual_dtype(x: Tensor, in_fp32: bool) -> torch.dtype:
    return torch.float32 if in_fp32 and x.dtype != torch.float64 else x.dtype


def _normalise(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    epsilon: float,
    norm_before_gate: bool,
    groups: int,
) -> Tensor:
    """y of wide v, wide."""
    weight = weight if weight.dtype == v.dtype else weight.to(v.dtype)
    gate = None if z is None else F.silu(z.to(v.dtype))
    u = v if gate is None or norm_before_gate else v * gate
    if groups == 1:
        y = F.rms_norm(u, weight.shape, weight, epsilon)
    else:
        size = weight.shape[0] // groups
        y = F.rms_norm(u.unflatten(-1, (groups, size)), (size,), None, epsilon).flatten(-2) * weight
    if bias is not None:
        y = y + bias.to(v.dtype)
    return y * gate if gate is not None and norm_before_gate else y


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _passes(x: Tensor) -> list[slice]:
    """The rows in passes that fit a CPU's cache; elsewhere all at once."""
    rows = x.numel() // x.shape[-1]
    step = max(1, _ELEMENTS_PER_PASS // x.shape[-1]) if x.device.type == "cpu" else max(1, rows)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _rms_norm_in_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, residual: Tensor | None, epsilon: float,
    norm_before_gate: bool, groups: int, residual_in_fp32: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and x + residual (empty without a residual)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = (0,) if residual is None else x.shape
    total = torch.empty(shape, dtype=_residual_dtype(x, residual_in_fp32), device=x.device)
    for part in _passes(x):
        v = _wide(_rows(x)[part])
        if residual is not None:
            v = v + _rows(residual)[part]
            _rows(total)[part] = v
        gate = None if z is None else _rows(z)[part]
        _rows(y)[part] = _normalise(v, weight, bias, gate, epsilon, norm_before_gate, groups)
    return y, total


_rms_norm = torch.library.custom_op("longseq::rms_norm", mutates_args=())(_rms_norm_in_torch)


@_rms_norm.register_kernel("cuda")
def _rms_norm_anywhere(x, weight, bias, z, residual, epsilon, norm_before_gate, groups, residual_in_fp32):
    form = triton_form("rms_norm", x)
    if form is None:
        return _rms_norm_in_torch(x, weight, bias, z, residual, epsilon, norm_before_gate, groups, residual_in_fp32)
    dtype = _residual_dtype(x, residual_in_fp32)
    return form.forward(x, weight, bias, z, residual, epsilon, norm_before_gate, groups, dtype)


@_rms_norm.register_fake
def _(x, weight, bias, z, residual, epsilon, norm_before_gate, groups, residual_in_fp32):
    shape = (0,) if residual is None else x.shape
    total = torch.empty(shape, dtype=_residual_dtype(x, residual_in_fp32), device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), total


def _rms_norm_backward_in_torch(
    dy: Tensor, dtotal: Tensor | None, v: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, epsilon: float,
    norm_before_gate: bool, groups: int, x_dtype: torch.dtype, residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, residual, weight, bias and z, where v is x + residual; empty where not asked for."""
    dx, dresidual, dweight, dbias, dz = _empty_gradients(v, weight, bias, z, x_dtype, residual_dtype)
    sums = torch.zeros_like(_wide(weight)), torch.zeros_like(_wide(weight))
    for part in _passes(v):
        dv = _gradient_of_rows(
            _rows(dy)[part], _rows(v)[part], weight, bias, None if z is None else _rows(z)[part], epsilon,
            norm_before_gate, groups, *sums, None if z is None else _rows(dz)[part],
        )  # fmt: skip
        if dtotal is not None:
            dv = dv + _rows(dtotal)[part]
        _rows(dx)[part] = dv
        if residual_dtype is not None:
            _rows(dresidual)[part] = dv
    return dx, dresidual, dweight.copy_(sums[0]), dbias if bias is None else dbias.copy_(sums[1]), dz


def _empty_gradients(
    v: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def empty(like: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        shape, dtype = ((0,), x_dtype) if like is None or dtype is None else (like.shape, dtype)
        return torch.empty(shape, dtype=dtype, device=v.device)

    dbias = empty(None if bias is None else weight, weight.dtype)
    dz = empty(z, None if z is None else z.dtype)
    return empty(v, x_dtype), empty(v, residual_dtype), empty(weight, weight.dtype), dbias, dz


_rms_norm_backward = torch.library.custom_op("longseq::rms_norm_backward", mutates_args=())(_rms_norm_backward_in_torch)


@_rms_norm_backward.register_kernel("cuda")
def _rms_norm_backward_anywhere(
    dy, dtotal, v, weight, bias, z, epsilon, norm_before_gate, groups, x_dtype, residual_dtype, place=None
):
    arguments = dy, dtotal, v, weight, bias, z, epsilon, norm_before_gate, groups, x_dtype, residual_dtype
    form = triton_form("rms_norm", v)
    if form is None:
        return _rms_norm_backward_in_torch(*arguments)
    return form.backward(*arguments, None if place is None else place.take())


@_rms_norm_backward.register_fake
def _(dy, dtotal, v, weight, bias, z, epsilon, norm_before_gate, groups, x_dtype, residual_dtype):
    return _empty_gradients(v, weight, bias, z, x_dtype, residual_dtype)


def _gradient_of_rows(dy, v, weight, bias, z, epsilon, norm_before_gate, groups, dweight, dbias, dz) -> Tensor:
    """dv of some rows; adds to dweight and dbias, writes dz."""
    dy, v = _wide(dy), _wide(v)
    gate = None if z is None else _wide(z)
    sigmoid = None if gate is None else torch.sigmoid(gate)
    silu = None if gate is None else gate * sigmoid
    u = v if silu is None or norm_before_gate else v * silu
    parts = u.unflatten(-1, (groups, -1))
    scale = torch.rsqrt(torch.linalg.vecdot(parts, parts)[..., None] / parts.shape[-1] + epsilon)
    normal = (parts * scale).flatten(-2)
    dout = dy if silu is None or not norm_before_gate else dy * silu
    dweight += torch.linalg.vecdot(dout, normal, dim=0)
    dbias += dout.sum(0)
    dnormal = (dout * weight.to(v.dtype)).unflatten(-1, (groups, -1))
    along = torch.linalg.vecdot(dnormal, normal.view_as(dnormal))[..., None] / parts.shape[-1]
    du = (torch.addcmul(dnormal, normal.view_as(dnormal), along, value=-1) * scale).flatten(-2)
    if gate is None:
        return du
    slope = sigmoid * (1 + gate - silu)  # of silu
    if norm_before_gate:
        y = normal * weight.to(v.dtype)
        dz.copy_(dy * (y if bias is None else y + bias) * slope)
        return du
    dz.copy_(du * v * slope)
    return du * silu


def _setup_context(ctx, inputs, output):
    x, weight, bias, z, residual, ctx.epsilon, ctx.norm_before_gate, ctx.groups, _ = inputs
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
    ctx.place = room(z)
    ctx.save_for_backward(x if residual is None else output[1], weight, bias, z)
    ctx.set_materialize_grads(False)  # a sum that nobody uses has no gradient to add


def _autograd(ctx, dy, dtotal, backward=_rms_norm_backward):
    v, weight, bias, z = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros(v.shape, dtype=ctx.x_dtype, device=v.device)
    place = () if backward is _rms_norm_backward else (ctx.place,)
    alike = ctx.residual_dtype in (None, ctx.x_dtype)  # then x and residual have one gradient
    dx, dresidual, dweight, dbias, dz = backward(
        dy, None if ctx.residual_dtype is None else dtotal, v, weight, bias, z, ctx.epsilon, ctx.norm_before_gate,
        ctx.groups, ctx.x_dtype, None if alike else ctx.residual_dtype, *place,
    )  # fmt: skip
    return (
        dx, dweight, None if bias is None else dbias.to(bias.dtype), None if z is None else dz,
        None if ctx.residual_dtype is None else dx if alike else dresidual, None, None, None, None,
    )  # fmt: skip


_rms_norm.register_autograd(_autograd, setup_context=_setup_context)
_backward = partial(_autograd, backward=_rms_norm_backward_anywhere)
_direct = direct(_rms_norm, _rms_norm_anywhere, _setup_context, _backward)
