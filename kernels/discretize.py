"""From a continuous linear system to a recurrence: h' = A h + B x with x held for a step of dt becomes

    h[t] = dA h[t-1] + dB x[t].

Exact zero-order hold (S4: Gu, Goel and Re, 2021; Mamba, 2023, equation 4):
    dA = exp(dt A),  dB = A^-1 (exp(dt A) - 1) B
Bilinear rule (Tustin; S4D offers it too): dA = (1 + dt A / 2) / (1 - dt A / 2),  dB = dt / (1 - dt A / 2) B
Mamba's form (what the Mamba and Mamba-2 programs compute, though Mamba's text gives the exact form): the same dA, and
Euler's dB = dt B, which differs from the exact one by a factor 1 + O(dt A) that training absorbs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def zero_order_hold(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Exact hold of a diagonal or scalar system: dA = exp(dt A) and dB; A, B and dt broadcast. Correct at A = 0."""
    decay = dt * A
    return decay.exp(), dt * _expm1_ratio(decay) * B


def bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """The bilinear rule for a diagonal or scalar system: dA and dB; A, B and dt broadcast."""
    half = dt * A / 2
    return (1 + half) / (1 - half), dt / (1 - half) * B


def zero_order_hold_matrix(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Exact hold of a full system: A (..., n, n), B (..., n, m), dt (...) -> dA, dB of the same shapes.

    exp(dt [[A, B], [0, 0]]) = [[dA, dB], [0, 1]] (Van Loan, 1978): no inverse, so a singular A is fine.
    """
    n, m = B.shape[-2:]
    rows = torch.cat([A, B.expand(*A.shape[:-1], m)], -1)
    augmented = torch.cat([rows, rows.new_zeros(*rows.shape[:-2], m, n + m)], -2)
    whole = torch.linalg.matrix_exp(augmented * dt[..., None, None])
    return whole[..., :n, :n], whole[..., :n, n:]


def mamba_discretization(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Mamba's form for a diagonal or scalar system: dA = exp(dt A), dB = dt B; A, B and dt broadcast."""
    return (dt * A).exp(), dt * B


def step_size(
    dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """dt as the scans use it, in `dtype`: plus bias, through softplus, clamped to `limit` (by default to >= 0)."""
    dt = dt.to(dtype)
    if bias is not None:
        dt = dt + bias.to(dtype)
    if softplus:
        dt = F.softplus(dt)
        if limit == (0.0, math.inf):  # holds already
            return dt
    return dt.clamp(*limit)


def step_size_gradient(
    ddt: Tensor, dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]
) -> Tensor:
    """The gradient of the raw dt (and, summed, of the bias) from that of the step size, in ddt's dtype."""
    dt = dt.to(ddt.dtype)
    if bias is not None:
        dt = dt + bias.to(ddt.dtype)
    if softplus:
        ddt, dt = ddt * torch.sigmoid(dt), F.softplus(dt)
        if limit == (0.0, math.inf):
            return ddt
    return torch.where((dt >= limit[0]) & (dt <= limit[1]), ddt, 0.0)


def _expm1_ratio(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, and its limit 1 at z = 0, to full precision and with its gradient."""
    small = z.abs() < 1e-3  # here z^4 / 120 < 1e-14
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4))
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, series, torch.expm1(safe) / safe)
