"""Times `selective_scan` (gate, skip, bias, softplus) on a GPU beside a scan in PyTorch, and mamba_ssm's if installed.

    python benchmarks/selective_scan.py        # writes benchmarks/results/h200/selective_scan.json

timing.py says how times are taken, costs.py what the least is. The scan in PyTorch keeps every entry of every state in
the GPU's memory, a few times over, and is timed up to 65,536 steps. mamba_ssm's operator has the sequence innermost and
gets its data that way.
"""

import functools
from collections.abc import Callable
from typing import Any

import costs
import torch
import torch.nn.functional as F
from timing import Call, leaves, main, normal, public, step_size_bias
from torch import Tensor

from seqmodels.kernels.selective_scan import selective_scan

SHAPES = [{"b": 1, "e": e, "n": 16} for e in (256, 512, 1024)]


def scan_in_pytorch(
    x: Tensor, dt: Tensor, z: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, B: Tensor, C: Tensor
) -> Tensor:
    """x, dt, z (b, l, e), A (e, n), D, dt_bias (e,), B, C (b, l, 1, n) -> y (b, l, e): log2(l) rounds of joining steps.

    As it is usually written without a kernel for it (Mamba paper, section 4.5).
    """
    dt = F.softplus(dt.float() + dt_bias)
    decay, state = torch.exp(dt[..., None] * A), (dt * x.float())[..., None] * B.float()
    reach = 1
    while reach < x.shape[1]:
        later = decay[:, reach:]
        state = torch.cat([state[:, :reach], later * state[:, :-reach] + state[:, reach:]], 1)
        decay = torch.cat([decay[:, :reach], later * decay[:, :-reach]], 1)
        reach *= 2
    y = (state * C.float()).sum(-1) + D * x.float()
    return (y * F.silu(z.float())).to(x.dtype)


def calls(shape: dict[str, Any], l: int) -> dict[str, Callable[[], Call]]:
    e, n = shape["e"], shape["n"]
    A = -torch.arange(1.0, n + 1, device="cuda").repeat(e, 1)
    parameters = {"A": A, "D": torch.ones(e, device="cuda"), "dt_bias": step_size_bias(e)}

    def call(function: Callable[..., Tensor]) -> Call:
        rows = {name: normal(1, l, e) for name in ("x", "dt", "z")}
        inputs = leaves(**rows, **parameters, B=normal(1, l, 1, n), C=normal(1, l, 1, n))
        return Call(lambda: function(**inputs), list(inputs.values()), [normal(1, l, e)])

    def theirs() -> Call:
        rows = {name: normal(1, e, l) for name in ("u", "delta", "z")}
        named = {"A": A, "D": parameters["D"], "delta_bias": parameters["dt_bias"]}
        inputs = leaves(**rows, **named, B=normal(1, 1, n, l), C=normal(1, 1, n, l))
        return Call(lambda: public_form(**inputs, delta_softplus=True), list(inputs.values()), [normal(1, e, l)])

    public_form = public("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    found = {"ours": lambda: call(functools.partial(selective_scan, dt_softplus=True))}
    if l <= 65_536:
        found["PyTorch"] = lambda: call(scan_in_pytorch)
    if public_form:
        found["mamba_ssm"] = theirs
    return found


if __name__ == "__main__":
    main("selective_scan", __doc__, SHAPES, calls, costs.selective_scan)
