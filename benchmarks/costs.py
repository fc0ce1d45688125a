"""The least that each op and layer could take on an H200: bytes, and time by what the machine can do.

Every input is read once and every output written once, in bfloat16; backward also reads the outputs' gradients and
writes one gradient per input. The arithmetic of a part may hide behind its bytes or the other way round; backward comes
after forward. Shapes are the dicts of the programs' rows, l the length.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

# A copy, and bf16 matrix products of 4096, as ceilings.py measures them. Its other kernels stay below what the hardware
# issues in a second, which is counted instead: float32 FMA (128 a clock and multiprocessor, half of the data sheet's 67
# TFLOP/s), and steps of a scan, each of which needs an exp2 (16: CUDA C++ Programming Guide, arithmetic instructions).
BYTES_PER_S, MATRIX_OPS_PER_S = 4.285e12, 790e12
FMA_PER_S, SCAN_STEPS_PER_S = 132 * 128 * 1.98e9, 132 * 16 * 1.98e9

Shape = dict[str, Any]


class Cost(NamedTuple):
    """Of forward and of backward."""

    gb: tuple[float, float]
    ms: tuple[float, float]


def cost_of(byte_counts: tuple[float, float], seconds: tuple[float, float] = (0.0, 0.0)) -> Cost:
    """Of so many bytes, and of arithmetic of so many seconds."""
    forward, backward = (max(n / BYTES_PER_S, s) * 1e3 for n, s in zip(byte_counts, seconds, strict=True))
    return Cost((byte_counts[0] / 1e9, byte_counts[1] / 1e9), (forward, backward))


def ssd(shape: Shape, l: int) -> Cost:
    """Without a gate; the products of the chunked form, with chunks of 64; backward has three for each of forward's:
    two for its factors' gradients, and forward's again."""
    h, p, n = (shape[key] for key in "hpn")
    seconds = l * (64 * (n + p * h) + 4 * n * p * h) / MATRIX_OPS_PER_S
    return cost_of((l * 2 * (2 * h * p + 2 * n + h), l * 2 * (3 * h * p + 4 * n + 2 * h)), (seconds, 3 * seconds))


def selective_scan(shape: Shape, l: int) -> Cost:
    """With a gate; a step of backward is 14 FMA for each entry of the state."""
    e, n = shape["e"], shape["n"]
    seconds = l * e * n / SCAN_STEPS_PER_S, 14 * l * e * n / FMA_PER_S
    return cost_of((l * 2 * (4 * e + 2 * n), l * 2 * (7 * e + 4 * n)), seconds)


def causal_conv1d(shape: Shape, l: int) -> Cost:
    return cost_of((l * 4 * shape["d"], l * 6 * shape["d"]))


def long_convolution(shape: Shape, l: int) -> Cost:
    """As long as the sequence, its kernel in float32; bytes alone."""
    return cost_of((l * 8 * shape["d"], l * 14 * shape["d"]))


def attention(shape: Shape, l: int) -> Cost:
    """Causal: half of two products; backward has five."""
    row = shape["h"] * shape["p"]
    seconds = 2 * l * l * row / MATRIX_OPS_PER_S
    return cost_of((l * 8 * row, l * 14 * row), (seconds, 2.5 * seconds))


def rms_norm(shape: Shape, l: int) -> Cost:
    """With a gate, or with a float32 residual, whose sum is written and read by backward."""
    if "residual" in shape:
        return cost_of((l * 12 * shape["d"], l * (16 if "both" in shape else 12) * shape["d"]))
    return cost_of((l * 6 * shape["d"], l * 10 * shape["d"]))


def product(l: int, before: int, after: int) -> Cost:
    """x W^T: (l, before) -> (l, after)."""
    seconds = 2 * l * before * after / MATRIX_OPS_PER_S
    return cost_of((2 * l * (before + after), 4 * l * (before + after)), (seconds, 2 * seconds))


def layer(shape: Shape, l: int) -> Cost:
    """Of its parts, one after the other."""
    d, n, inner = shape["d"], shape["n"], 2 * shape["d"]
    if shape["mixer"] == "mamba":
        rank = d // 16
        parts: Sequence[Cost] = [
            product(l, d, 2 * inner), causal_conv1d({"d": inner}, l), product(l, inner, rank + 2 * n),
            product(l, rank, inner), selective_scan(shape, l), product(l, inner, d),
        ]  # fmt: skip
    else:
        parts = [
            product(l, d, 2 * inner + 2 * n + shape["h"]), causal_conv1d({"d": inner + 2 * n}, l), ssd(shape, l),
            rms_norm({"d": inner}, l), product(l, inner, d),
        ]  # fmt: skip
    gb, ms = ([sum(getattr(part, key)[i] for part in parts) for i in (0, 1)] for key in Cost._fields)
    return Cost((gb[0], gb[1]), (ms[0], ms[1]))
