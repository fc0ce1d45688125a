"""Times on a GPU what the scans stand against in the papers: attention, and a convolution as long as the sequence.

    python benchmarks/alternatives.py        # writes benchmarks/results/h200/alternatives.json

timing.py says how times are taken, costs.py what the least is. Attention is causal, by each of two kernels of PyTorch's
scaled_dot_product_attention. The convolution is an S4 layer's in training, by FFTs in float32 of twice the length; its
kernel is given. The scan in plain PyTorch is in selective_scan.py.
"""

from collections.abc import Callable
from typing import Any

import costs
import torch
from timing import LENGTHS, Call, leaves, main, normal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SHAPES = [{"b": 1, "h": 16, "p": 64}, {"b": 1, "d": 1024}]
BACKENDS = {
    "SDPA, FlashAttention": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def long_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """x (b, l, d), kernel (l, d) -> y (b, l, d), y[t] = sum over k of kernel[k] x[t - k]."""
    size = 2 * x.shape[1]
    product = torch.fft.rfft(x.float(), size, 1) * torch.fft.rfft(kernel.float(), size, 0)
    return torch.fft.irfft(product, size, 1)[:, : x.shape[1]].to(x.dtype)


def calls(shape: dict[str, Any], l: int) -> dict[str, Callable[[], Call]]:
    def attention(backend: SDPBackend) -> Call:
        inputs = leaves(**{name: normal(1, shape["h"], l, shape["p"]) for name in ("query", "key", "value")})

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(**inputs, is_causal=True)

        return Call(run, list(inputs.values()), [normal(1, shape["h"], l, shape["p"])])

    def convolution() -> Call:
        inputs = leaves(x=normal(1, l, shape["d"]), kernel=normal(l, shape["d"], dtype=torch.float32) / l)
        return Call(lambda: long_convolution(**inputs), list(inputs.values()), [normal(1, l, shape["d"])])

    if "d" in shape:
        return {"FFT": convolution}
    return {name: lambda backend=backend: attention(backend) for name, backend in BACKENDS.items()}


def cost(shape: dict[str, Any], l: int) -> costs.Cost:
    return costs.long_convolution(shape, l) if "d" in shape else costs.attention(shape, l)


if __name__ == "__main__":
    # a million steps of attention take six seconds forward, and ten calls are the least
    main("alternatives", __doc__, SHAPES, calls, cost, lambda shape: LENGTHS[-1] if "d" in shape else LENGTHS[-2])
