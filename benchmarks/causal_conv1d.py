"""Times `causal_conv1d` (4 taps, bias, SiLU) on a GPU beside Dao-AILab's and fla's, where those are installed.

    python benchmarks/causal_conv1d.py        # writes benchmarks/results/h200/causal_conv1d.json

timing.py says how times are taken, costs.py what the least is. A shape with "row" has x as a slice of rows of that many
columns, as a layer's input projection leaves it.
"""

from collections.abc import Callable
from typing import Any

import costs
import torch
from timing import Call, leaves, main, normal, public

from seqmodels.kernels.causal_conv1d import causal_conv1d

SHAPES = [{"b": 1, "d": 640, "k": 4}, {"b": 1, "d": 2304, "k": 4}, {"b": 1, "d": 2304, "k": 4, "row": 4384}]


def calls(shape: dict[str, Any], l: int) -> dict[str, Callable[[], Call]]:
    d, k = shape["d"], shape["k"]

    def call(function: Callable) -> Call:
        x = normal(1, l, shape.get("row", d))[..., -d:]
        weight, bias = (normal(*size, dtype=torch.float32) for size in ((d, k), (d,)))
        inputs = leaves(x=x, weight=weight, bias=bias)
        return Call(lambda: function(**inputs), list(inputs.values()), [normal(1, l, d)])

    found = {"ours": lambda: call(lambda **inputs: causal_conv1d(**inputs, activation="silu"))}
    if dao := public("causal_conv1d", "causal_conv1d_fn"):
        found["causal_conv1d"] = lambda: call(
            lambda x, weight, bias: dao(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
        )
    if fla := public("fla.modules.convolution", "causal_conv1d"):
        found["fla"] = lambda: call(lambda **inputs: fla(**inputs, activation="silu")[0])
    return found


if __name__ == "__main__":
    main("causal_conv1d", __doc__, SHAPES, calls, costs.causal_conv1d)
