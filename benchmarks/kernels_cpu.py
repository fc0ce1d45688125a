"""Times the two scans on a CPU: forward, and forward with backward, at 131,072 steps in float32.

    python benchmarks/kernels_cpu.py        # writes benchmarks/results/kernels_cpu.json

Each row is measured in a process of its own, so that its peak of memory is its own: `peak_rss_increase_mib` is the
highest resident memory during the timed calls less that before them, when inputs exist and code is compiled.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from record import write_result
from torch import Tensor

from seqmodels.kernels.selective_scan import selective_scan
from seqmodels.kernels.ssd import ssd

WIDTH, STATE = 256, 16  # selective_scan: e, n
HEADS, HEAD_SIZE, SSD_STATE = 4, 64, 64  # ssd: h, p, n


def scan_inputs(l: int) -> dict[str, Tensor]:
    """Random arguments of selective_scan as a freshly initialised mixer makes them, with gate, skip and bias."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"x": (1, l, WIDTH), "dt": (1, l, WIDTH), "z": (1, l, WIDTH), "B": (1, l, 1, STATE), "C": (1, l, 1, STATE)}
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    A = -torch.arange(1.0, STATE + 1).repeat(WIDTH, 1)
    return tensors | {"A": A, "D": torch.ones(WIDTH), "dt_bias": torch.full((WIDTH,), -4.0)}


def ssd_inputs(l: int) -> dict[str, Tensor]:
    """Random arguments of ssd as a freshly initialised mixer makes them, with skip and bias."""
    rng = torch.Generator().manual_seed(0)
    shapes = {
        "x": (1, l, HEADS, HEAD_SIZE), "dt": (1, l, HEADS), "B": (1, l, 1, SSD_STATE), "C": (1, l, 1, SSD_STATE)
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    A = -torch.linspace(1, 16, HEADS)
    return tensors | {"A": A, "D": torch.ones(HEADS), "dt_bias": torch.full((HEADS,), -4.0)}


OPS: dict[str, tuple[Callable, Callable[[int], dict[str, Tensor]], str]] = {
    "selective_scan": (selective_scan, scan_inputs, f"b=1 e={WIDTH} n={STATE} g=1, gate, skip, bias"),
    "ssd": (ssd, ssd_inputs, f"b=1 h={HEADS} p={HEAD_SIZE} n={SSD_STATE} g=1, skip, bias"),
}


def measure(name: str, backward: bool, l: int, repeats: int) -> dict:
    """One row: median seconds of `repeats` calls after a short one that compiles."""
    op, make, shapes = OPS[name]

    def call(arguments: dict[str, Tensor]) -> None:
        y, _ = op(**arguments, dt_softplus=True)
        if backward:
            y.backward(torch.ones_like(y))

    call({k: v.requires_grad_(backward) for k, v in make(1000).items()})
    arguments = {k: v.requires_grad_(backward) for k, v in make(l).items()}
    before, seconds = peak_rss(), []
    for _ in range(repeats):
        for tensor in arguments.values():
            tensor.grad = None
        start = time.perf_counter()
        call(arguments)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "op": name, "pass": "forward+backward" if backward else "forward", "l": l, "shapes": shapes, "dtype": "float32",
        "threads": torch.get_num_threads(), "repeats": repeats, "median_s": round(median, 4),
        "min_s": round(min(seconds), 4), "max_s": round(max(seconds), 4), "steps_per_s": round(l / median),
        "peak_rss_increase_mib": round((peak_rss() - before) / 2**20),
    }  # fmt: skip


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=131072)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("OP", "PASS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        row = measure(options.one[0], options.one[1] == "forward+backward", options.steps, options.repeats)
        print(json.dumps(row))
        return
    rows = []
    print(f"{'op':16} {'pass':18} {'median s':>9} {'steps/s':>9} {'MiB':>6}")
    for name in OPS:
        for direction in ("forward", "forward+backward"):
            command = [sys.executable, *sys.argv, "--one", name, direction]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            rows.append(row)
            figures = f"{row['median_s']:9.3f} {row['steps_per_s']:9,} {row['peak_rss_increase_mib']:6}"
            print(f"{name:16} {direction:18} {figures}")
    write_result("kernels_cpu", rows)


if __name__ == "__main__":
    main()
