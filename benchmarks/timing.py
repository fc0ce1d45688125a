"""What the GPU benchmarks share: how a call is timed, the rows and the table.

A time is the median over CUDA events around each call, after warm-up calls, on random data; calls follow each other
without a wait, so that a short one shows what the CPU needs to launch it. Two passes are timed: "fwd" without
gradients, and "fwd+bwd", forward and backward through autograd with random gradients of the outputs, in which every
input is a leaf whose `.grad` was set to None before the call, outside the timing. `peak_gb` is the memory above what
was allocated before the call: outputs, gradients and workspace, without inputs. `gb` and `floor_ms` are the least of
costs.py.
"""

import argparse
import gc
import importlib
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch
from costs import Cost
from torch import Tensor

LENGTHS = (4096, 16384, 65536, 262144, 1048576)
WARM_UP, LEAST, MOST = 3, 5, 100  # calls


class Call(NamedTuple):
    """One implementation on its data."""

    function: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: Sequence[Tensor]
    gradients: Sequence[Tensor]
    "of the first outputs; further outputs get none"


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def leaves(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def step_size_bias(size: int) -> Tensor:
    """dt_bias for step sizes as Mamba initialises them, log-uniform between 0.001 and 0.1."""
    dt = torch.empty(size, device="cuda").uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return dt + torch.log(-torch.expm1(-dt))


def public(module: str, name: str) -> Any:
    """What an installed package offers by that name, or None; looked for outside this folder, which has namesakes."""
    path, here = list(sys.path), Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != here]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None
    finally:
        sys.path[:] = path


def measure(call: Call, backward: bool, seconds: float) -> tuple[float, float]:
    """Median milliseconds, and peak memory in GB."""

    def run() -> None:
        with torch.set_grad_enabled(backward):
            outputs = call.function()
            if backward:
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                torch.autograd.backward(outputs[: len(call.gradients)], call.gradients)

    def clear() -> None:
        for leaf in call.leaves:
            leaf.grad = None

    def timed(count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            clear()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    run()  # compiles
    once = min(timed(WARM_UP))
    clear()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = torch.cuda.max_memory_allocated() - before
    milliseconds = statistics.median(timed(int(min(MOST, max(LEAST, seconds * 1e3 / once)))))
    clear()
    return milliseconds, peak / 1e9


def main(
    op: str,
    description: str | None,
    shapes: Sequence[dict[str, Any]],
    calls: Callable[[dict[str, Any], int], dict[str, Callable[[], Call]]],
    cost: Callable[[dict[str, Any], int], Cost],
    longest: Callable[[dict[str, Any]], int] = lambda shape: max(LENGTHS),
) -> None:
    """Times every implementation in `calls(shape, l)`, which builds them on demand, "ours" before all others.

    Writes results/GPU/OP.json, a list of rows, and prints them as they come.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=0.15, help="of repeats per row")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = record.origin(options.commit)
    rows: list[dict[str, Any]] = []
    cases = [(shape, l) for shape in shapes for l in options.lengths if l <= longest(shape)]
    print(f"{'shape':44} {'l':>8} {'implementation':14} {'pass':8} {'ms':>9} {'floor':>8} {'peak GB':>8}  against")
    # others last: one that reads outside its memory ends all work on the GPU
    for ours in (True, False):
        for shape, l in cases:
            for implementation, build in calls(shape, l).items():
                if ours == (implementation == "ours"):
                    for found in _passes(build, cost(shape, l), options.seconds):
                        row = {"op": op, "impl": implementation, "shape": shape, "l": l, "dtype": "bf16"} | found
                        rows.append(row | about)
                        _compare(rows)
                        _print(rows[-1])
                    if rows:
                        record.write_rows(op, rows)


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Gives our row of what the last row measured the ratio of the last row's time to ours."""
    last = rows[-1]
    for row in rows:
        same = all(row[key] == last[key] for key in ("shape", "l", "pass"))
        if same and row["impl"] == "ours" and row is not last:
            row.setdefault("ratio", {})[last["impl"]] = last["against_ours"] = round(last["ms"] / row["ms"], 3)


def _print(row: dict[str, Any]) -> None:
    shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
    against = (
        f"{row['against_ours']:.2f} x ours" if "against_ours" in row else f"{row['ms'] / row['floor_ms']:.1f} x floor"
    )
    times = f"{row['ms']:9.4f} {row['floor_ms']:8.4f} {row['peak_gb']:8.3f}  {against}"
    print(f"{shape:44} {row['l']:8} {row['impl']:14} {row['pass']:8} {times}", flush=True)


def _passes(build: Callable[[], Call], cost: Cost, seconds: float) -> list[dict[str, Any]]:
    rows = []
    try:
        call = build()
        for backward in (False, True):
            milliseconds, peak = measure(call, backward, seconds)
            rows.append({
                "pass": "fwd+bwd" if backward else "fwd", "ms": round(milliseconds, 4),
                "gb": round(sum(cost.gb[: 1 + backward]), 4), "floor_ms": round(sum(cost.ms[: 1 + backward]), 4),
                "peak_gb": round(peak, 3),
            })  # fmt: skip
    except RuntimeError as error:  # out of memory, or an implementation that does not take this length
        print(f"failed: {str(error).splitlines()[0]}", flush=True)
    call = None
    gc.collect()
    torch.cuda.empty_cache()
    return rows
