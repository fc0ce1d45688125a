"""Measures what a GPU does at best: a copy's bytes, matrix products, FMA, and steps of a scan, per second.

    python benchmarks/ceilings.py        # writes benchmarks/results/h200/ceilings.json

The two kernels here compute in registers alone, on eight numbers per thread, on random data, in as many programs as a
GPU of 132 multiprocessors holds at once (more come in waves, the last of which is not full); timing.py says how times
are taken, and costs.py which of these are limits. A matrix product of (m, m) counts as 2 m^3, an FMA as one, a step as
one exp2 and five FMA or products.
"""

import argparse
from collections.abc import Callable
from typing import Any

import record
import torch
import triton
import triton.language as tl
from timing import Call, measure, normal
from torch import Tensor

ROUNDS, BLOCK, PROGRAMS = 4096, 1024, 132 * 4
UNROLLED = tl.constexpr(16)


@triton.jit
def _multiply_add(x, rounds, BLOCK: tl.constexpr):
    """x <- a x + b, again and again: 16 FMA a round; a and b are x at the start, so that no two numbers do the same."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    factor, term = value, 1 - value
    for _ in range(rounds):
        for _ in tl.static_range(UNROLLED):
            value = tl.fma(value, factor, term)
    tl.store(x + at, value)


@triton.jit
def _scan_steps(x, rounds, BLOCK: tl.constexpr):
    """16 steps a round of h <- exp2(dt a) h + dt b, y <- y + c h, whose dt is an FMA of the last."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at)
    b, c = 1 - a, 2 * a
    h, y, dt = a, b, c
    for _ in range(rounds):
        for _ in tl.static_range(UNROLLED):
            dt = tl.fma(dt, a, b)
            h = tl.fma(tl.math.exp2(-dt * a), h, dt * b)
            y = tl.fma(c, h, y)
    tl.store(x + at, h + y)


def in_registers(kernel: Any, x: Tensor, rounds: int = ROUNDS) -> Tensor:
    """x (programs x BLOCK,) in float32, between 0 and 1, after so many rounds of 16."""
    y = x.clone()
    kernel[(x.shape[0] // BLOCK,)](y, rounds, BLOCK, num_warps=4)
    return y


def ceilings() -> dict[str, tuple[float, Callable[[], Tensor]]]:
    """Of each, how much is done in a call, and the call; their data stay on the GPU."""
    large = normal(1 << 31)
    copy = torch.empty_like(large)
    found: dict[str, tuple[float, Callable[[], Tensor]]] = {
        "copy, bytes": (2 * large.nbytes, lambda: copy.copy_(large))
    }
    for size in (4096, 8192):
        left, right = normal(size, size), normal(size, size)
        found[f"matrix products of {size}, operations"] = (2 * size**3, lambda a=left, b=right: a @ b)
    x = torch.rand(BLOCK * PROGRAMS, device="cuda")
    steps = 16 * ROUNDS * len(x)
    found["FMA in float32"] = (steps, lambda: in_registers(_multiply_add, x))
    found["steps of a scan"] = (steps, lambda: in_registers(_scan_steps, x))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    about = record.origin(parser.parse_args().commit)
    torch.manual_seed(0)
    rows = []
    for op, (count, function) in ceilings().items():
        milliseconds, _ = measure(Call(function, [], []), False, 0.1)
        per_s = float(f"{count / milliseconds * 1e3:.4g}")
        rows.append({"op": op, "ms": round(milliseconds, 4), "per_s": per_s} | about)
        print(f"{op:36} {milliseconds:9.4f} ms {per_s:.4g} / s", flush=True)
    record.write_rows("ceilings", rows)


if __name__ == "__main__":
    main()
