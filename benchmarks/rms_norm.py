"""Times `rms_norm` on a GPU, with residual addition and with a gate, beside mamba_ssm's, where that is installed.

    python benchmarks/rms_norm.py        # writes benchmarks/results/h200/rms_norm.json

timing.py says how times are taken, costs.py what the least is. Shapes: "residual" adds a float32 residual and hands
the float32 sum on; with "both" its backward gets gradients of y and of the sum, else of y alone. "row" gates with z, a
slice of rows of that many columns.
"""

from collections.abc import Callable
from typing import Any

import costs
import torch
from timing import Call, leaves, main, normal, public

from seqmodels.kernels.rms_norm import rms_norm

SHAPES = [
    {"b": 1, "d": 256, "residual": "fp32"},
    {"b": 1, "d": 256, "residual": "fp32", "both": True},
    {"b": 1, "d": 512, "row": 1288},
    {"b": 1, "d": 2048, "row": 4384},
]


def calls(shape: dict[str, Any], l: int) -> dict[str, Callable[[], Call]]:
    d = shape["d"]

    def call(function: Callable) -> Call:
        parts = {"x": normal(1, l, d), "weight": torch.ones(d, device="cuda")}
        gradients = [normal(1, l, d)]
        if "row" in shape:
            parts["z"] = normal(1, l, shape["row"])[..., :d]
        else:
            parts["residual"] = normal(1, l, d, dtype=torch.float32)
        if "both" in shape:
            gradients.append(normal(1, l, d, dtype=torch.float32))
        inputs = leaves(**parts)
        return Call(lambda: function(**inputs), list(inputs.values()), gradients)

    in_fp32 = {} if "row" in shape else {"residual_in_fp32": True}
    found = {"ours": lambda: call(lambda **inputs: rms_norm(**inputs, **in_fp32))}
    if "row" in shape:
        theirs, options = public("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn"), {"norm_before_gate": False}
    else:
        theirs = public("mamba_ssm.ops.triton.layer_norm", "rms_norm_fn")
        options = {"prenorm": "both" in shape, "residual_in_fp32": True}
    if theirs:
        found["mamba_ssm"] = lambda: call(lambda **inputs: theirs(**inputs, bias=None, **options))
    return found


if __name__ == "__main__":
    main("rms_norm", __doc__, SHAPES, calls, costs.rms_norm)
