"""Times `ssd` (skip, bias, softplus, no gate) on a GPU beside mamba_ssm's and fla's forms, where those are installed.

    python benchmarks/ssd.py        # writes benchmarks/results/h200/ssd.json

timing.py says how times are taken, costs.py what the least is. fla's simple_gla is the same recurrence with B and C per
head, step sizes already multiplied in, and no skip.
"""

from collections.abc import Callable
from typing import Any

import costs
import torch
from timing import Call, leaves, main, normal, public, step_size_bias

from seqmodels.kernels.ssd import ssd

SHAPES = [{"b": 1, "h": h, "p": 64, "n": n} for h, n in ((8, 64), (8, 128), (32, 128))]


def calls(shape: dict[str, Any], l: int) -> dict[str, Callable[[], Call]]:
    h, p, n = (shape[key] for key in "hpn")

    def call(function: Callable) -> Call:
        inputs = leaves(
            x=normal(1, l, h, p), dt=normal(1, l, h), A=-torch.empty(h, device="cuda").uniform_(1, 16),
            B=normal(1, l, 1, n), C=normal(1, l, 1, n), D=torch.ones(h, device="cuda"), dt_bias=step_size_bias(h),
        )  # fmt: skip
        return Call(lambda: function(**inputs, dt_softplus=True), list(inputs.values()), [normal(1, l, h, p)])

    def simple_gla(function: Callable) -> Call:
        decay = -torch.rand(1, l, h, device="cuda")
        inputs = leaves(q=normal(1, l, h, n), k=normal(1, l, h, n), v=normal(1, l, h, p), g=decay)
        return Call(lambda: function(**inputs, scale=1.0), list(inputs.values()), [normal(1, l, h, p)])

    found = {"ours": lambda: call(ssd)}
    if theirs := public("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"):
        found["mamba_ssm"] = lambda: call(lambda **inputs: theirs(**inputs, chunk_size=256))
    if fla := public("fla.ops.simple_gla", "chunk_simple_gla"):
        found["fla"] = lambda: simple_gla(fla)
    return found


if __name__ == "__main__":
    main("ssd", __doc__, SHAPES, calls, costs.ssd)
