"""Times whole Mamba and Mamba-2 mixers, in_proj to out_proj, on a GPU beside mamba_ssm's, where that is installed.

    python benchmarks/layers.py        # writes benchmarks/results/h200/layers.json

timing.py says how times are taken, costs.py what the least is. All parameters are bfloat16.
"""

from collections.abc import Callable
from typing import Any

import costs
import torch
from timing import LENGTHS, Call, main, normal, public
from torch import nn

from seqmodels.config import Mamba2Config, MambaConfig
from seqmodels.mixers import build_mixer

SHAPES = [
    {"mixer": "mamba2", "b": 1, "d": 256, "h": 8, "p": 64, "n": 64},
    {"mixer": "mamba2", "b": 1, "d": 256, "h": 8, "p": 64, "n": 128},
    {"mixer": "mamba2", "b": 1, "d": 256, "h": 8, "p": 64, "n": 256},
    {"mixer": "mamba", "b": 1, "d": 256, "e": 512, "n": 16},
    {"mixer": "mamba2", "b": 1, "d": 1024, "h": 32, "p": 64, "n": 128},
    {"mixer": "mamba2", "b": 1, "d": 2048, "h": 64, "p": 64, "n": 128},
]


def longest(shape: dict[str, Any]) -> int:
    return min(2**28 // shape["d"], max(LENGTHS))


def calls(shape: dict[str, Any], l: int) -> dict[str, Callable[[], Call]]:
    d, n = shape["d"], shape["n"]
    mamba2 = shape["mixer"] == "mamba2"

    def call(layer: nn.Module) -> Call:
        layer = layer.to("cuda", torch.bfloat16)
        x = normal(1, l, d).requires_grad_()
        return Call(lambda: layer(x), [x, *layer.parameters()], [normal(1, l, d)])

    config = Mamba2Config(d_state=n, head_dim=shape["p"]) if mamba2 else MambaConfig(d_state=n)
    found = {"ours": lambda: call(build_mixer(config, d))}
    if theirs := public("mamba_ssm", "Mamba2" if mamba2 else "Mamba"):
        options = {"headdim": shape["p"]} if mamba2 else {}
        found["mamba_ssm"] = lambda: call(theirs(d, d_state=n, **options))
    return found


if __name__ == "__main__":
    main("layers", __doc__, SHAPES, calls, costs.layer, longest)
