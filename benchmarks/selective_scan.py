"""Times `selective_scan` (gate, skip, bias, softplus) on a GPU beside mamba_ssm's, where that is installed.

    python benchmarks/selective_scan.py        # writes benchmarks/results/h200/selective_scan.json

timing.py says how times are taken, costs.py what the least is. mamba_ssm's operator has the sequence innermost and gets
its data that way.
"""

from collections.abc import Callable
from typing import Any

import costs
import torch
from timing import Call, leaves, main, normal, public, step_size_bias

from seqmodels.kernels.selective_scan import selective_scan

SHAPES = [{"b": 1, "e": e, "n": 16} for e in (256, 512, 1024)]


def calls(shape: dict[str, Any], l: int) -> dict[str, Callable[[], Call]]:
    e, n = shape["e"], shape["n"]
    A = -torch.arange(1.0, n + 1, device="cuda").repeat(e, 1)
    parameters = {"A": A, "D": torch.ones(e, device="cuda"), "dt_bias": step_size_bias(e)}

    def ours() -> Call:
        rows = {name: normal(1, l, e) for name in ("x", "dt", "z")}
        inputs = leaves(**rows, **parameters, B=normal(1, l, 1, n), C=normal(1, l, 1, n))
        return Call(lambda: selective_scan(**inputs, dt_softplus=True), list(inputs.values()), [normal(1, l, e)])

    def theirs() -> Call:
        rows = {name: normal(1, e, l) for name in ("u", "delta", "z")}
        named = {"A": A, "D": parameters["D"], "delta_bias": parameters["dt_bias"]}
        inputs = leaves(**rows, **named, B=normal(1, 1, n, l), C=normal(1, 1, n, l))
        return Call(lambda: public_form(**inputs, delta_softplus=True), list(inputs.values()), [normal(1, e, l)])

    public_form = public("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    return {"ours": ours, "mamba_ssm": theirs} if public_form else {"ours": ours}


if __name__ == "__main__":
    main("selective_scan", __doc__, SHAPES, calls, costs.selective_scan)
